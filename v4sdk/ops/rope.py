"""Rotary positions: one table per layer kind, float32 throughout, rotation of adjacent pairs on the last dims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from v4sdk.config import RopeSpec
from v4sdk.ops.op import Case, Cost, OpTable, Tolerance, op
from v4sdk.ops.precision import wide
from v4sdk.quant import split_last


def inv_freq(spec: RopeSpec, rope_dim: int, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies of one table, stretched by YaRN where the spec says so.

    inv_i = base**(-2i/r); YaRN blends inv_i and inv_i / factor by a ramp between the dimensions that turn
    beta_fast and beta_slow times over the original context. There is no amplitude factor.

    Shapes:
        -> [rope_dim / 2] float32
    Source:
        official model.py, precompute_freqs_cis; the float32 operations are kept in its order
    """
    inv = 1.0 / (spec.base ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim))
    if spec.factor > 1.0 and spec.original_context > 0:
        low = max(math.floor(_dimension(spec, spec.beta_fast, rope_dim)), 0)
        high = min(math.ceil(_dimension(spec, spec.beta_slow, rope_dim)), rope_dim - 1)
        span = (high - low) or 0.001
        ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        smooth = 1 - ramp
        inv = inv / spec.factor * (1 - smooth) + inv * smooth
    return inv.to(device)


def _dimension(spec: RopeSpec, turns: float, rope_dim: int) -> float:
    return rope_dim * math.log(spec.original_context / (turns * 2 * math.pi)) / (2 * math.log(spec.base))


def _inputs() -> Iterator[Case]:
    plain, stretched = RopeSpec(10000.0), RopeSpec(160000.0, 16.0, 65536)
    for scale, spec, dim, positions in (
        ("tiny", plain, 64, (0, 1, 127)),
        ("odd", stretched, 6, (9, 300)),
        ("edge", stretched, 64, ()),
        ("edge", stretched, 64, (1_048_575,)),
        ("flash", stretched, 64, tuple(range(4096))),
        ("pro", stretched, 64, (1_000_000,)),
    ):
        label = f"{spec.base:g}-{dim}-{len(positions)}-tokens-to-{max(positions, default=0)}"
        yield Case(label, _maker(spec, dim, positions), scale)


def _maker(spec: RopeSpec, dim: int, positions: tuple[int, ...]) -> Any:
    def make(device: torch.device) -> dict[str, Any]:
        placed = torch.tensor(positions, dtype=torch.int32, device=device)
        return {"positions": placed, "inv": inv_freq(spec, dim, device)}

    return make


def _cost(positions: Tensor, inv: Tensor) -> Cost:
    return Cost(positions.nbytes + inv.nbytes, positions.shape[0] * 2 * inv.nbytes, 0)


_F32 = Tolerance(1e-6, 1e-6, "float32 sine and cosine of one float32 angle, each within an ulp or two")


@op(inputs=_inputs, tolerances={torch.float32: _F32}, cost=_cost)
def rope_table(positions: Tensor, inv: Tensor) -> Tensor:
    """Give cosines and sines of every position.

    The angle is the float32 product; more exact angles disagree with the reference at long range.

    Shapes:
        positions [T] int32, inv [r / 2] float32 -> [T, r] float32, cosines first
    """
    angle = positions.float()[:, None] * inv
    return torch.cat((angle.cos(), angle.sin()), -1)


def rope(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of the last r dims; everything before passes through.

    Shapes:
        x [T, D] or [T, H, D], table [T, r] -> like x; arithmetic in float32, rounded once to the dtype of x
    """
    half = table.shape[-1] // 2
    cos, sin = table[:, :half], table[:, half:]
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    if inverse:
        sin = -sin
    # split and unbind, not slices: their gradients need no zero-filled copies
    plain, tail = torch.split(x, [x.shape[-1] - 2 * half, 2 * half], -1)
    even, odd = torch.unbind(split_last(wide(tail), 2), -1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((plain, rotated.to(x.dtype)), -1)


def rotated(ops: OpTable, x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """As `rope`, by whatever rotates for the ops of a table."""
    return (ops.rope or rope)(x, table, inverse)
