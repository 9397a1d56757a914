"""Attention over a window and compressed rows: `sparse_flash_mla` and `npu_sparse_attn_sharedkv` of the packs.

One KV head is key and value at once. Softmax, sums and the weighted values are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_rows import QUERIES, index_rows, kv_rows, query_rows, softmax_rows
from .documented import (
    HALF,
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
from .paged import Rows, query_blocks

_WINDOW = 128


def _windowed(
    q: Tensor, queries: Rows, window: Rows, compressed: Rows | None, originals: tuple[int, ...], picks: Tensor | None,
    ratio: int, scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The window (band mask, 127 back) and compressed rows (causal in blocks of `ratio`), of every query.

    Query i of L new ones of a sequence of S is at S - L + i. It sees window rows p-127..p and compressed rows
    j < floor((p + 1) / ratio), all of them or those picked.
    """
    out = torch.zeros(queries.data.shape, dtype=torch.float32)
    assert queries.starts is not None
    for b, local in query_blocks(queries, QUERIES):
        rows = queries.starts[b] + local
        pos = (window.lengths[b] - queries.lengths[b] + local)[:, None]
        near = pos - torch.arange(_WINDOW - 1, -1, -1)
        seen = near >= 0
        keys = window.at(b, near.clamp_min(0))[:, :, 0].float()
        if compressed is not None:
            visible = (originals[b] - queries.lengths[b] + local + 1)[:, None] // ratio
            visible = visible.clamp_max(compressed.lengths[b])
            far = (
                picks[rows].long()
                if picks is not None
                else torch.arange(int(visible.max())).expand(len(local), -1)
            )
            known = (far >= 0) & (far < visible)
            more = compressed.at(b, torch.where(known, far, 0))[:, :, 0].float() if known.any() else None
            if more is not None:
                keys, seen = torch.cat((keys, more), 1), torch.cat((seen, known), 1)
        out[rows] = softmax_rows(queries.data[rows].float(), keys, keys, seen, scale, sinks)
    return out.view(q.shape).to(q.dtype)


def _common(q: Tensor, ori_kv: Tensor | None, cmp_kv: Tensor | None, sinks: Tensor | None) -> Tensor:
    if ori_kv is None:
        raise Refused("ori_kv is required")
    want_dtype("q", q, *HALF)
    want_contiguous(q=q)
    for name, kv in (("ori_kv", ori_kv), ("cmp_kv", cmp_kv)):
        if kv is not None:
            refuse(kv.dtype != q.dtype, f"{name} is {kv.dtype}, q {q.dtype}")
            refuse(
                kv.shape[-1] != 512 or kv.shape[-2] != 1,
                f"{name} is {list(kv.shape)}, documented is one head of 512",
            )
    refuse(q.shape[-1] != 512, f"the head dim is {q.shape[-1]}, documented is 512")
    heads = q.shape[-2]
    refuse(
        heads > 128 or heads & (heads - 1) != 0, f"{heads} query heads, documented are powers of two to 128"
    )
    if sinks is not None:
        want_dtype("sinks", sinks, torch.float32)
        want_shape("sinks", sinks, heads)
    return ori_kv


def _masks(
    ori_mask_mode: int, ori_win_left: int, ori_win_right: int, cmp_mask_mode: int, has_cmp: bool
) -> None:
    refuse(ori_mask_mode != 4, f"ori_mask_mode is {ori_mask_mode}, documented is 4")
    refuse(
        (ori_win_left, ori_win_right) != (127, 0),
        f"the window is {ori_win_left}, {ori_win_right}, documented is 127, 0",
    )
    refuse(
        cmp_mask_mode not in ((3,) if has_cmp else (0, 3)),
        f"cmp_mask_mode is {cmp_mask_mode}, documented is 3",
    )


@emulates("cann_ops_transformer", "sparse_flash_mla")
def sparse_flash_mla(
    q: Tensor, *, ori_kv: Tensor | None = None, cmp_kv: Tensor | None = None, ori_sparse_indices: Tensor | None = None,
    cmp_sparse_indices: Tensor | None = None, ori_block_table: Tensor | None = None, cmp_block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_ori_kv: Tensor | None = None, cu_seqlens_cmp_kv: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_ori_kv: Tensor | None = None, seqused_cmp_kv: Tensor | None = None,
    cmp_residual_kv: Tensor | None = None, ori_topk_length: Tensor | None = None, cmp_topk_length: Tensor | None = None,
    sinks: Tensor | None = None, metadata: Tensor | None = None, softmax_scale: float = 1.0, cmp_ratio: int = 1,
    ori_mask_mode: int = 4, cmp_mask_mode: int = 3, ori_win_left: int = 127, ori_win_right: int = 0, layout_q: str = "BSND",
    layout_kv: str = "BSND", topk_value_mode: int = 1, return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a window alone, with all compressed rows, or with picked ones.

    The length before compression, from which the mask of compressed rows follows, is rows * cmp_ratio + cmp_residual_kv.

    Shapes:
        q [T, N, 512] or [B, S, N, 512]; KV packed [T, 1, 512], equal [B, S, 1, 512] or pages [P, block, 1, 512]
        -> like q, and an empty float32
    """
    kv = _common(q, ori_kv, cmp_kv, sinks)
    refuse(
        any(x is not None for x in (ori_sparse_indices, ori_topk_length, cmp_topk_length)),
        "reserved arguments are passed",
    )
    want_division(
        metadata, heads=q.shape[-2], topk=0 if cmp_sparse_indices is None else cmp_sparse_indices.shape[-1],
        cmp_ratio=cmp_ratio, masks=(ori_mask_mode, cmp_mask_mode), window=(ori_win_left, ori_win_right),
        layouts=(layout_q, layout_kv), has_cmp_kv=cmp_kv is not None, cu_seqlens_q=cu_seqlens_q, seqused_q=seqused_q,
        cu_seqlens_ori_kv=cu_seqlens_ori_kv, seqused_ori_kv=seqused_ori_kv, cu_seqlens_cmp_kv=cu_seqlens_cmp_kv,
        seqused_cmp_kv=seqused_cmp_kv, cmp_residual_kv=cmp_residual_kv,
    )  # fmt: skip
    refuse(
        topk_value_mode != 1 or return_softmax_lse,
        "topk_value_mode 1 without log-sum-exp is what is emulated",
    )
    _masks(ori_mask_mode, ori_win_left, ori_win_right, cmp_mask_mode, cmp_kv is not None)
    pairs = (("BSND", "BSND"), ("TND", "TND"), ("BSND", "PA_BBND"), ("TND", "PA_BBND"))
    refuse(
        (layout_q, layout_kv) not in pairs, f"layouts {layout_q} and {layout_kv} are not documented together"
    )
    here = family()
    refuse(here == "950" and q.shape[-2] == 1, "one query head is not supported on 950")
    picks = None if cmp_sparse_indices is None else index_rows(cmp_sparse_indices, layout_q)
    if cmp_kv is None:
        refuse(picks is not None or cmp_block_table is not None, "compressed indices or pages without cmp_kv")
        refuse(cmp_ratio != 1, f"cmp_ratio is {cmp_ratio} without cmp_kv, documented is 1")
    elif here != "950":
        refuse(
            cmp_ratio != (128 if picks is None else 4),
            f"cmp_ratio is {cmp_ratio}, documented are 4 picked and 128 whole",
        )
        refuse(picks is not None and picks.shape[1] not in (512, 1024), "top-k is documented as 512 or 1024")
    refuse(not 1 <= cmp_ratio <= 128, f"cmp_ratio is {cmp_ratio}, documented are 1 to 128")
    queries = query_rows(q, layout_q, cu_seqlens_q, seqused_q)
    window = kv_rows("ori_kv", kv, layout_kv, cu_seqlens_ori_kv, seqused_ori_kv, ori_block_table)
    compressed, originals = None, window.lengths
    if cmp_kv is not None:
        if cmp_residual_kv is None:
            raise Refused("cmp_residual_kv is required with cmp_kv")
        want_dtype("cmp_residual_kv", cmp_residual_kv, torch.int32)
        want_shape("cmp_residual_kv", cmp_residual_kv, len(window.lengths))
        rest = cmp_residual_kv.tolist()
        refuse(any(not 0 <= r < cmp_ratio for r in rest), f"cmp_residual_kv is {rest} for ratio {cmp_ratio}")
        if layout_kv == "PA_BBND" and seqused_cmp_kv is None:
            seqused_cmp_kv = torch.tensor([n // cmp_ratio for n in window.lengths], dtype=torch.int32)
        compressed = kv_rows("cmp_kv", cmp_kv, layout_kv, cu_seqlens_cmp_kv, seqused_cmp_kv, cmp_block_table)
        originals = tuple(n * cmp_ratio + r for n, r in zip(compressed.lengths, rest, strict=True))
    out = _windowed(q, queries, window, compressed, originals, picks, cmp_ratio, softmax_scale, sinks)
    return out, torch.empty((), dtype=torch.float32)


@emulates("_C_ascend", "npu_sparse_attn_sharedkv", chips=("910B", "910C"))
def npu_sparse_attn_sharedkv(
    q: Tensor, *, ori_kv: Tensor | None = None, cmp_kv: Tensor | None = None, ori_sparse_indices: Tensor | None = None,
    cmp_sparse_indices: Tensor | None = None, ori_block_table: Tensor | None = None, cmp_block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_ori_kv: Tensor | None = None, cu_seqlens_cmp_kv: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_kv: Tensor | None = None, sinks: Tensor | None = None,
    metadata: Tensor | None = None, softmax_scale: float = 0, cmp_ratio: int = 0, ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3, ori_win_left: int = 128, ori_win_right: int = 0, layout_q: str = "BSND", layout_kv: str = "PA_ND",
    return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by the other pack: pages only, one length before compression for both parts, 64 heads, top-k 512.

    The schema's default window of 128 is refused: what is documented is 127 rows back.
    """
    kv = _common(q, ori_kv, cmp_kv, sinks)
    want_division(
        metadata, heads=q.shape[-2], topk=0 if cmp_sparse_indices is None else cmp_sparse_indices.shape[-1],
        cmp_ratio=cmp_ratio, masks=(ori_mask_mode, cmp_mask_mode), window=(ori_win_left, ori_win_right),
        layouts=(layout_q, layout_kv), has_cmp_kv=cmp_kv is not None, cu_seqlens_q=cu_seqlens_q, seqused_kv=seqused_kv,
    )  # fmt: skip
    refuse(q.shape[-2] != 64, f"{q.shape[-2]} query heads, documented are 64")
    refuse(
        seqused_q is not None or ori_sparse_indices is not None,
        "seqused_q and ori_sparse_indices are not supported",
    )
    refuse(layout_kv != "PA_ND", f"layout_kv is {layout_kv}, documented is PA_ND")
    refuse(return_softmax_lse, "the log-sum-exp is not supported")
    _masks(ori_mask_mode, ori_win_left, ori_win_right, cmp_mask_mode, cmp_kv is not None)
    picks = None if cmp_sparse_indices is None else index_rows(cmp_sparse_indices, layout_q)
    refuse(
        picks is not None and (cmp_kv is None or picks.shape[1] != 512),
        "picked rows need cmp_kv and a top-k of 512",
    )
    queries = query_rows(q, layout_q, cu_seqlens_q, None)
    window = kv_rows("ori_kv", kv, layout_kv, None, seqused_kv, ori_block_table)
    compressed = None
    if cmp_kv is not None:
        refuse(cmp_ratio not in (4, 128), f"cmp_ratio is {cmp_ratio}, documented are 4 and 128")
        lengths = tuple(n // cmp_ratio for n in window.lengths)
        compressed = kv_rows("cmp_kv", cmp_kv, layout_kv, None, seqused_kv, cmp_block_table, lengths)
    scale = softmax_scale if softmax_scale != 0 else float(q.shape[-1] ** -0.5)
    out = _windowed(q, queries, window, compressed, window.lengths, picks, max(cmp_ratio, 1), scale, sinks)
    return out, garbage(0, dtype=torch.float32)


@emulates("cann_ops_transformer", "sparse_flash_mla_metadata")
def sparse_flash_mla_metadata(
    num_heads_q: int, num_heads_kv: int, head_dim: int, *, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_ori_kv: Tensor | None = None, cu_seqlens_cmp_kv: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_ori_kv: Tensor | None = None, seqused_cmp_kv: Tensor | None = None, cmp_residual_kv: Tensor | None = None,
    ori_topk_length: Tensor | None = None, cmp_topk_length: Tensor | None = None, batch_size: int | None = None,
    max_seqlen_q: int | None = None, max_seqlen_ori_kv: int | None = None, max_seqlen_cmp_kv: int | None = None,
    ori_topk: int | None = None, cmp_topk: int | None = None, cmp_ratio: int | None = None, ori_mask_mode: int | None = None,
    cmp_mask_mode: int | None = None, ori_win_left: int | None = None, ori_win_right: int | None = None,
    layout_q: str | None = None, layout_kv: str | None = None, has_ori_kv: bool | None = None, has_cmp_kv: bool | None = None,
) -> Tensor:  # fmt: skip
    """The division of work of `sparse_flash_mla`: int32 [1024]. None stands for the documented default."""
    refuse(
        num_heads_kv != 1 or head_dim != 512,
        f"{num_heads_kv} KV heads of {head_dim}, documented is one of 512",
    )
    refuse(has_ori_kv is False, "has_ori_kv is False, which is in no documented scenario")
    return division_of_work(
        heads=num_heads_q, topk=cmp_topk or 0, cmp_ratio=1 if cmp_ratio is None else cmp_ratio,
        masks=(ori_mask_mode or 0, cmp_mask_mode or 0),
        window=(-1 if ori_win_left is None else ori_win_left, -1 if ori_win_right is None else ori_win_right),
        layouts=(layout_q or "BSND", layout_kv or "BSND"), has_cmp_kv=has_cmp_kv is not False, cu_seqlens_q=cu_seqlens_q,
        seqused_q=seqused_q, cu_seqlens_ori_kv=cu_seqlens_ori_kv, seqused_ori_kv=seqused_ori_kv,
        cu_seqlens_cmp_kv=cu_seqlens_cmp_kv, seqused_cmp_kv=seqused_cmp_kv, cmp_residual_kv=cmp_residual_kv,
    )  # fmt: skip


@emulates("_C_ascend", "npu_sparse_attn_sharedkv_metadata", chips=("910B", "910C"))
def npu_sparse_attn_sharedkv_metadata(
    num_heads_q: int, num_heads_kv: int, head_dim: int, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_ori_kv: Tensor | None = None, cu_seqlens_cmp_kv: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_kv: Tensor | None = None, batch_size: int = 0, max_seqlen_q: int = 0, max_seqlen_kv: int = 0, ori_topk: int = 0,
    cmp_topk: int = 0, cmp_ratio: int = 4, ori_mask_mode: int = 4, cmp_mask_mode: int = 3, ori_win_left: int = 128,
    ori_win_right: int = 0, layout_q: str = "BSND", layout_kv: str = "PA_ND", has_ori_kv: bool = True,
    has_cmp_kv: bool = True, device: str = "npu",
) -> Tensor:  # fmt: skip
    """The division of work of `npu_sparse_attn_sharedkv`: int32 [1024]."""
    refuse(
        num_heads_kv != 1 or head_dim != 512,
        f"{num_heads_kv} KV heads of {head_dim}, documented is one of 512",
    )
    return division_of_work(
        heads=num_heads_q, topk=cmp_topk, cmp_ratio=cmp_ratio, masks=(ori_mask_mode, cmp_mask_mode),
        window=(ori_win_left, ori_win_right), layouts=(layout_q, layout_kv), has_cmp_kv=has_cmp_kv,
        cu_seqlens_q=cu_seqlens_q, seqused_kv=seqused_kv,
    )  # fmt: skip
