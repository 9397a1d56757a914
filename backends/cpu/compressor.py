"""Compressed entries and index queries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.precision import activation_dtype, between_dtype
from v4sdk.weights import Weight

from .arguments import (
    Cache,
    Matrix,
    Rows,
    Step,
    address,
    cache,
    deliver,
    float32,
    int32,
    int64,
    matrix,
    pointer,
    result,
    rows,
    step,
    structure,
)
from .kernels import Library
from .projection import q8

# positions that `native/compressor.h` pools into one entry
_MOST_POOLED = 512
CompressCall = structure(
    "CompressCall",
    ("wkv wgate", Matrix),
    ("x norm", Rows),
    ("ape inv_freq state", pointer),
    ("entries", Cache),
    ("step", Step),
    ("ratio length half", int64),
    ("eps", float32),
    ("bf16_activations q8_kv q4_index is_index unused", int32),
)
IndexQueryCall = structure(
    "IndexQueryCall",
    ("wq_b weights_proj", Matrix),
    ("x qr q w", Rows),
    ("table", pointer),
    ("tokens heads rope", int64),
    ("scale", float32),
    ("q8_b q8_w bf16_between q4_index unused", int32),
)


class Compressor:
    """Pooling and index queries."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def compress(
        self, x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch,
        state: Tensor, entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
    ) -> None:  # fmt: skip
        """See `v4sdk.ops.compress`."""
        call = CompressCall(
            matrix(wkv), matrix(wgate), rows(x), rows(norm), address(ape), address(inv_freq), address(state),
            cache(entries), step(batch), ratio, state.shape[1], inv_freq.shape[0], eps, numerics.bf16_activations,
            numerics.q8_kv, numerics.q4_index, is_index, 0,
        )  # fmt: skip
        self._library.run("compress", call, x, wkv, wgate, ape, norm, inv_freq, batch, state, entries)

    def index_query(
        self, x: Tensor, qr: Tensor, wq_b: Weight, weights_proj: Weight, rope_table: Tensor, num_heads: int,
        numerics: Numerics, out: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.index_query`."""
        t, width = x.shape[0], wq_b.out_features
        q, w = out or (None, None)
        q = result(q, (t, num_heads, width // num_heads), activation_dtype(numerics))
        w = result(w, (t, num_heads), between_dtype(numerics))
        call = IndexQueryCall(
            matrix(wq_b), matrix(weights_proj), rows(x), rows(qr), rows(q.view(t, width)), rows(w),
            address(rope_table), t, num_heads, rope_table.shape[1], (width // num_heads) ** -0.5 * num_heads**-0.5,
            q8(numerics, wq_b), q8(numerics, weights_proj), numerics.bf16_between, numerics.q4_index, 0,
        )  # fmt: skip
        self._library.run("index_query", call, x, qr, wq_b, weights_proj, rope_table, q, w)
        return deliver(out, (q, w))


def too_long(config: ModelConfig, engine: EngineConfig) -> str | None:
    """Blocks beyond the kernel's list of positions."""
    longest = max((2 * layer.ratio if layer.overlap else layer.ratio for layer in config.layers), default=0)
    if longest > _MOST_POOLED:
        return f"{longest} positions pool into one entry > {_MOST_POOLED}"
    return "float64 is a witness of the references" if engine.numerics.float64 else None
