"""Mixture of experts: routing, routed experts, and the shared expert, which is one expert that every token chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.errors import ShapeError
from v4sdk.numerics import Numerics
from v4sdk.ops.precision import activation_dtype
from v4sdk.weights import ExpertWeights, Weight

from .experts import Call, Part, halved, run_experts
from .kernels.moe import shared_down_kernel, up_kernel
from .kernels.route import route_hash_kernel, route_kernel
from .launch import Launch, deliver, result
from .operands import data_of, dense, operand_type, power_of_two, rounds_input, scale_of
from .tiles import Table, Tile, tile

# m: tokens, n: experts. A decode step's programs are many and small: the gate is read at the speed of memory
ROUTE: Table = {
    ("any", "decode"): Tile(16, 32, 256, 4, 2, split=16),
    ("any", "prefill"): Tile(16, 64, 128, 4, 3, split=2),
}
# scores in float32 for `exact` numerics: no tensor cores, so smaller tiles
ROUTE_WIDE = Tile(16, 32, 64, 4, 1, split=4)
_FEW_EXPERTS = 256
# m: tokens; every choice of a token has a row of the gate to itself
HASH: Table = {
    ("any", "decode"): Tile(1, 1, 1024, 8, 2),
    ("any", "prefill"): Tile(8, 1, 128, 8, 2),
}


class MoE:
    """Kernels of `route`, `route_hash`, `routed_experts` and `shared_expert`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def route(
        self, u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.route`."""
        (t, width), experts, k = u.shape, gate.shape[0], num_experts_per_tok
        ids, weights = made = _choices(out, t, k, u.device)
        operand = operand_type(u, Weight(gate))
        chosen = ROUTE_WIDE if operand.name == "fp32" else tile(ROUTE, self._launch.target, t)
        split, steps = halved(width, chosen)
        block = power_of_two(experts)
        parts = torch.empty((split, t, block), dtype=torch.float32, device=u.device)
        rows = -(-t // chosen.m)
        u = dense(u)
        self._launch(
            route_kernel, (rows, -(-experts // chosen.n), split), u, u.stride(0), gate, bias, ids, weights, parts,
            self._launch.counters(rows), t, experts, width, steps * chosen.k, scale, CHOSEN=k, SPLIT=split, BT=chosen.m,
            BE=chosen.n, BK=chosen.k, EXPERTS=block, OPERAND=operand, stages=chosen.stages,
            # whoever chooses holds the scores of all experts in registers
            warps=chosen.warps * (1 if block <= _FEW_EXPERTS else 4),
        )  # fmt: skip
        return deliver(out, made)

    def route_hash(
        self, u: Tensor, gate: Tensor, tid2eid: Tensor, token_ids: Tensor, scale: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.route_hash`."""
        (t, width), k = u.shape, tid2eid.shape[1]
        ids, weights = made = _choices(out, t, k, u.device)
        u = dense(u)
        chosen = tile(HASH, self._launch.target, t)
        self._launch(
            route_hash_kernel, (-(-t // chosen.m),), u, u.stride(0), gate, tid2eid, token_ids, ids, weights, t, width, scale,
            CHOSEN=k, BT=chosen.m, BK=chosen.k, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return deliver(out, made)

    def routed_experts(
        self, u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.routed_experts`. Experts must be stacked, as `prepare_experts` does it."""
        if experts.packed is None:
            raise ShapeError("routed experts are not stacked, expected what `prepare_experts` gives")
        y = result(out, tuple(u.shape), torch.float32, u.device)
        u = dense(u)
        run_experts(
            self._launch, Call(u, ids.contiguous(), weights.contiguous(), *experts.packed, limit, numerics), y
        )
        return deliver(out, y)

    def shared_expert(
        self, u: Tensor, routed: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.shared_expert`."""
        t, inner = u.shape[0], w1.out_features
        y = result(out, tuple(u.shape), activation_dtype(numerics), u.device)
        u = dense(u)
        a = torch.empty((t, inner), dtype=activation_dtype(numerics), device=u.device)
        up, down = (Part(self._launch, w, x, t) for w, x in ((w1, u), (w2, a)))
        q8, tiles = rounds_input(w1, numerics), -(-t // up.tile.m)
        self._launch(
            up_kernel, up.grid(tiles), u, u.stride(0), up.data, up.scale, data_of(w3, self._launch.target), scale_of(w3), a,
            up.parts(2, t, inner), up.counters(tiles), a, a, a, a, t, inner, u.shape[1], 0, 0, up.span, limit, CHOSEN=1,
            MEMBERS="all", Q8=q8, BETWEEN=numerics.bf16_between, **up.constants,
        )  # fmt: skip
        self._launch(
            shared_down_kernel, down.grid(tiles), a, down.data, down.scale, routed.contiguous(), y, down.parts(*u.shape),
            down.counters(tiles), t, u.shape[1], inner, down.span, Q8=q8, BETWEEN=numerics.bf16_between, **down.constants,
        )  # fmt: skip
        return deliver(out, y)


def _choices(
    out: tuple[Tensor, Tensor] | None, t: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids, weights = out or (None, None)
    return result(ids, (t, k), torch.int32, device), result(weights, (t, k), torch.float32, device)
