"""What vllm-ascend's kernels serve; its wheel has them for the 910B, a build of its sources for the others."""

from __future__ import annotations

from functools import partial

from . import (
    A2_A3,
    EVERYWHERE,
    Provider,
    compressor,
    gate,
    indexer,
    no_adapter,
    projection,
    rotary,
    window,
)
from . import streams as hc

_AT = "_C_ascend."
_ROPE = f"{_AT}inplace_partial_rotary_mul"
_INDEXER = (f"{_AT}npu_vllm_quant_lightning_indexer_metadata", f"{_AT}npu_vllm_quant_lightning_indexer")
_ATTENTION = (f"{_AT}npu_sparse_attn_sharedkv_metadata", f"{_AT}npu_sparse_attn_sharedkv")
_GATE = f"{_AT}moe_gating_top_k_hash"

PROVIDERS: tuple[Provider, ...] = (
    Provider("hc_pre", "vendorpack", (f"{_AT}npu_hc_pre_v2",), EVERYWHERE, hc.vendorpack_pre, hc.vendorpack_unless),
    Provider("hc_post", "vendorpack", (f"{_AT}npu_hc_post",), EVERYWHERE, hc.vendorpack_post, hc.vendorpack_unless),
    *projection.providers("vendorpack", _ROPE, rotary.vendorpack),
    Provider("compress", "vendorpack", (f"{_AT}compressor",), A2_A3, compressor.compress, compressor.unless),
    Provider("index_topk", "vendorpack", _INDEXER, A2_A3, no_adapter("index_topk"), indexer.quantised),
    Provider(
        "sparse_attn", "vendorpack", _ATTENTION, A2_A3, partial(window.sparse_attn, window.vendorpack),
        window.vendorpack_unless,
    ),
    Provider("route", "vendorpack", (_GATE,), A2_A3, gate.route, gate.unless),
    Provider("route_hash", "vendorpack", (_GATE,), A2_A3, gate.route_hash, gate.unless),
)  # fmt: skip
