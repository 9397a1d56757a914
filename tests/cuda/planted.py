"""Compile `linear` with something wrong planted in it and print what is said against that: `planted.py NAME ARCH`.

A process of its own: kernels imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch


def tiled(*numbers: int) -> Callable[[Any], None]:
    """A plant that gives every number of rows this tile: m, n, k, warps, stages."""

    def plant(linear: Any) -> None:
        tile = import_module("v4sdk_cuda.tiles").Tile(*numbers)
        linear.TILES = {("any", "decode"): tile, ("any", "prefill"): tile}

    return plant


def in_float32(linear: Any) -> None:
    """Multiply in float32 whatever is stored."""
    linear.operand_type = lambda x, *weights: import_module("triton.language").float32


def of_odd_width(linear: Any) -> None:
    """Cut the last two columns off the weight and the input: rows no longer start where wide loads may."""
    right = linear.Linear.linear

    def cut(self: Any, x: Any, weight: Any, *rest: Any, **named: Any) -> Any:
        narrow = replace(weight, data=torch.empty_like(weight.data.narrow(1, 0, 4094)))
        return right(self, torch.empty_like(x.narrow(1, 0, 4094)), narrow, *rest, **named)

    linear.Linear.linear = cut


PLANTS: dict[str, Callable[[Any], None]] = {
    "nothing": lambda linear: None,
    "too much shared memory": tiled(128, 256, 128, 8, 4),
    "spills": tiled(256, 256, 128, 4, 1),
    "float32 where BF16 is expected": in_float32,
    "narrow loads": of_odd_width,
}

if __name__ == "__main__":
    module = import_module("v4sdk_cuda.linear")
    PLANTS[sys.argv[1]](module)
    variants = import_module("v4sdk_cuda.variants")
    rows, failed = variants.compile_op("linear", int(sys.argv[2]))
    print("\n".join([*failed, *(text for row in rows for text in row.wrong)]))
