"""Routed experts with a launch for every step: two products, the gate, the third product, the sum over a token's experts.

The products are those of `experts` and `prompt`, with the same tiles. Nothing runs this but the benchmark that says what the two
fused launches are worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.errors import ShapeError
from v4sdk.numerics import Numerics
from v4sdk.weights import ExpertWeights, Weight

from .experts import PACKED_DOWN, PACKED_UP, Call, halved, words
from .kernels.moe_prompt import combine_kernel
from .kernels.moe_unfused import gate_kernel, packed_product_kernel, packed_tile_product_kernel
from .launch import Launch, deliver, result
from .operands import scale_of
from .prompt import SUM, Buckets, PackedTiles, deal
from .tiles import Tile

# what one program of the gate takes
_GATE = Tile(4, 256, 1, 4, 1)


class UnfusedExperts:
    """`routed_experts` in five launches, or eight for a prompt."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def routed_experts(
        self, u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.routed_experts`; for stacked FP4 experts and BF16 inputs.

        Raises:
            ShapeError: other experts or inputs.
        """
        packed = experts.packed
        call = packed and Call(
            u.contiguous(), ids.contiguous(), weights.contiguous(), *packed, limit, numerics
        )
        if not call or not call.is_packed:
            raise ShapeError("experts in single steps are for stacked FP4 matrices and BF16 inputs only")
        y = result(out, tuple(u.shape), torch.float32, u.device)
        rows = self._pairs(call) if call.is_by_rows else self._buckets(call)
        pairs, width, _ = call.sizes
        self._launch(
            combine_kernel, (-(-y.shape[0] // SUM.m), -(-width // SUM.n)), rows, call.ids, y, pairs, width, width, 0, BT=SUM.m,
            BN=SUM.n, warps=SUM.warps, stages=SUM.stages, **call.constants,
        )  # fmt: skip
        return deliver(out, y)

    def _pairs(self, call: Call) -> Tensor:
        g, v = (self._row_product(call, call.u, w, PACKED_UP, call.ids.shape[1]) for w in (call.w1, call.w3))
        return self._row_product(call, self._gate(call, g, v), call.w2, PACKED_DOWN, 1)

    def _row_product(self, call: Call, x: Tensor, w: Weight, chosen: Tile, shared_by: int) -> Tensor:
        """[P, out] float32; each row of x serves `shared_by` pairs."""
        pairs, (n, k) = call.ids.numel(), (w.out_features, w.in_features)
        split, steps = halved(k, chosen)
        grid = (pairs, -(-n // chosen.n), split)
        y = call.empty(pairs, n)
        parts = call.empty(split, pairs, n) if split > 1 else y
        self._launch(
            packed_product_kernel, grid, x, x.stride(0), words(w), scale_of(w), y, parts, self._launch.counters(pairs * grid[1]),
            call.ids, pairs, n, k, k // 8, k // 32, steps, CHOSEN=shared_by, SPLIT=split, BN=chosen.n, BK=chosen.k,
            Q8=call.rounds, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return y

    def _gate(self, call: Call, g: Tensor, v: Tensor) -> Tensor:
        (pairs, inner), a = g.shape, call.between()
        self._launch(
            gate_kernel, (-(-pairs // _GATE.m), -(-inner // _GATE.n)), g, v, a, call.weights, pairs, inner, call.limit,
            BETWEEN=call.numerics.bf16_between, BP=_GATE.m, BN=_GATE.n, warps=_GATE.warps, stages=_GATE.stages,
        )  # fmt: skip
        return a

    def _buckets(self, call: Call) -> Tensor:
        tiles = PackedTiles(self._launch, call)
        buckets = deal(self._launch, call, tiles.most_rows)
        x = tiles.spread(call.u)
        g, v = (
            self._tile_product(call, tiles.tile, x, w, buckets, call.ids.shape[1]) for w in (call.w1, call.w3)
        )
        a = tiles.spread(self._gate(call, g, v))
        return self._tile_product(call, tiles.tile, a, call.w2, buckets, 1)

    def _tile_product(
        self, call: Call, chosen: Tile, x: Tensor, w: Weight, buckets: Buckets, shared_by: int
    ) -> Tensor:
        """As `_row_product`; x is spread."""
        pairs, (n, k) = call.ids.numel(), (w.out_features, w.in_features)
        y = call.empty(pairs, n)
        self._launch(
            packed_tile_product_kernel, (buckets.tiles, -(-n // chosen.n)), x, x.shape[1], words(w), scale_of(w), y,
            buckets.experts, buckets.slots, pairs, n, k // 8, k // 32, CHOSEN=shared_by, BM=buckets.rows, BN=chosen.n,
            BK=chosen.k, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return y
