"""Lightning indexer of the wheel, `npu_lightning_indexer`, and what all indexers share.

Score of key j for a query: sum over heads of w_h * relu(q_h . k_j), in float32; the best are returned by number, -1 after the
last. Best first, and the lowest number among equals; no document says which of equals are taken, so callers may rely on neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documented import (
    HALF,
    MAX_INT64,
    emulates,
    family,
    garbage,
    refuse,
    want_contiguous,
    want_dtype,
    want_shape,
)
from .paged import Rows, by_layout, equal, packed, paged, query_blocks

_QUERIES = 64


def _best(scores: Tensor, seen: Tensor, count: int) -> Tensor:
    """Numbers of the `count` best seen keys per row, -1 behind: [Q, count] int32."""
    order = torch.sort(torch.where(seen, scores, -torch.inf), dim=-1, descending=True, stable=True).indices
    kept = torch.gather(seen, -1, order)
    numbers = torch.where(kept, order, -1)[:, :count].to(torch.int32)
    return torch.nn.functional.pad(numbers, (0, count - numbers.shape[1]), value=-1)


def select(
    queries: Rows, weights: Tensor, q_scale: Tensor | None, keys: Rows, k_scale: Rows | None, limits: tuple[int, ...],
    ratio: int, causal: bool, count: int,
) -> Tensor:  # fmt: skip
    """Best keys of every query; causal ones see j < floor((p + 1) / ratio), p counted in tokens before compression."""
    out = torch.full((len(queries.data), count), -1, dtype=torch.int32)
    assert queries.starts is not None
    for b, local in query_blocks(queries, _QUERIES):
        rows = queries.starts[b] + local
        every = torch.arange(keys.lengths[b])
        if not len(every):
            continue
        q, k = queries.data[rows].float(), keys.at(b, every)[:, 0].float()
        dot = torch.einsum("qhd,nd->qhn", q, k)
        if q_scale is not None and k_scale is not None:
            dot = dot * q_scale[rows].float()[..., None] * k_scale.at(b, every)[:, 0].float()
        scores = torch.einsum("qh,qhn->qn", weights[rows].float(), dot.relu())
        pos = (limits[b] - queries.lengths[b] + local + 1)[:, None]
        visible = pos // ratio if causal else torch.full_like(pos, keys.lengths[b])
        out[rows] = _best(scores, every < visible, count)
    return out


def queries(q: Tensor, layout: str, bounds: Tensor | None, used: Tensor | None) -> Rows:
    refuse(
        layout not in ("TND", "BSND") or q.dim() != (3 if layout == "TND" else 4),
        f"{layout} queries are {list(q.shape)}",
    )
    refuse(q.shape[-1] != 128, f"the head dim is {q.shape[-1]}, documented is 128")
    return packed("query", q, bounds, used) if layout == "TND" else equal("query", q, used)


def shaped(numbers: Tensor, q: Tensor) -> Tensor:
    return numbers.view(*q.shape[:-2], 1, numbers.shape[-1])


@emulates("npu", "npu_lightning_indexer")
def npu_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None, block_table: Tensor | None = None, layout_query: str = "BSND",
    layout_key: str = "BSND", sparse_count: int = 2048, sparse_mode: int = 3, pre_tokens: int = MAX_INT64,
    next_tokens: int = MAX_INT64, return_value: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Best keys without compression: mode 0 sees all keys of its sequence, mode 3 those up to its own position.

    Shapes:
        query [T, N, 128] or [B, S, N, 128], key of its dtype, weights [T, N] or [B, S, N] -> [.., 1, sparse_count] int32
    """
    want_dtype("query", query, *HALF)
    refuse(key.dtype != query.dtype, f"key is {key.dtype}, query {query.dtype}")
    here = family()
    listed = {query.dtype} | ({torch.float32} if here != "950" else set())
    refuse(weights.dtype not in listed, f"weights are {weights.dtype}, documented are {listed} on {here}")
    want_contiguous(query=query, key=key, weights=weights)
    heads = query.shape[-2]
    refuse(
        heads > 64 or (here == "950" and heads not in (8, 16, 24, 32, 64)),
        f"{heads} heads are not documented on {here}",
    )
    refuse(key.shape[-2:] != (1, 128), f"key is {list(key.shape)}, documented is one head of 128")
    want_shape("weights", weights, *query.shape[:-1])
    counts = {*range(1, 2049), *range(3072, 8193, 1024)}
    refuse(
        sparse_count not in counts,
        f"sparse_count is {sparse_count}, documented are 1 to 2048 and 3072 to 8192 by 1024",
    )
    refuse(
        sparse_mode not in (0, 3) or (pre_tokens, next_tokens) != (MAX_INT64, MAX_INT64),
        "an undocumented mask",
    )
    refuse(return_value, "the scores are for training")
    refuse(
        layout_key != "PA_BSND" and layout_key != layout_query,
        f"layouts {layout_query} and {layout_key} differ",
    )
    rows = queries(query, layout_query, *by_layout(actual_seq_lengths_query, layout_query))
    bounds, used = by_layout(actual_seq_lengths_key, layout_key)
    if layout_key == "PA_BSND":
        keys = paged("key", key, block_table, used)
    else:
        keys = packed("key", key, bounds) if layout_key == "TND" else equal("key", key, used)
    numbers = select(
        rows, weights.flatten(0, -2), None, keys, None, keys.lengths, 1, sparse_mode == 3, sparse_count
    )
    return shaped(numbers, query), garbage(0, dtype=query.dtype)
