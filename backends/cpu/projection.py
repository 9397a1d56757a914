"""Projections around attention: queries, the key-value latent, the grouped output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.precision import activation_dtype
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

QueryCall = structure(
    "QueryCall",
    ("wq_a wq_b", Matrix),
    ("x norm qr q", Rows),
    ("table", pointer),
    ("tokens heads rope", int64),
    ("eps", float32),
    ("q8_a q8_b bf16_between bf16_norm unused", int32),
)
KvCall = structure(
    "KvCall",
    ("wkv", Matrix),
    ("x norm y", Rows),
    ("table", pointer),
    ("window", Cache),
    ("step", Step),
    ("rope", int64),
    ("eps", float32),
    ("q8_input bf16_between q8_kv", int32),
)
OutputCall = structure(
    "OutputCall",
    ("wo_a wo_b", Matrix),
    ("o y", Rows),
    ("table", pointer),
    ("tokens heads dim rope groups", int64),
    ("q8_b short_between", int32),
)


def q8(numerics: Numerics, weight: Weight) -> bool:
    """Whether inputs of a weight's product are rounded to FP8 first."""
    return numerics.q8_gemm_input and weight.quantised


class Projection:
    """What stands before and after attention."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def q_project(
        self, x: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, rope_table: Tensor, num_heads: int, eps: float,
        numerics: Numerics, out: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.q_project`."""
        t, act = x.shape[0], activation_dtype(numerics)
        q, qr = out or (None, None)
        q = result(q, (t, num_heads, wq_b.out_features // num_heads), act)
        qr = result(qr, (t, wq_a.out_features), act)
        call = QueryCall(
            matrix(wq_a), matrix(wq_b), rows(x), rows(q_norm), rows(qr), rows(q.view(t, wq_b.out_features)),
            address(rope_table), t, num_heads, rope_table.shape[1], eps, q8(numerics, wq_a), q8(numerics, wq_b),
            numerics.bf16_between, numerics.bf16_q_norm, 0,
        )  # fmt: skip
        self._library.run("q_project", call, x, wq_a, q_norm, wq_b, rope_table, q, qr)
        return deliver(out, (q, qr))

    def kv_project_store(
        self, x: Tensor, wkv: Weight, kv_norm: Tensor, rope_table: Tensor, batch: Batch, window: Tensor, eps: float,
        numerics: Numerics, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.kv_project_store`."""
        history = 0 if batch.is_decode else batch.num_sequences * window.shape[1]
        y = result(out, (history + x.shape[0], wkv.out_features), activation_dtype(numerics))
        call = KvCall(
            matrix(wkv), rows(x), rows(kv_norm), rows(y), address(rope_table), cache(window), step(batch),
            rope_table.shape[1], eps, q8(numerics, wkv), numerics.bf16_between, numerics.q8_kv,
        )  # fmt: skip
        self._library.run("kv_project_store", call, x, wkv, kv_norm, y, rope_table, window, batch)
        return deliver(out, y)

    def grouped_out(
        self, o: Tensor, wo_a: Weight, wo_b: Weight, rope_table: Tensor, groups: int, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.grouped_out`."""
        t, heads, dim = o.shape
        y = result(out, (t, wo_b.out_features), activation_dtype(numerics))
        o = o.contiguous()
        call = OutputCall(
            matrix(wo_a), matrix(wo_b), rows(o.view(t, heads * dim)), rows(y), address(rope_table), t, heads, dim,
            rope_table.shape[1], groups, q8(numerics, wo_b), numerics.bf16_activations,
        )  # fmt: skip
        self._library.run("grouped_out", call, o, wo_a, wo_b, rope_table, y)
        return deliver(out, y)
