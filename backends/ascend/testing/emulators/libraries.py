"""The two packs that have no wheel for this torch: their ops defined as they are registered, with shape functions.

cann_ops_transformer: the schemas that the contract has from its documents. _C_ascend: those of the vllm-ascend 0.23.0 wheel,
whose committed table a test holds against these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import library as dispatcher

from ...contract import contract
from .documented import METADATA

_I64 = (1 << 63) - 1

_C = (
    "inplace_partial_rotary_mul(Tensor(a!) x, Tensor r1, Tensor r2, str rotary_mode, int[] partial_slice) -> ()",
    "npu_hc_pre_v2(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, int hc_sinkhorn_iters, "
    "float norm_eps, float hc_eps) -> (Tensor out0, Tensor out1, Tensor out2)",
    "npu_hc_post(Tensor x, Tensor residual, Tensor post, Tensor comb) -> (Tensor out)",
    "compressor(Tensor x, Tensor wkv, Tensor wgate, Tensor(a!) state_cache, Tensor ape, Tensor norm_weight, Tensor rope_sin, "
    "Tensor rope_cos, Tensor? state_block_table, Tensor? cu_seqlens, Tensor? seqused, Tensor? start_pos, int rope_head_dim, "
    "int cmp_ratio, int coff, float norm_eps, int rotary_mode, int cache_mode) -> Tensor",
    "npu_sparse_attn_sharedkv_metadata(int num_heads_q, int num_heads_kv, int head_dim, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_ori_kv=None, Tensor? cu_seqlens_cmp_kv=None, Tensor? seqused_q=None, Tensor? seqused_kv=None, "
    "int batch_size=0, int max_seqlen_q=0, int max_seqlen_kv=0, int ori_topk=0, int cmp_topk=0, int cmp_ratio=4, "
    "int ori_mask_mode=4, int cmp_mask_mode=3, int ori_win_left=128, int ori_win_right=0, str layout_q='BSND', "
    "str layout_kv='PA_ND', bool has_ori_kv=True, bool has_cmp_kv=True, str device='npu') -> (Tensor metadata)",
    "npu_sparse_attn_sharedkv(Tensor q, *, Tensor? ori_kv=None, Tensor? cmp_kv=None, Tensor? ori_sparse_indices=None, "
    "Tensor? cmp_sparse_indices=None, Tensor? ori_block_table=None, Tensor? cmp_block_table=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_ori_kv=None, Tensor? cu_seqlens_cmp_kv=None, Tensor? seqused_q=None, Tensor? seqused_kv=None, "
    "Tensor? sinks=None, Tensor? metadata=None, float softmax_scale=0, int cmp_ratio=0, int ori_mask_mode=4, "
    "int cmp_mask_mode=3, int ori_win_left=128, int ori_win_right=0, str layout_q='BSND', str layout_kv='PA_ND', "
    "bool return_softmax_lse=False) -> (Tensor out, Tensor softmax_lse)",
    "npu_vllm_quant_lightning_indexer_metadata(int num_heads_q, int num_heads_k, int head_dim, int query_quant_mode, "
    "int key_quant_mode, Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None, int batch_size=0, "
    "int max_seqlen_q=0, int max_seqlen_k=0, str layout_query='BSND', str layout_key='BSND', int sparse_count=2048, "
    f"int sparse_mode=3, int pre_tokens={_I64}, int next_tokens={_I64}, int cmp_ratio=1, str device='npu') -> (Tensor metadata)",
    "npu_vllm_quant_lightning_indexer(Tensor query, Tensor key, Tensor weights, Tensor query_dequant_scale, "
    "Tensor key_dequant_scale, int query_quant_mode=0, int key_quant_mode=0, Tensor? actual_seq_lengths_query=None, "
    "Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, Tensor? metadata=None, str layout_query='BSND', "
    f"str layout_key='BSND', int sparse_count=2048, int sparse_mode=3, int pre_tokens={_I64}, int next_tokens={_I64}, "
    "int cmp_ratio=1, bool return_value=False) -> (Tensor sparse_indices, Tensor sparse_values)",
    "moe_gating_top_k_hash(Tensor x, int k, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, int k_group=1, "
    "int group_count=1, float routed_scaling_factor=1.0, float eps=1e-20, int group_select_mode=0, int renorm=0, "
    "int norm_type=0, bool out_flag=False) -> (Tensor y, Tensor expert_idx, Tensor out)",
)
LIBRARIES = ("cann_ops_transformer", "_C_ascend")


def schemas(library: str) -> tuple[str, ...]:
    """The ops of a library that a provider may call, as registered."""
    if library == "_C_ascend":
        return _C
    return tuple(row.schema for row in contract().values() if row.namespace == library)


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _work(*args: Any, **kwargs: Any) -> Tensor:
    lengths = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    return torch.empty(METADATA, dtype=torch.int32, device="meta" if lengths is None else lengths.device)


def _mixes(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    b, s, n, c = x.shape
    f = torch.float32
    return (
        _like(x, b, s, c), _like(x, b, s, n, dtype=f), _like(x, b, s, n * n, dtype=f), _like(x, b, s, n, dtype=f),
        _like(x, b, s, n * n + 2 * n, dtype=f), _like(x, b, s, dtype=f), _like(x, 40, b, s, n, dtype=f),
        _like(x, 40, b, s, n, n, dtype=f),
    )  # fmt: skip


def _entries(x: Tensor, wkv: Tensor, ratio: int, coff: int, bounds: Tensor) -> Tensor:
    t = x.shape[0]
    return _like(x, min(t, t // ratio + bounds.shape[0] - 1), wkv.shape[0] // coff)


def _pooled(
    x: Tensor, wkv: Tensor, *rest: Any, cmp_ratio: int = 4, cu_seqlens: Any = None, coff: int = 1, **more: Any
) -> Tensor:
    return _entries(x, wkv, rest[3] if len(rest) > 3 else cmp_ratio, coff, cu_seqlens)


def _attended(q: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((), dtype=torch.float32)


def _chosen(count: int, q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q, *q.shape[:-2], 1, count, dtype=torch.int32), _like(q, 0, dtype=torch.float32)


_SHAPES: Mapping[str, Callable[..., Any]] = {
    "cann_ops_transformer::inplace_partial_rotary_mul": lambda x, r1, r2, **more: None,
    "cann_ops_transformer::mhc_pre_sinkhorn": _mixes,
    "cann_ops_transformer::mhc_post": lambda x, h_res, h_out, h_post: torch.empty_like(x),
    "cann_ops_transformer::_compressor_forward": _pooled,
    "cann_ops_transformer::sparse_flash_mla_metadata": _work,
    "cann_ops_transformer::sparse_flash_mla": _attended,
    "cann_ops_transformer::quant_lightning_indexer_metadata": _work,
    "cann_ops_transformer::quant_lightning_indexer": lambda q, k, w, qs, ks, topk, mode, **more: _chosen(topk, q),
    "cann_ops_transformer::npu_mega_moe": lambda c, x, i, w, w1, w2, experts, world, size, **more: (
        torch.empty_like(x), _like(x, experts // world, dtype=torch.int32)),
    "_C_ascend::inplace_partial_rotary_mul": lambda x, *rest: None,
    "_C_ascend::npu_hc_pre_v2": lambda x, *rest: (
        _like(x, *x.shape[:-2], x.shape[-1]), _like(x, *x.shape[:-1], dtype=torch.float32),
        _like(x, *x.shape[:-1], x.shape[-2], dtype=torch.float32)),
    "_C_ascend::npu_hc_post": lambda x, residual, *rest: torch.empty_like(residual),
    "_C_ascend::compressor": lambda x, wkv, *r: _entries(x, wkv, r[11], r[12], r[7]),
    "_C_ascend::npu_sparse_attn_sharedkv_metadata": _work,
    "_C_ascend::npu_sparse_attn_sharedkv": _attended,
    "_C_ascend::npu_vllm_quant_lightning_indexer_metadata": _work,
    "_C_ascend::npu_vllm_quant_lightning_indexer": lambda q, *rest, sparse_count=2048, **more: _chosen(sparse_count, q),
    "_C_ascend::moe_gating_top_k_hash": lambda x, k, *rest, **more: (
        _like(x, x.shape[0], k), _like(x, x.shape[0], k, dtype=torch.int32), _like(x, *x.shape, dtype=torch.float32)),
}  # fmt: skip


@cache
def define(library: str) -> dispatcher.Library:
    """Define a transcribed library's ops in the dispatcher, with shape functions for meta and fake tensors.

    What a real pack has registered already stays as it is. The definitions last as long as the process.
    """
    made = dispatcher.Library(library, "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in schemas(library):
        name = schema.split("(", 1)[0]
        if hasattr(getattr(torch.ops, library), name):
            continue
        made.define(schema)  # type: ignore[no-untyped-call]
        dispatcher.register_fake(f"{library}::{name}", _SHAPES[f"{library}::{name}"])
    return made
