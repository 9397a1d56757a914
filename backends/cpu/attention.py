"""Attention over the window and the compressed entries."""

from __future__ import annotations

from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch

from .arguments import (
    Cache,
    Rows,
    Step,
    address,
    cache,
    deliver,
    int32,
    int64,
    pointer,
    result,
    rows,
    step,
    structure,
)
from .kernels import Library

# sizes of buffers in `native/attention.h`
_MOST_DIM, _MOST_HEADS = 4096, 1024
AttentionCall = structure(
    "AttentionCall",
    ("q kv out", Rows),
    ("window entries", Cache),
    ("picks sink", pointer),
    ("step", Step),
    ("heads dim rope ratio most_picks", int64),
    ("bf16_numerators unused", int32),
)


class Attention:
    """The sparse softmax."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def sparse_attn(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.sparse_attn`."""
        t, heads, dim = q.shape
        y = result(out, (t, heads, dim), q.dtype)
        q = q.contiguous()
        most_picks = 0 if picks is None else picks.shape[1]
        call = AttentionCall(
            rows(q.view(t, heads * dim)), rows(kv), rows(y.view(t, heads * dim)), cache(window), cache(entries),
            address(picks), address(sink), step(batch), heads, dim, rope_dim, ratio, most_picks,
            numerics.bf16_between, 0,
        )  # fmt: skip
        self._library.run("sparse_attn", call, q, kv, y, window, entries, picks, sink, batch)
        return deliver(out, y)


def too_wide(config: ModelConfig, engine: EngineConfig) -> str | None:
    """Heads beyond the kernel's buffers."""
    if config.head_dim > _MOST_DIM:
        return f"head_dim {config.head_dim} > {_MOST_DIM}"
    if config.num_attention_heads > _MOST_HEADS:
        return f"num_attention_heads {config.num_attention_heads} > {_MOST_HEADS}"
    return "float64 is a witness of the references" if engine.numerics.float64 else None
