"""Mixture of experts: routing, routed experts, and the shared expert, which is one expert that every token chooses."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.precision import activation_dtype
from v4sdk.weights import ExpertWeights, Weight

from .arguments import (
    Matrix,
    Rows,
    address,
    deliver,
    float32,
    int32,
    int64,
    matrix,
    pointer,
    result,
    rows,
    structure,
)
from .kernels import Library

RouteCall = structure(
    "RouteCall",
    ("gate", Matrix),
    ("u", Rows),
    ("bias table token_ids ids weights", pointer),
    ("tokens experts chosen", int64),
    ("scale", float32),
    ("wide_table", int32),
)
ExpertsCall = structure(
    "ExpertsCall",
    ("matrices", pointer),
    ("u", Rows),
    ("ids weights routed", pointer),
    ("y", Rows),
    ("tokens chosen experts width inner", int64),
    ("limit", float32),
    ("q8_input bf16_between short_inner", int32),
)


class Matrices:
    """The matrices of a layer's experts as one table; what it points to is held here."""

    def __init__(self, experts: list[tuple[Weight, Weight, Weight]]) -> None:
        flat = [w for three in experts for w in three]
        self.held = flat
        self.table = (Matrix * len(flat))(*(matrix(w) for w in flat))
        self.address = ctypes.addressof(self.table)
        self.count = len(experts)


class MoE:
    """Routing and experts."""

    def __init__(self, library: Library) -> None:
        self._library = library
        # by identity: a layer's experts are one object for as long as its model lives
        self._tables: dict[int, Matrices] = {}

    def route(
        self, u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float, out: Any = None
    ) -> tuple[Tensor, Tensor]:
        """See `v4sdk.ops.route`."""
        return self._route(u, gate, num_experts_per_tok, scale, out, bias=bias)

    def route_hash(
        self, u: Tensor, gate: Tensor, tid2eid: Tensor, token_ids: Tensor, scale: float, out: Any = None
    ) -> tuple[Tensor, Tensor]:
        """See `v4sdk.ops.route_hash`."""
        return self._route(u, gate, tid2eid.shape[1], scale, out, table=tid2eid, token_ids=token_ids)

    def _route(
        self, u: Tensor, gate: Tensor, chosen: int, scale: float, out: Any, bias: Tensor | None = None,
        table: Tensor | None = None, token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        t, experts = u.shape[0], gate.shape[0]
        ids, weights = out or (None, None)
        ids, weights = result(ids, (t, chosen), torch.int32), result(weights, (t, chosen), torch.float32)
        if bias is not None:
            bias = bias.float()
        wide = table is not None and table.dtype == torch.int64
        call = RouteCall(
            matrix(Weight(gate)), rows(u), address(bias), address(table), address(token_ids), address(ids),
            address(weights), t, experts, chosen, scale, wide,
        )  # fmt: skip
        self._library.run("route", call, u, gate, bias, table, token_ids, ids, weights)
        return deliver(out, (ids, weights))

    def routed_experts(
        self, u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.routed_experts`."""
        t, width = u.shape
        y = result(out, (t, width), torch.float32)
        ids = ids if ids.dtype == torch.int32 else ids.to(torch.int32)
        self._run(u, ids, weights, None, y, self._table(experts), ids.shape[1], limit, numerics)
        return deliver(out, y)

    def shared_expert(
        self, u: Tensor, routed: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.shared_expert`."""
        y = result(out, tuple(u.shape), activation_dtype(numerics))
        # without ids every token chooses the only expert, with weight one
        self._run(u, None, None, routed, y, Matrices([(w1, w2, w3)]), 1, limit, numerics)
        return deliver(out, y)

    def _run(
        self, u: Tensor, ids: Tensor | None, weights: Tensor | None, routed: Tensor | None, y: Tensor, table: Matrices,
        chosen: int, limit: float, numerics: Numerics,
    ) -> None:  # fmt: skip
        rounded = numerics.q8_gemm_input and table.held[0].quantised
        call = ExpertsCall(
            table.address, rows(u), address(ids), address(weights), address(routed), rows(y), u.shape[0], chosen,
            table.count, u.shape[1], table.held[0].out_features, limit, rounded, numerics.bf16_between,
            numerics.bf16_activations,
        )  # fmt: skip
        self._library.run("routed_experts", call, u, ids, weights, routed, y, table)

    def _table(self, experts: ExpertWeights) -> Matrices:
        key = id(experts)
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = Matrices(_each(experts))
            weakref.finalize(experts, self._tables.pop, key, None)
        return found


def _each(experts: ExpertWeights) -> list[tuple[Weight, Weight, Weight]]:
    if experts.w1:
        return list(zip(experts.w1, experts.w2, experts.w3, strict=True))
    assert experts.packed is not None
    w1, w2, w3 = ([_slice(stack, e) for e in range(experts.num_experts)] for stack in experts.packed)
    return list(zip(w1, w2, w3, strict=True))


def _slice(stack: Weight, index: int) -> Weight:
    """One matrix of a stack, where it lies."""
    scale = None if stack.scale is None else stack.scale[index]
    return Weight(stack.data[index], scale, stack.encoding, stack.block, stack.quantised)
