"""Sizes of one program of each kernel, by chip: what fits the memory of a vector core, held to by `lowering`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chip import Family


@dataclass(frozen=True)
class Tile:
    """Sizes for one family.

    Attributes:
        ub_bytes: unified buffer of a vector core. vector_cores: of the family's smallest chip; no launch has more programs.
        rope_heads: heads turned at a time. mix_tokens: tokens mixed at a time. swiglu_columns: of a row in one piece.
    """

    ub_bytes: int
    vector_cores: int
    rope_heads: int
    mix_tokens: int
    swiglu_columns: int

    def programs(self, pieces: int) -> tuple[int]:
        """The grid for a number of pieces, of which each program takes every so manieth."""
        return (min(pieces, self.vector_cores),)

    def rope(self, heads: int, dim: int, half: int, inverse: bool) -> dict[str, Any]:
        """Constants of `rope_kernel`."""
        return {
            "HEADS": heads, "FIRST": dim - 2 * half, "HALF": half, "INVERSE": inverse,
            "BH": min(self.rope_heads, power_of_two(heads)), "BR": power_of_two(half),
        }  # fmt: skip

    def mixes(self, tokens: int, streams: int) -> dict[str, Any]:
        """Constants of `mixes_kernel`."""
        return {
            "M": streams,
            "MP": power_of_two(streams),
            "BT": min(self.mix_tokens, power_of_two(tokens)),
        }

    def swiglu(self, width: int, weighted: bool) -> dict[str, Any]:
        """Constants of `swiglu_kernel`."""
        return {
            "WIDTH": width, "WEIGHTED": weighted, "BLOCK": min(self.swiglu_columns, power_of_two(width)),
        }  # fmt: skip


# the compiler keeps two of every buffer that memory is read into on 910B and 910C, and one on 950
TILES: Mapping[Family, Tile] = {
    "910B": Tile(192 << 10, 40, rope_heads=16, mix_tokens=32, swiglu_columns=4096),
    "910C": Tile(192 << 10, 40, rope_heads=16, mix_tokens=32, swiglu_columns=4096),
    "950": Tile(248 << 10, 56, rope_heads=32, mix_tokens=64, swiglu_columns=4096),
}


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
