"""Attention to listed rows: `npu_sparse_flash_attention` of torch_npu 2.13.0."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_rows import QUERIES, index_rows, kv_rows, query_rows, softmax_rows
from .documented import HALF, MAX_INT64, Refused, emulates, family, refuse, want_contiguous, want_dtype
from .paged import by_layout, query_blocks


@emulates("npu", "npu_sparse_flash_attention")
def npu_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor | None, sparse_indices: Tensor, scale_value: float, *,
    block_table: Tensor | None = None, actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    sparse_block_size: int = 1, layout_query: str = "BSND", layout_kv: str = "BSND", sparse_mode: int = 3,
    pre_tokens: int = MAX_INT64, next_tokens: int = MAX_INT64, attention_mode: int = 0, return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention over the rows that `sparse_indices` lists; keys are 512 plain channels and 64 rotary ones.

    Mode 0 masks nothing more; mode 3 hides rows past S - L + i from query i of L new ones.

    Shapes:
        query [T, N, 512] or [B, S, N, 512], its rope [.., 64]; sparse_indices [.., 1, K] int32, the valid ones first
        -> like query, and two empty float32
    """
    refuse(attention_mode != 2, f"attention_mode is {attention_mode}, documented is 2")
    if query_rope is None or key_rope is None or value is None:
        raise Refused("attention_mode 2 needs query_rope, key_rope and value")
    want_dtype("query", query, *HALF)
    want_contiguous(query=query, key=key, value=value, query_rope=query_rope, key_rope=key_rope)
    refuse(
        {t.dtype for t in (key, value, query_rope, key_rope)} != {query.dtype},
        "all inputs must have one dtype",
    )
    refuse(
        query.shape[-1] != 512 or key.shape[-1] != 512,
        f"head dims {query.shape[-1]}, {key.shape[-1]}, documented are 512",
    )
    refuse(query_rope.shape[-1] != 64 or key_rope.shape[-1] != 64, "rope dims are documented as 64")
    refuse(
        key.shape[-2] != 1 or value.shape != key.shape,
        f"key {list(key.shape)} and value {list(value.shape)} of one head",
    )
    heads, here = query.shape[-2], family()
    refuse(
        here != "950" and (heads > 128 or heads & (heads - 1) != 0),
        f"{heads} heads, documented are powers of two to 128",
    )
    refuse(sinks is not None and here != "950", f"sinks are supported on 950 only, not on {here}")
    refuse(
        sparse_block_size != 1, f"sparse_block_size is {sparse_block_size}; tokens (1) are what is emulated"
    )
    refuse(
        sparse_mode not in (0, 3) or (pre_tokens, next_tokens) != (MAX_INT64, MAX_INT64),
        "an undocumented mask",
    )
    refuse(return_softmax_lse, "the softmax statistics are for training")
    refuse(
        layout_kv != "PA_BSND" and layout_kv != layout_query, f"layouts {layout_query} and {layout_kv} differ"
    )
    bounds, used = by_layout(actual_seq_lengths_query, layout_query)
    queries = query_rows(query, layout_query, bounds, used)
    kv_bounds, kv_used = by_layout(actual_seq_lengths_kv, layout_kv)
    keys = kv_rows("key", key, layout_kv, kv_bounds, kv_used, block_table)
    ropes = kv_rows("key_rope", key_rope, layout_kv, kv_bounds, kv_used, block_table)
    values = kv_rows("value", value, layout_kv, kv_bounds, kv_used, block_table)
    picks = index_rows(sparse_indices, layout_query).long()
    gaps = (picks[:, 1:] >= 0) & (picks[:, :-1] < 0)
    refuse(bool(gaps.any()), "a valid index follows an invalid one; valid ones must come first")
    full = torch.cat((query, query_rope), -1).flatten(0, -3).float()
    out = torch.zeros(queries.data.shape, dtype=torch.float32)
    assert queries.starts is not None
    for b, local in query_blocks(queries, QUERIES):
        rows = queries.starts[b] + local
        far = picks[rows]
        end = keys.lengths[b] - (
            queries.lengths[b] - 1 - local if sparse_mode == 3 else torch.zeros_like(local)
        )
        refuse(bool((far >= keys.lengths[b]).any()), "an index points past the rows of its sequence")
        seen = (far >= 0) & (far < end[:, None])
        at = torch.where(seen, far, 0)
        k = torch.cat((keys.at(b, at), ropes.at(b, at)), -1)[:, :, 0].float()
        out[rows] = softmax_rows(full[rows], k, values.at(b, at)[:, :, 0].float(), seen, scale_value, sinks)
    empty = torch.empty(0, dtype=torch.float32)
    return out.view(query.shape).to(query.dtype), empty, empty.clone()
