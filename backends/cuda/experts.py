"""The routed experts of one layer, and the tiles of all experts. A decode step takes pairs of a token and a choice one by one;
`prompt` brings those of a prompt together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.precision import activation_dtype
from v4sdk.weights import Weight

from .kernels.moe import down_kernel, up_kernel
from .kernels.moe_packed import packed_down_kernel, packed_up_kernel
from .launch import Launch
from .operands import GROUP, data_of, operand_type, rounds_input, scale_of
from .tiles import DECODE_ROWS, Table, Tile, tile

# experts of any encoding, and the shared one. A decode step is bound by reading the weight: see `linear`
TILES: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 2, split=4),
    ("90", "decode"): Tile(16, 32, GROUP, 4, 3, split=4),
    ("100", "decode"): Tile(16, 32, GROUP, 4, 3, split=4),
    ("any", "prefill"): Tile(64, 32, GROUP, 4, 2),
    # FP8 is decoded by integer instructions, which take registers of their own
    ("80", "prefill"): Tile(64, 16, GROUP, 4, 2),
    ("90", "prefill"): Tile(128, 64, GROUP, 8, 2),
    ("100", "prefill"): Tile(128, 64, GROUP, 8, 2),
}
# products in float32: no tensor cores, so smaller tiles
WIDE: Table = {
    ("any", "decode"): Tile(16, 64, 64, 8, 1),
    ("any", "prefill"): Tile(64, 64, 64, 16, 1),
}
# FP4 weights and BF16 inputs, row by row. Two warps, so that HMMA is taken on newer chips too: their larger instructions take as
# long for eight columns as for many
PACKED_UP = Tile(1, 32, 256, 2, 3, split=2)
PACKED_DOWN = Tile(1, 64, 256, 2, 3, split=2)


def halved(depth: int, chosen: Tile) -> tuple[int, int]:
    """How many programs share a depth, and how many steps of the tile each one takes."""
    steps = max(1, -(-depth // chosen.k))
    each = -(-steps // min(chosen.split, steps))
    return -(-steps // each), each


@dataclass(frozen=True)
class Call:
    """The arguments of one `routed_experts`, its experts as stacks w1, w3 [E, I, N] and w2 [E, N, I]."""

    u: Tensor
    ids: Tensor
    weights: Tensor
    w1: Weight
    w2: Weight
    w3: Weight
    limit: float
    numerics: Numerics

    @property
    def sizes(self) -> tuple[int, int, int]:
        """P, N and I: pairs, width and inner width."""
        return self.ids.numel(), self.u.shape[1], self.w1.out_features

    @property
    def is_packed(self) -> bool:
        """Whether the kernels for FP4 weights and BF16 inputs serve it."""
        return self.u.dtype == torch.bfloat16 and all(
            w.encoding == "fp4" for w in (self.w1, self.w2, self.w3)
        )

    @property
    def is_by_rows(self) -> bool:
        """Whether pairs go one by one, which reads an expert again for every token that chose it: no loss while few experts are
        chosen twice.
        """
        tokens, experts = self.ids.shape[0], self.w1.data.shape[0]
        return tokens <= DECODE_ROWS or (self.is_packed and self.ids.numel() <= experts)

    @property
    def constants(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {"CHOSEN": self.ids.shape[1], "BETWEEN": self.numerics.bf16_between}

    @property
    def rounds(self) -> bool:
        """Whether inputs are rounded to FP8."""
        return rounds_input(self.w1, self.numerics)

    def between(self) -> Tensor:
        """Memory for what comes between the products [P, I]."""
        return self.empty(self.ids.numel(), self.w1.out_features, dtype=activation_dtype(self.numerics))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory where the call's tensors lie."""
        return torch.empty(shape, dtype=dtype, device=self.u.device)

    def span(self, first: int, count: int) -> Call:
        """The same call for `count` tokens from `first` on."""
        u, ids, weights = (t.narrow(0, first, count) for t in (self.u, self.ids, self.weights))
        return replace(self, u=u, ids=ids, weights=weights)


class Part:
    """One product of rows with a float, FP8 or FP4 matrix or a stack of them: its tile, grid and constants.

    Attributes:
        data, scale: pointers. steps: from one matrix of a stack to the next, in elements of both. span: columns of one part.
    """

    def __init__(self, launch: Launch, weight: Weight, x: Tensor, rows: int) -> None:
        self._launch, self._device = launch, x.device
        operand = operand_type(x, weight)
        self.tile = tile(WIDE if operand.name == "fp32" else TILES, launch.target, rows)
        self.data, self.scale = data_of(weight, launch.target), scale_of(weight)
        self.steps = (self.data.shape[-2:].numel(), self.scale.shape[-2:].numel())
        self.split, each = halved(weight.in_features, self.tile)
        self.span = each * self.tile.k
        self._width = weight.out_features
        self.constants: dict[str, Any] = {
            "SPLIT": self.split, "BM": self.tile.m, "BN": self.tile.n, "BK": self.tile.k, "ENCODING": weight.encoding,
            "OPERAND": operand, "warps": self.tile.warps, "stages": self.tile.stages,
        }  # fmt: skip

    def grid(self, tiles: int, width: int | None = None) -> tuple[int, int, int]:
        """Programs by tiles of rows, tiles of columns (of `width`, or all), and parts of the depth."""
        return tiles, -(-(width or self._width) // self.tile.n), self.split

    def parts(self, *shape: int) -> Tensor:
        """Memory for the sums of every part of the depth [split, ..] float32."""
        return torch.empty((self.split, *shape), dtype=torch.float32, device=self._device)

    def counters(self, tiles: int) -> Tensor:
        """A counter per tile of the result, where the depth is shared."""
        return self._launch.counters(tiles * self.grid(1)[1] if self.split > 1 else 1)


def words(weight: Weight) -> Tensor:
    """FP4 values by the eight, as int32 [E, out, in / 8]."""
    return weight.data.view(torch.int32)


def run_pairs(launch: Launch, call: Call, y: Tensor) -> None:
    """y [T, N] from experts of any encoding, in two launches."""
    (pairs, width, inner), a = call.sizes, call.between()
    up, down = Part(launch, call.w1, call.u, 1), Part(launch, call.w2, a, 1)
    launch_up(
        launch,
        call,
        up,
        a,
        up.grid(pairs),
        "pair",
        call.ids,
        call.ids,
        up.parts(2, pairs, inner),
        up.counters(pairs),
    )
    counters = launch.counters(call.ids.shape[0] * down.grid(1)[1])
    launch(
        down_kernel, down.grid(pairs), a, down.data, down.scale, y, down.parts(pairs, width), counters, call.ids, call.ids,
        call.ids, pairs, width, inner, *down.steps, down.span, 0, width, MEMBERS="pair", Q8=call.rounds, **call.constants,
        **down.constants,
    )  # fmt: skip


def launch_up(
    launch: Launch, call: Call, part: Part, a: Tensor, grid: tuple[int, int, int], kind: str, experts: Tensor, slots: Tensor,
    parts: Tensor, counters: Tensor,
) -> None:  # fmt: skip
    """The first product, for pairs one by one or in buckets."""
    pairs, width, inner = call.sizes
    launch(
        up_kernel, grid, call.u, call.u.stride(0), part.data, part.scale, data_of(call.w3, launch.target), scale_of(call.w3), a,
        parts, counters, call.ids, experts, slots, call.weights, pairs, inner, width, *part.steps, part.span, call.limit,
        MEMBERS=kind, Q8=call.rounds, **call.constants, **part.constants,
    )  # fmt: skip


def run_packed_pairs(launch: Launch, call: Call, y: Tensor) -> None:
    """y [T, N] from FP4 experts and BF16 inputs, in two launches."""
    (pairs, width, inner), a = call.sizes, call.between()
    chosen = PACKED_UP
    split, steps = halved(width, chosen)
    grid = (pairs, -(-inner // chosen.n), split)
    launch(
        packed_up_kernel, grid, call.u, call.u.stride(0), words(call.w1), scale_of(call.w1), words(call.w3), scale_of(call.w3),
        a, call.empty(split, 2, pairs, inner), launch.counters(pairs * grid[1]), call.ids, call.weights, pairs, inner, width,
        width // 8, width // 32, steps, call.limit, SPLIT=split, BN=chosen.n, BK=chosen.k, Q8=call.rounds, warps=chosen.warps,
        stages=chosen.stages, **call.constants,
    )  # fmt: skip
    chosen = PACKED_DOWN
    split, steps = halved(inner, chosen)
    grid = (pairs, -(-width // chosen.n), split)
    launch(
        packed_down_kernel, grid, a, words(call.w2), scale_of(call.w2), y, call.empty(split, pairs, width),
        launch.counters(call.ids.shape[0] * grid[1]), call.ids, pairs, width, inner, inner // 8, inner // 32, steps, SPLIT=split,
        BN=chosen.n, BK=chosen.k, Q8=call.rounds, warps=chosen.warps, stages=chosen.stages, **call.constants,
    )  # fmt: skip


def run_experts(launch: Launch, call: Call, y: Tensor) -> None:
    """Fill y [T, N] float32."""
    from .prompt import run_prompt

    if not call.is_by_rows:
        run_prompt(launch, call, y)
    elif call.is_packed:
        run_packed_pairs(launch, call, y)
    else:
        run_pairs(launch, call, y)
