"""What cann_ops_transformer serves: the pack whose attention was made for this model."""

from __future__ import annotations

from functools import partial

from . import A2_A3, EVERYWHERE, Provider, compressor, indexer, no_adapter, projection, rotary, window
from . import streams as hc

_AT = "cann_ops_transformer."
_ROPE = f"{_AT}inplace_partial_rotary_mul"
_INDEXER = (f"{_AT}quant_lightning_indexer_metadata", f"{_AT}quant_lightning_indexer")
_ATTENTION = (f"{_AT}sparse_flash_mla_metadata", f"{_AT}sparse_flash_mla")

PROVIDERS: tuple[Provider, ...] = (
    Provider("hc_pre", "transformer", (f"{_AT}mhc_pre_sinkhorn",), A2_A3, hc.transformer_pre, hc.transformer_unless),
    Provider("hc_post", "transformer", (f"{_AT}mhc_post",), A2_A3, hc.transformer_post, hc.transformer_unless),
    *projection.providers("transformer", _ROPE, rotary.transformer),
    Provider("compress", "transformer", (f"{_AT}_compressor_forward",), EVERYWHERE, no_adapter("compress"), compressor.private),
    Provider("index_topk", "transformer", _INDEXER, EVERYWHERE, no_adapter("index_topk"), indexer.quantised),
    Provider(
        "sparse_attn", "transformer", _ATTENTION, EVERYWHERE, partial(window.sparse_attn, window.transformer),
        window.transformer_unless,
    ),
)  # fmt: skip
