"""Which tile a kernel takes: an explicit table per kernel, by generation of the chip and by class of shape. Nothing is tuned at
run time: a start is as fast as the last one, and a captured graph is the same every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .target import Target

# rows of a decode step, and of a prompt
Shape = Literal["decode", "prefill"]
DECODE_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Sizes of one program and how the compiler lays it out.

    Attributes:
        m, n, k: rows, columns and depth of one step. warps, stages: of 32 threads, and of loads in flight.
        split: programs that share one output tile along the depth; 1: none.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1


# (family of the chip or `any`, shape) to tile; `any` must have both shapes and fit every chip
Table = Mapping[tuple[str, Shape], Tile]


def shape_of(rows: int) -> Shape:
    """The class of a number of rows."""
    return "decode" if rows <= DECODE_ROWS else "prefill"


def tile(table: Table, target: Target, rows: int) -> Tile:
    """The tile for a chip and a number of rows; a chip without a line of its own takes the portable one."""
    shape = shape_of(rows)
    return table.get((target.family, shape)) or table["any", shape]
