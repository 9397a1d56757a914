"""Calls that the emulated kernels take, and that `refused.py` has refused with an argument that no document lists."""

from __future__ import annotations

from typing import Any

import torch
from ascend.inside.loaded import BF16, F16, F32, C, S, T, i32
from torch import Tensor

I8 = torch.int8


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def norm(dtype: torch.dtype = BF16, gamma: torch.dtype = BF16) -> Any:
    return S.npu_rms_norm(zeros(2, 8, dtype=dtype), zeros(8, dtype=gamma), 1e-6)


def rotary(
    dim: int = 64, table: torch.dtype = BF16, mode: str = "interleave", lead: tuple[int, int] = (1, 2)
) -> Any:
    cos = zeros(1, lead[1], 1, dim, dtype=table)
    return S.npu_rotary_mul(zeros(*lead, 4, dim), cos, cos, rotary_mode=mode)


def partial_rotary(pack: str, mode: str = "interleave", width: int = 64, rows: int = 2) -> Any:
    x, cos = zeros(2, 1, 4, 128), zeros(rows, 1, 1, width)
    if pack == "T":
        return T.inplace_partial_rotary_mul(x, cos, cos, rotary_mode=mode, partial_slice=[64, 128])
    return C.inplace_partial_rotary_mul(x, cos, cos, mode, [64, 128])


def streams(width: int, n: int = 4) -> tuple[Tensor, ...]:
    return (
        zeros(1, n, width),
        zeros(n * (n + 2), n * width, dtype=F32),
        zeros(3, dtype=F32),
        zeros(n * (n + 2), dtype=F32),
    )


def stock_pre() -> Any:
    return S.npu_mhc_pre(*streams(128))


def transformer_pre(width: int = 128, rounds: int = 20, n: int = 4) -> Any:
    x, *rest = streams(width, n)
    return T.mhc_pre_sinkhorn(x[None], *rest, n, rounds, 1e-6, 1e-6, False)


def vendorpack_pre(width: int = 4096, rounds: int = 20) -> Any:
    return C.npu_hc_pre_v2(*streams(width), 4, rounds, 1e-6, 1e-6)


def mla(
    heads: int = 64, dim: int = 512, left: int = 127, mask: int = 4, made_for: int | None = None, metadata: bool = True,
    ratio: int = 4, topk: int = 512, residual: bool = True, far: bool = True, kv: torch.dtype = BF16,
) -> Any:  # fmt: skip
    q, picks = zeros(1, heads, dim), torch.full((1, 1, topk), -1, dtype=torch.int32)
    shape = {
        "cmp_ratio": ratio,
        "ori_mask_mode": mask,
        "cmp_mask_mode": 3,
        "ori_win_left": left,
        "ori_win_right": 0,
    }
    shape |= {"layout_q": "TND", "layout_kv": "PA_BBND"}
    lengths = {"cu_seqlens_q": i32(0, 1), "seqused_ori_kv": i32(9)}
    rows: dict[str, Any] = {"ori_kv": zeros(1, 16, 1, dim, dtype=kv), "ori_block_table": i32([0])}
    if far:
        lengths |= {"seqused_cmp_kv": i32(2)} | ({"cmp_residual_kv": i32(1)} if residual else {})
        rows |= {"cmp_kv": zeros(1, 16, 1, dim), "cmp_block_table": i32([0]), "cmp_sparse_indices": picks}
    work = None
    if metadata:
        other = {**lengths, "seqused_ori_kv": i32(made_for or 9)}
        work = T.sparse_flash_mla_metadata(
            heads, 1, 512, **other, **shape, cmp_topk=topk, has_ori_kv=True, has_cmp_kv=far
        )
    return T.sparse_flash_mla(
        q, **rows, **lengths, **shape, sinks=zeros(heads, dtype=F32), metadata=work, softmax_scale=1.0
    )


def shared_kv(heads: int = 64, window: dict[str, int] | None = None, ratio: int = 4, topk: int = 512) -> Any:
    shape: dict[str, Any] = {"cmp_ratio": ratio, "layout_q": "TND", "layout_kv": "PA_ND"}
    shape |= {"ori_win_left": 127, "ori_win_right": 0} if window is None else window
    lengths = {"cu_seqlens_q": i32(0, 1), "seqused_kv": i32(9)}
    page, table = zeros(1, 16, 1, 512), i32([0])
    picks = torch.full((1, 1, topk), -1, dtype=torch.int32)
    work = C.npu_sparse_attn_sharedkv_metadata(heads, 1, 512, **lengths, **shape, cmp_topk=topk)
    return C.npu_sparse_attn_sharedkv(
        zeros(1, heads, 512), ori_kv=page, cmp_kv=page, cmp_sparse_indices=picks, ori_block_table=table,
        cmp_block_table=table, sinks=zeros(heads, dtype=F32), metadata=work, **lengths, **shape,
    )  # fmt: skip


def listed(
    heads: int = 64, seen: tuple[int, ...] = (0, 1, -1), mode: int = 2, rope: bool = True, **more: Any
) -> Any:
    kv, k_rope = zeros(1, 4, 1, 512), zeros(1, 4, 1, 64)
    q_rope = zeros(1, 1, heads, 64) if rope else None
    how = {"query_rope": q_rope, "key_rope": k_rope, "attention_mode": mode, "sparse_mode": 0}
    return S.npu_sparse_flash_attention(
        zeros(1, 1, heads, 512), kv, kv, i32([[list(seen)]]), 1.0, **how, **more
    )


def indexer(
    heads: int = 64, dim: int = 128, count: int = 512, page: int = 16, table: torch.dtype = torch.int32
) -> Any:
    how = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": count, "sparse_mode": 0}
    lengths = {
        "actual_seq_lengths_query": i32(1),
        "actual_seq_lengths_key": i32(4),
        "block_table": i32([0]).to(table),
    }
    return S.npu_lightning_indexer(
        zeros(1, heads, dim), zeros(1, page, 1, dim), zeros(1, heads), **lengths, **how
    )


def int8_indexer(
    pack: str, scales: torch.dtype = F16, weight: float = 1.0, heads: int = 64, q_mode: int = 2
) -> Any:
    q, k, ks = zeros(1, heads, 128, dtype=I8), zeros(1, 16, 1, 128, dtype=I8), zeros(1, 16, 1, dtype=scales)
    w, qs = torch.full((1, heads), weight, dtype=F16), torch.full((1, heads), 300.0, dtype=scales)
    if pack == "T":
        how = {"layout_q": "TND", "layout_k": "PA_BBND", "mask_mode": 3, "cmp_ratio": 4}
        where = {"cu_seqlens_q": i32(0, 1), "seqused_k": i32(2), "cmp_residual_k": i32(1)}
        work = T.quant_lightning_indexer_metadata(heads, 1, 128, 512, q_mode, **where, **how)
        return T.quant_lightning_indexer(
            q, k, w, qs, ks, 512, q_mode, block_table=i32([0]), metadata=work, **where, **how
        )
    how = {
        "layout_query": "TND",
        "layout_key": "PA_BSND",
        "sparse_count": 512,
        "sparse_mode": 3,
        "cmp_ratio": 4,
    }
    where = {"actual_seq_lengths_query": i32(1), "actual_seq_lengths_key": i32(9)}
    work = C.npu_vllm_quant_lightning_indexer_metadata(heads, 1, 128, 0, 0, **where, **how)
    return C.npu_vllm_quant_lightning_indexer(
        q, k, w, qs, ks, block_table=i32([0]), metadata=work, **where, **how
    )


def compressor(
    hidden: int = 1024, dim: int = 128, ratio: int = 4, pages: tuple[int, ...] = (1, 2), count: int = 8, mode: int = 2,
    state: torch.dtype = F32,
) -> Any:  # fmt: skip
    x, w = zeros(count, hidden), zeros(2 * dim, hidden)
    cos = zeros(min(count, count // ratio + 1), 64, dtype=F32)
    return C.compressor(
        x, w, w, zeros(3, 4, 4 * dim, dtype=state), zeros(ratio, 2 * dim, dtype=F32), zeros(dim), cos, cos, i32(list(pages)),
        i32(0, count), None, i32(0), 64, ratio, 2, 1e-6, mode, 1,
    )  # fmt: skip


def gate(k: int = 2, norm_type: int = 2, renorm: int = 0, ids: bool = True) -> Any:
    how = {"tid2eid": i32([0, 1])} | ({"input_ids": torch.tensor([0])} if ids else {})
    return C.moe_gating_top_k_hash(zeros(1, 4, dtype=F32), k, **how, norm_type=norm_type, renorm=renorm)


def dispatch(ids: tuple[int, ...] = (0, 1), width: int = 1024, ranks: int = 1) -> Any:
    return S.npu_moe_distribute_dispatch_v2(
        zeros(1, width), i32(list(ids)), "ep", ranks, 0, 4, shared_expert_num=0
    )


def grouped(
    counts: tuple[int, ...] = (1, 2), scale: torch.dtype = BF16, out: torch.dtype = BF16, split: int = 3
) -> Any:
    return S.npu_grouped_matmul(
        [zeros(3, 64, dtype=I8)], [zeros(2, 64, 64, dtype=I8)], scale=[zeros(2, 64, dtype=scale)],
        per_token_scale=[zeros(3, dtype=F32)], group_list=torch.tensor(counts), split_item=split, group_type=0,
        group_list_type=1, output_dtype=out,
    )  # fmt: skip


def fp4_grouped(wide: bool = False) -> Any:
    scale = torch.full((1, 64, 1, 2), 127, dtype=torch.uint8)
    where = {"scale": [scale.transpose(1, 2)], "scale_dtype": 293} if wide else {"antiquant_scale": [scale]}
    return S.npu_grouped_matmul(
        [zeros(1, 64).to(torch.float8_e4m3fn)], [torch.zeros(1, 64, 32, dtype=torch.uint8).transpose(1, 2)],
        per_token_scale=[torch.full((1, 1, 2), 127, dtype=torch.uint8)], group_list=torch.tensor([1]), split_item=3,
        group_type=0, group_list_type=1, output_dtype=BF16, weight_dtype=296, per_token_scale_dtype=293, **where,
    )  # fmt: skip


def swiglu_quant(half: int = 64, mode: int = 2, limit: float = 10.0, scale: bool = True) -> Any:
    return S.npu_dequant_swiglu_quant(
        zeros(2, 2 * half, dtype=torch.int32), weight_scale=zeros(2, 2 * half, dtype=F32) if scale else None,
        activation_scale=zeros(2, dtype=F32), group_index=torch.tensor([1, 1]), activate_left=True, quant_mode=1,
        swiglu_mode=mode, clamp_limit=limit, glu_alpha=1.0, glu_bias=0.0,
    )  # fmt: skip


def product(scale: torch.dtype = F32, out: torch.dtype = BF16, x: torch.dtype = I8) -> Any:
    x2 = zeros(64, 64, dtype=I8)
    return S.npu_quant_matmul(
        zeros(1, 64, dtype=x),
        x2,
        zeros(64, dtype=scale),
        pertoken_scale=zeros(1, dtype=F32),
        output_dtype=out,
    )


def finalize(mode: int = 0, scales: torch.dtype = F32) -> Any:
    rows = zeros(2, 8, dtype=F32)
    return S.npu_moe_finalize_routing(
        rows, None, None, None, zeros(1, 2, dtype=scales), i32(0, 1), None, drop_pad_mode=mode
    )


def init_routing(number: int = 0, mode: int = -1) -> Any:
    how = {"active_num": 1, "expert_num": 2, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    return S.npu_moe_init_routing_v2(
        zeros(1, 8), i32([number]), **how, active_expert_range=[0, 2], quant_mode=mode
    )
