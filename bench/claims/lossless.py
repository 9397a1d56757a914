"""FP4 weights as FP8: when the scales of 1 x 32 groups can be moved into FP8 values under one scale per 128 x 128 tile.

An E2M1 value times 2**d is an E4M3 value as long as it stays within 448 and its last bit above 2**-9. Giving a tile the scale
S / 2**6, S the largest group scale in it, puts the largest magnitude at 6 * 64 = 384; a group whose scale is S / 2**d then still
fits for d up to `EXACT_SPREAD`. So the conversion is exact if the scales in a tile span at most 2**14.
Source: DeepSeek-V4 report 3.4; official convert.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.quant import e2m1_decode, ue8m0_value
from v4sdk.weight_formats import pack_fp4
from v4sdk.weights import Weight, WeightSource

TILE = 128
GROUP = 32
HEADROOM = 6
EXACT_SPREAD = 14


@dataclass(frozen=True)
class Conversion:
    """Outcome of converting FP4 weights.

    Attributes:
        values: converted. differing: those that are not the same number afterwards. spread: largest log2 of the ratio of two
            group scales in a tile.
    """

    values: int
    differing: int
    spread: int

    def __add__(self, other: Conversion) -> Conversion:
        return Conversion(
            self.values + other.values, self.differing + other.differing, max(self.spread, other.spread)
        )


def convert(weight: Weight, factor: float = 1.0) -> Conversion:
    """Convert an FP4 matrix by the rule and compare every value with what it was.

    Args:
        factor: multiplies the tile scales of the rule, to see what happens where they are not powers of two.

    Shapes:
        weight [o, i] FP4 with one UE8M0 scale per 32 columns; edges of incomplete tiles are padded
    """
    scale_bytes = _bytes(weight)
    tile_scale, spread = tile_scales(scale_bytes)
    original = weight.dequantize().double()
    scale = (tile_scale.double() * factor).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    scale = scale[: original.shape[0], : original.shape[1]]
    back = (original / scale).float().to(torch.float8_e4m3fn).double() * scale
    # NaN, from values beyond 448, differs too
    return Conversion(original.numel(), int((back != original).sum()), spread)


def tile_scales(scale_bytes: Tensor) -> tuple[Tensor, int]:
    """Scale of every tile, S / 2**6 as float32, and the largest spread of group scales within one (in powers of two).

    Shapes:
        scale_bytes [o, groups] uint8 (UE8M0) -> [ceil(o / 128), ceil(groups / 4)]
    """
    groups = TILE // GROUP
    rows, cols = scale_bytes.shape
    value = scale_bytes.to(torch.int32)
    pad = (0, -cols % groups, 0, -rows % TILE)
    high, low = (torch.nn.functional.pad(value, pad, value=filler) for filler in (0, 255))
    shape = (-1, TILE, -(-cols // groups), groups)
    top, bottom = high.reshape(shape).amax((1, 3)), low.reshape(shape).amin((1, 3))
    return ue8m0_value((top - HEADROOM).clamp_min(0).to(torch.uint8)), int((top - bottom).max())


def exact_pairs(spread: int) -> tuple[int, int]:
    """Try every FP4 code under every group scale that lies `spread` powers of two below the tile's largest.

    Returns:
        (pairs tried, pairs that are not the same number in FP8). Scales so small that S / 2**6 has no UE8M0 byte are left out.
    """
    code = torch.arange(16)
    top = torch.arange(max(HEADROOM, spread), 255)
    group, tile = (ue8m0_value((top - less).to(torch.uint8)).double() for less in (spread, HEADROOM))
    want = e2m1_decode(code).double()[None] * group[:, None]
    back = (want / tile[:, None]).float().to(torch.float8_e4m3fn).double() * tile[:, None]
    return want.numel(), int((back != want).sum())


def largest_exact_spread(most: int = 40) -> int:
    """The largest spread up to which every code under every scale is exact, found by trying; -1 if none is."""
    spread = -1
    while spread < most and exact_pairs(spread + 1)[1] == 0:
        spread += 1
    return spread


def _bytes(weight: Weight) -> Tensor:
    assert weight.scale is not None
    return weight.scale.view(torch.uint8)


def random_matrices(seed: int, count: int) -> Conversion:
    """Convert random FP4 matrices: normal weights, each row scaled by a lognormal factor."""
    random, total = torch.Generator().manual_seed(seed), Conversion(0, 0, 0)
    for _ in range(count):
        size = torch.randn(512, 1, generator=random).exp()
        data, scale = pack_fp4(0.02 * size * torch.randn(512, 1056, generator=random))
        total += convert(Weight(data, scale, "fp4", (1, GROUP), True))
    return total


def checkpoint(path: Path, limit: int | None = None) -> tuple[Conversion, int, str]:
    """Convert the FP4 matrices of a checkpoint, at most `limit` of them spread over the whole.

    Returns:
        (outcome, matrices converted, fingerprint of the checkpoint)
    """
    total = Conversion(0, 0, 0)
    with Checkpoint(path) as opened:
        names = [name for name, tensor in opened.headers.tensors.items() if tensor.dtype == "I8"]
        step = 1 if limit is None else max(1, -(-len(names) // limit))
        source, chosen = WeightSource(opened), names[::step]
        for name in chosen:
            total += convert(source.weight(name.removesuffix(".weight")))
        return total, len(chosen), opened.fingerprint()
