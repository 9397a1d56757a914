"""Lightning indexers of the packs over quantised keys: int8, and FP8 on the 950."""

from __future__ import annotations

import torch
from torch import Tensor

from .documented import (
    MAX_INT64,
    Refused,
    division_of_work,
    emulates,
    family,
    garbage,
    refuse,
    want_contiguous,
    want_division,
    want_dtype,
    want_shape,
)
from .indexer import queries, select, shaped
from .paged import by_layout, equal, packed, paged

_FP16_MAX = torch.finfo(torch.float16).max


def _int8(query: Tensor, key: Tensor, weights: Tensor, q_scale: Tensor, k_scale: Tensor) -> None:
    """The int8 form: everything else is float16, and weight times query scale must not leave its range."""
    for name, x in (("query", query), ("key", key)):
        want_dtype(name, x, torch.int8)
    for name, x in (("weights", weights), ("query_dequant_scale", q_scale), ("key_dequant_scale", k_scale)):
        want_dtype(name, x, torch.float16)
    product = (weights.float() * q_scale.float()).abs()
    refuse(
        bool((product > _FP16_MAX).any()),
        f"weight times query scale reaches {product.max():.3g}, past float16",
    )


def _check_quantised(query: Tensor, key: Tensor, weights: Tensor, q_scale: Tensor, k_scale: Tensor) -> None:
    want_contiguous(query=query, key=key, weights=weights, q_scale=q_scale, k_scale=k_scale)
    refuse(key.shape[-2:] != (1, 128), f"key is {list(key.shape)}, documented is one head of 128")
    want_shape("weights", weights, *query.shape[:-1])
    want_shape("query_dequant_scale", q_scale, *query.shape[:-1])
    want_shape("key_dequant_scale", k_scale, *key.shape[:-1])


def _power_of_two(ratio: int) -> bool:
    return 1 <= ratio <= 128 and ratio & (ratio - 1) == 0


@emulates("_C_ascend", "npu_vllm_quant_lightning_indexer", chips=("910B", "910C"))
def npu_vllm_quant_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, query_dequant_scale: Tensor, key_dequant_scale: Tensor,
    query_quant_mode: int = 0, key_quant_mode: int = 0, actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None, block_table: Tensor | None = None, metadata: Tensor | None = None,
    layout_query: str = "BSND", layout_key: str = "BSND", sparse_count: int = 2048, sparse_mode: int = 3,
    pre_tokens: int = MAX_INT64, next_tokens: int = MAX_INT64, cmp_ratio: int = 1, return_value: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Best compressed keys in int8; `actual_seq_lengths_key` counts tokens before compression.

    Shapes:
        query [T, 64, 128] int8 or [B, S, 64, 128], key pages [P, block, 1, 128] int8, weights and query scale [T, 64],
        key scale [P, block, 1], all float16 -> [.., 1, sparse_count] int32
    """
    want_division(
        metadata, heads=query.shape[-2], topk=sparse_count, cmp_ratio=cmp_ratio, mask=sparse_mode,
        layouts=(layout_query, layout_key), lengths_q=actual_seq_lengths_query, lengths_k=actual_seq_lengths_key,
    )  # fmt: skip
    _int8(query, key, weights, query_dequant_scale, key_dequant_scale)
    _check_quantised(query, key, weights, query_dequant_scale, key_dequant_scale)
    refuse(query.shape[-2] != 64, f"{query.shape[-2]} heads, documented are 64")
    refuse((query_quant_mode, key_quant_mode) != (0, 0), "quant modes are documented as 0")
    refuse(layout_key != "PA_BSND", f"layout_key is {layout_key}, documented is PA_BSND")
    refuse(not 1 <= sparse_count <= 2048, f"sparse_count is {sparse_count}, documented are 1 to 2048")
    refuse(
        sparse_mode not in (0, 3) or (pre_tokens, next_tokens) != (MAX_INT64, MAX_INT64),
        "an undocumented mask",
    )
    refuse(not _power_of_two(cmp_ratio), f"cmp_ratio is {cmp_ratio}, documented are powers of two to 128")
    refuse(return_value, "scores are not returned")
    if actual_seq_lengths_key is None:
        raise Refused("pages of keys need actual_seq_lengths_key")
    rows = queries(query, layout_query, *by_layout(actual_seq_lengths_query, layout_query))
    originals = tuple(actual_seq_lengths_key.tolist())
    lengths = [n // cmp_ratio for n in originals]
    keys = paged("key", key, block_table, actual_seq_lengths_key, lengths)
    k_scale = paged("key_dequant_scale", key_dequant_scale, block_table, actual_seq_lengths_key, lengths)
    numbers = select(
        rows, weights.flatten(0, -2), query_dequant_scale.flatten(0, -2), keys, k_scale, originals, cmp_ratio,
        sparse_mode == 3, sparse_count,
    )  # fmt: skip
    return shaped(numbers, query), garbage(0, dtype=torch.float32)


@emulates("_C_ascend", "npu_vllm_quant_lightning_indexer_metadata", chips=("910B", "910C"))
def npu_vllm_quant_lightning_indexer_metadata(
    num_heads_q: int, num_heads_k: int, head_dim: int, query_quant_mode: int, key_quant_mode: int,
    actual_seq_lengths_query: Tensor | None = None, actual_seq_lengths_key: Tensor | None = None, batch_size: int = 0,
    max_seqlen_q: int = 0, max_seqlen_k: int = 0, layout_query: str = "BSND", layout_key: str = "BSND",
    sparse_count: int = 2048, sparse_mode: int = 3, pre_tokens: int = MAX_INT64, next_tokens: int = MAX_INT64,
    cmp_ratio: int = 1, device: str = "npu",
) -> Tensor:  # fmt: skip
    """The division of work of `npu_vllm_quant_lightning_indexer`: int32 [1024]."""
    refuse(
        num_heads_k != 1 or head_dim != 128,
        f"{num_heads_k} key heads of {head_dim}, documented is one of 128",
    )
    return division_of_work(
        heads=num_heads_q, topk=sparse_count, cmp_ratio=cmp_ratio, mask=sparse_mode, layouts=(layout_query, layout_key),
        lengths_q=actual_seq_lengths_query, lengths_k=actual_seq_lengths_key,
    )  # fmt: skip


@emulates("cann_ops_transformer", "quant_lightning_indexer")
def quant_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, query_dequant_scale: Tensor, key_dequant_scale: Tensor, topk: int,
    quant_mode: int, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, cmp_residual_k: Tensor | None = None,
    block_table: Tensor | None = None, output_idx_offset: Tensor | None = None, metadata: Tensor | None = None,
    max_seqlen_q: int = -1, layout_q: str = "BSND", layout_k: str = "BSND", mask_mode: int = 0, cmp_ratio: int = 1,
    return_value: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Best compressed keys; `seqused_k` counts compressed keys, the tokens behind them are that times ratio + residual.

    quant_mode 1 is FP8 E4M3 with float32 scales and weights (950), 2 is int8 with float16 ones; others are not emulated.
    """
    here = family()
    refuse(quant_mode not in (1, 2), f"quant_mode {quant_mode} is not emulated")
    refuse(metadata is None and here == "950", "metadata is required on 950")
    if metadata is not None:
        want_division(
            metadata, heads=query.shape[-2], topk=topk, quant_mode=quant_mode, cmp_ratio=cmp_ratio, mask=mask_mode,
            layouts=(layout_q, layout_k), cu_seqlens_q=cu_seqlens_q, seqused_q=seqused_q, cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k, cmp_residual_k=cmp_residual_k,
        )  # fmt: skip
    if quant_mode == 2:
        _int8(query, key, weights, query_dequant_scale, key_dequant_scale)
    else:
        refuse(here != "950", f"FP8 (quant_mode 1) is for 950, not for {here}")
        for name, x in (("query", query), ("key", key)):
            want_dtype(name, x, torch.float8_e4m3fn)
        for name, x in (
            ("weights", weights),
            ("query scale", query_dequant_scale),
            ("key scale", key_dequant_scale),
        ):
            want_dtype(name, x, torch.float32)
    _check_quantised(query, key, weights, query_dequant_scale, key_dequant_scale)
    heads = query.shape[-2]
    refuse(not 1 <= topk <= (8192 if here == "950" else 2048), f"topk is {topk}")
    refuse(
        mask_mode not in (0, 3) or max_seqlen_q != -1, f"mask_mode {mask_mode}, max_seqlen_q {max_seqlen_q}"
    )
    refuse(
        (cmp_ratio > 1 and mask_mode == 3) != (cmp_residual_k is not None),
        "cmp_residual_k goes with mask 3 and a ratio",
    )
    refuse(not 1 <= cmp_ratio <= 128, f"cmp_ratio is {cmp_ratio}")
    refuse(output_idx_offset is not None or return_value != 0, "offsets and scores are not emulated")
    if here == "950":
        refuse(heads > 64, f"{heads} heads, documented are 1 to 64")
    else:
        refuse(heads != 64, f"{heads} heads, documented are 64")
        refuse(layout_k != "PA_BBND", f"layout_k is {layout_k}, documented is PA_BBND")
        refuse(not _power_of_two(cmp_ratio), f"cmp_ratio is {cmp_ratio}, documented are powers of two")
        refuse(layout_q == "TND" and seqused_q is not None, "seqused_q does not go with TND queries")
    rows = queries(query, layout_q, cu_seqlens_q, seqused_q)
    if layout_k == "PA_BBND":
        keys = paged("key", key, block_table, seqused_k)
        k_scale = paged("key scale", key_dequant_scale, block_table, seqused_k)
    elif layout_k == "TND":
        keys, k_scale = (
            packed("key", key, cu_seqlens_k, seqused_k),
            packed("key scale", key_dequant_scale, cu_seqlens_k),
        )
    else:
        keys, k_scale = equal("key", key, seqused_k), equal("key scale", key_dequant_scale)
    rest = [0] * len(keys.lengths) if cmp_residual_k is None else cmp_residual_k.tolist()
    refuse(any(not 0 <= r < cmp_ratio for r in rest), f"cmp_residual_k is {rest} for ratio {cmp_ratio}")
    originals = tuple(n * cmp_ratio + r for n, r in zip(keys.lengths, rest, strict=True))
    numbers = select(
        rows, weights.flatten(0, -2), query_dequant_scale.flatten(0, -2), keys, k_scale, originals, cmp_ratio,
        mask_mode == 3, topk,
    )  # fmt: skip
    return shaped(numbers, query), garbage(0, dtype=torch.bfloat16)


@emulates("cann_ops_transformer", "quant_lightning_indexer_metadata")
def quant_lightning_indexer_metadata(
    num_heads_q: int, num_heads_k: int, head_dim: int, topk: int, quant_mode: int, *, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    cmp_residual_k: Tensor | None = None, batch_size: int | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, layout_q: str | None = None, layout_k: str | None = None, mask_mode: int | None = None,
    cmp_ratio: int | None = None,
) -> Tensor:  # fmt: skip
    """The division of work of `quant_lightning_indexer`: int32 [1024]."""
    refuse(
        num_heads_k != 1 or head_dim != 128,
        f"{num_heads_k} key heads of {head_dim}, documented is one of 128",
    )
    return division_of_work(
        heads=num_heads_q, topk=topk, quant_mode=quant_mode, cmp_ratio=1 if cmp_ratio is None else cmp_ratio,
        mask=mask_mode or 0, layouts=(layout_q or "BSND", layout_k or "BSND"), cu_seqlens_q=cu_seqlens_q,
        seqused_q=seqused_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, cmp_residual_k=cmp_residual_k,
    )  # fmt: skip
