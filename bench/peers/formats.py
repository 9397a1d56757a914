"""What the weights of a model take in the formats that engines store them in."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from v4sdk.config import ModelConfig
from v4sdk.convert import unquantised
from v4sdk.kv_cache import kv_bytes
from v4sdk.numerics import KVFormat
from v4sdk.tensors import ITEM_BYTES, expected_tensors

Stored = Literal["native", "bf16", "float32", "mxfp4+bf16"]


def gguf_config(config: ModelConfig) -> ModelConfig:
    """The same model with FP4 experts beside unquantised projections: what a GGUF can hold without rounding."""
    return replace(config, quantization=None, expert_dtype="fp4")


def bytes_per_token(config: ModelConfig, stored: Stored, depth: int = 0) -> int:
    """Bytes that decoding one token must read: every dense weight, the chosen experts, the rows of the cache.

    Args:
        stored: how the engine keeps weights. depth: tokens in the cache; its rows are counted at the width this engine's
            documented default has (two bytes a number where that is not known).
    """
    held = {"native": config, "mxfp4+bf16": gguf_config(config)}.get(stored, unquantised(config))
    share = config.num_experts_per_tok / config.n_routed_experts
    total = 0.0
    for spec in expected_tensors(held):
        if spec.block != "backbone":
            continue
        size: float = spec.nbytes
        if stored == "float32" and spec.dtypes[0] in ("BF16", "F32"):
            size = size / ITEM_BYTES[spec.dtypes[0]] * 4
        if spec.component == "embedding" or spec.name.endswith("tid2eid"):
            size /= config.vocab_size
        elif spec.component == "routed experts":
            size *= share
        total += size
    fmt: KVFormat = "native" if stored == "native" else "float32" if stored == "float32" else "bf16"
    return int(total) + (kv_bytes(config, depth, fmt) if depth else 0)
