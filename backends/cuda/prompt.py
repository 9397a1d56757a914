"""The routed experts of a prompt: pairs of a token and a choice are dealt into tiles of one expert each, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import Call, Part, launch_up, words
from .kernels.moe import down_kernel
from .kernels.moe_packed import packed_tile_down_kernel, packed_tile_up_kernel, spread_kernel
from .kernels.moe_prompt import bucket_kernel, combine_kernel
from .launch import Launch
from .operands import power_of_two, scale_of
from .tiles import DECODE_ROWS, Table, Tile, tile

# FP4 weights and BF16 inputs; m: the most rows of a tile
PACKED: Table = {
    ("any", "prefill"): Tile(64, 64, 128, 4, 2),
    ("90", "prefill"): Tile(128, 128, 128, 8, 3),
}
# no buffer takes more
LIMIT_BYTES = 64 << 20
_FEWEST_ROWS = 16
# for the tables of tiles: the last piece of a prompt may have as few rows as a decode step, and goes the way of the others
_PROMPT_ROWS = DECODE_ROWS + 1
# pairs that one round of the dealing looks at
_BLOCK = 1024
# what one program adds up, and what one spreads
SUM = Tile(8, 256, 1, 4, 1)
_SPREAD_ROWS = 16


@dataclass(frozen=True)
class Buckets:
    """Tiles of one expert each.

    Shapes:
        experts [tiles], slots [tiles * rows] int32: the expert and the pairs of every tile, -1 for none
    """

    experts: Tensor
    slots: Tensor
    rows: int

    @property
    def tiles(self) -> int:
        """How many there are, used or not."""
        return self.experts.shape[0]


def run_prompt(launch: Launch, call: Call, y: Tensor) -> None:
    """Fill y [T, N] float32, in pieces of as many tokens as the memory between the products allows."""
    inner = call.w1.out_features * (2 if call.is_packed else call.u.itemsize)
    most = max(1, LIMIT_BYTES // (call.ids.shape[1] * inner))
    for first in range(0, call.ids.shape[0], most):
        count = min(most, call.ids.shape[0] - first)
        _piece(launch, call.span(first, count), y.narrow(0, first, count))


def _piece(launch: Launch, call: Call, y: Tensor) -> None:
    pairs, width, _ = call.sizes
    product = PackedTiles(launch, call) if call.is_packed else Tiles(launch, call)
    buckets = deal(launch, call, product.most_rows)
    a = product.up(buckets)
    # whole tiles of columns at a time, so that weights are read once however many tokens there are
    most = max(1, LIMIT_BYTES // (4 * pairs * product.columns)) * product.columns
    for first in range(0, width, most):
        some = min(most, width - first)
        rows = call.empty(pairs, some)
        product.down(a, buckets, rows, first)
        launch(
            combine_kernel, (-(-y.shape[0] // SUM.m), -(-some // SUM.n)), rows, call.ids, y, pairs, width, some, first,
            BT=SUM.m, BN=SUM.n, warps=SUM.warps, stages=SUM.stages, **call.constants,
        )  # fmt: skip


def deal(launch: Launch, call: Call, most_rows: int) -> Buckets:
    """Deal pairs into tiles. Twice as many rows as an expert has on average: a second tile would read its weights again."""
    pairs, count = call.ids.numel(), call.w1.data.shape[0]
    rows = min(most_rows, max(_FEWEST_ROWS, power_of_two(2 * pairs // count)))
    # of an expert's tiles only the last may be short
    tiles = pairs // rows + min(count, pairs)
    made = Buckets(call.empty(tiles, dtype=torch.int32), call.empty(tiles * rows, dtype=torch.int32), rows)
    launch(
        bucket_kernel, (count,), call.ids, made.experts, made.slots, pairs, count, tiles, BM=rows, BINS=power_of_two(count + 1),
        BLOCK=_BLOCK, SLOTS=128, warps=4, stages=1,
    )  # fmt: skip
    return made


class Tiles:
    """Products with experts of any encoding."""

    def __init__(self, launch: Launch, call: Call) -> None:
        self._launch, self._call = launch, call
        self._a = call.between()
        self._up, self._down = (
            Part(launch, w, x, _PROMPT_ROWS) for w, x in ((call.w1, call.u), (call.w2, self._a))
        )
        self.most_rows, self.columns = self._up.tile.m, self._down.tile.n

    def up(self, buckets: Buckets) -> Tensor:
        """What comes between the products [P, I]."""
        part = self._up
        part.constants["BM"] = buckets.rows
        launch_up(
            self._launch, self._call, part, self._a, part.grid(buckets.tiles), "bucket", buckets.experts, buckets.slots, self._a,
            self._a,
        )  # fmt: skip
        return self._a

    def down(self, a: Tensor, buckets: Buckets, rows: Tensor, first: int) -> None:
        """Fill rows [P, width] with every pair's columns from `first` on."""
        part, call, (pairs, width, inner) = self._down, self._call, self._call.sizes
        part.constants["BM"] = buckets.rows
        self._launch(
            down_kernel, part.grid(buckets.tiles, rows.shape[1]), a, part.data, part.scale, rows, rows, rows, call.ids,
            buckets.experts, buckets.slots, pairs, width, inner, *part.steps, part.span, first, rows.shape[1], MEMBERS="bucket",
            Q8=call.rounds, **call.constants, **part.constants,
        )  # fmt: skip


class PackedTiles:
    """Products of FP4 experts with BF16 inputs."""

    def __init__(self, launch: Launch, call: Call) -> None:
        self._launch, self._call = launch, call
        self.tile = tile(PACKED, launch.target, _PROMPT_ROWS)
        self.most_rows, self.columns = self.tile.m, self.tile.n

    def up(self, buckets: Buckets) -> Tensor:
        """What comes between the products, spread [P, I rounded up to whole tiles]."""
        call, chosen, (pairs, width, inner) = self._call, self.tile, self._call.sizes
        x, a = self.spread(call.u), call.between()
        self._launch(
            packed_tile_up_kernel, (buckets.tiles, -(-inner // chosen.n)), x, x.shape[1], words(call.w1), scale_of(call.w1),
            words(call.w3), scale_of(call.w3), a, buckets.experts, buckets.slots, call.weights, pairs, inner, width // 8,
            width // 32, call.limit, BM=buckets.rows, BN=chosen.n, BK=chosen.k, warps=chosen.warps, stages=chosen.stages,
            **call.constants,
        )  # fmt: skip
        return self.spread(a)

    def down(self, a: Tensor, buckets: Buckets, rows: Tensor, first: int) -> None:
        """Fill rows [P, width] with every pair's columns from `first` on."""
        call, chosen, (pairs, width, inner) = self._call, self.tile, self._call.sizes
        self._launch(
            packed_tile_down_kernel, (buckets.tiles, -(-rows.shape[1] // chosen.n)), a, a.shape[1], words(call.w2),
            scale_of(call.w2), rows, buckets.experts, buckets.slots, pairs, width, inner // 8, inner // 32, first, rows.shape[1],
            BM=buckets.rows, BN=chosen.n, BK=chosen.k, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip

    def spread(self, x: Tensor) -> Tensor:
        """x [R, K] as the products want it [R, K rounded up to whole tiles]."""
        steps = -(-x.shape[1] // self.tile.k)
        y = self._call.empty(x.shape[0], steps * self.tile.k, dtype=torch.bfloat16)
        self._launch(
            spread_kernel, (-(-x.shape[0] // _SPREAD_ROWS), steps), x, x.stride(0), y, *x.shape, y.shape[1], ROWS=_SPREAD_ROWS,
            BK=self.tile.k, Q8=self._call.rounds, warps=4, stages=1,
        )  # fmt: skip
        return y
