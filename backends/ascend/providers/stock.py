"""What torch_npu serves, from the public package alone."""

from __future__ import annotations

from . import (
    A2_A3,
    EVERYWHERE,
    ONLY_950,
    Provider,
    dense,
    experts,
    indexer,
    narrow,
    projection,
    rotary,
    rounded,
    selected,
)
from . import streams as hc

_ROPE = "npu.npu_rotary_mul"
_ROUTED = (
    "npu.npu_moe_init_routing_v2",
    "npu.npu_grouped_matmul",
    "npu.npu_clipped_swiglu",
    "npu.npu_moe_finalize_routing",
)
_INTEGERS = ("npu.npu_dynamic_quant", "npu.npu_quant_matmul")
_MX = ("npu.npu_dynamic_mx_quant", "npu.npu_quant_matmul")

PROVIDERS: tuple[Provider, ...] = (
    Provider("rms_norm", "stock", ("npu.npu_rms_norm",), EVERYWHERE, dense.rms_norm, narrow),
    Provider("linear", "stock", _INTEGERS, A2_A3, dense.linear, rounded),
    Provider("linear", "stock", _MX, ONLY_950, dense.linear, rounded),
    Provider(
        "hc_pre",
        "stock",
        ("npu.npu_mhc_pre", "npu.npu_mhc_sinkhorn"),
        ONLY_950,
        hc.stock_pre,
        hc.stock_unless,
    ),
    Provider("hc_post", "stock", ("npu.npu_mhc_post",), ONLY_950, hc.stock_post, hc.stock_unless),
    *projection.providers("stock", _ROPE, rotary.stock),
    Provider(
        "index_topk", "stock", ("npu.npu_lightning_indexer",), EVERYWHERE, indexer.index_topk, indexer.unless
    ),
    Provider(
        "sparse_attn",
        "stock",
        ("npu.npu_sparse_flash_attention",),
        EVERYWHERE,
        selected.sparse_attn,
        selected.unless,
    ),
    Provider(
        "routed_experts",
        "stock",
        (*_ROUTED, "npu.npu_dequant_swiglu_quant"),
        A2_A3,
        experts.routed_experts,
        experts.unless,
    ),
    Provider(
        "routed_experts",
        "stock",
        (*_ROUTED, "npu.npu_dynamic_mx_quant"),
        ONLY_950,
        experts.routed_experts,
        experts.unless,
    ),
    Provider(
        "shared_expert", "stock", ("npu.npu_clipped_swiglu",), EVERYWHERE, experts.shared_expert, rounded
    ),
)
