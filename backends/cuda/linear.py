"""The matrix product by stored weight encoding, and the output head."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.weights import Weight

from .kernels.linear import linear_kernel
from .launch import Launch, deliver, result
from .operands import GROUP, data_of, dense, operand_type, rounds_input, scale_of
from .tiles import Table, Tile, tile

# a decode step is bound by reading the weight: narrow tiles, and the depth split until every multiprocessor has work
TILES: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 3, split=4),
    ("90", "decode"): Tile(16, 64, GROUP, 4, 4, split=4),
    ("100", "decode"): Tile(16, 64, GROUP, 4, 4, split=4),
    ("any", "prefill"): Tile(64, 64, GROUP, 4, 2),
    ("90", "prefill"): Tile(128, 128, GROUP, 8, 3),
    ("100", "prefill"): Tile(128, 128, GROUP, 8, 2),
}
# products in float32: no tensor cores, so smaller tiles
WIDE: Table = {
    ("any", "decode"): Tile(16, 32, 64, 4, 1, split=4),
    ("any", "prefill"): Tile(64, 64, 32, 8, 1),
}


class Linear:
    """Kernels of `linear` and `logits`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def linear(
        self, x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.linear`."""
        return self._product(x, weight, rounds_input(weight, numerics), dtype, out)

    def logits(self, h: Tensor, head: Weight, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.logits`."""
        return self._product(h, head, False, torch.float32, out)

    def _product(self, x: Tensor, weight: Weight, q8: bool, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        t, depth, width = x.shape[0], x.shape[1], weight.out_features
        x = dense(x)
        y = result(out, (t, width), dtype, x.device)
        operand = operand_type(x, weight)
        chosen = tile(WIDE if operand.is_fp32() else TILES, self._launch.target, t)
        split = min(chosen.split, -(-depth // chosen.k))
        span = -(-depth // (split * chosen.k)) * chosen.k
        split = -(-depth // span)
        grid = (-(-t // chosen.m), -(-width // chosen.n), split)
        parts = torch.empty((split, t, width), dtype=torch.float32, device=x.device) if split > 1 else y
        counters = self._launch.counters(grid[0] * grid[1] if split > 1 else 1)
        self._launch(
            linear_kernel, grid, x, x.stride(0), data_of(weight, self._launch.target), scale_of(weight), y, parts, counters,
            t, width, depth, span, SPLIT=split, BM=chosen.m, BN=chosen.n, BK=chosen.k, ENCODING=weight.encoding, Q8=q8,
            OPERAND=operand, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return deliver(out, y)
