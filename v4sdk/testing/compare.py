"""How two results are compared: exactly where values are discrete, within an op's stated tolerance where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.op import Op, Tolerance

# for ops that state none; an op that needs more says why
DEFAULT_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-10, "order of summation"),
    torch.float32: Tolerance(2e-5, 2e-5, "order of summation in float32"),
    torch.float16: Tolerance(1e-3, 2e-3, "two units of an 11-bit mantissa"),
    torch.bfloat16: Tolerance(1e-2, 1.6e-2, "two units of an 8-bit mantissa"),
}
FP4_STEP = Tolerance(0.5, 0.51, "one step of the FP4 grid")
# share of values that may fall on another step where what was rounded to the grid had been rounded to BF16 before
MAX_STEPPED = 0.02
# a float32 result of one product that gave BF16
BF16_PRODUCT = Tolerance(1e-6, 2**-7, "one BF16 step of a product")
EXACT = Tolerance(0.0, 0.0, "discrete values")
# packed rows hold FP8 and FP4 codes: a value on a rounding boundary moves by one step, of at most 1/8 and 1/2
PACKED = Tolerance(2e-2, 0.13, "one step of the FP8 grid")


@dataclass(frozen=True)
class NormLimits:
    """How far a result may lie from the reference by its length, where a device rounds the inputs of its products.

    Attributes:
        whole: of the tensor as one vector. row: of each row of the last dimension, since a token that is all wrong is lost among
            five hundred right ones.
    """

    whole: Tolerance
    row: Tolerance


def _limits(whole: float, row: float, why: str) -> NormLimits:
    return NormLimits(
        Tolerance(0.0, whole, f"of the whole tensor: {why}"), Tolerance(0.0, row, f"of each row: {why}")
    )


# each of at most three roundings in a row moves a vector of 4 standard deviations by 4 / 127 / sqrt(12) of its length, 0.9%; the
# worst row that emulated chips gave was 2.6% away (shared expert)
INT8_INPUTS = _limits(2e-2, 3.5e-2, "inputs of integer products are rounded to 8 bits token by token")
# E4M3 rounds a value by 1/16 at most, 2.6% in the mean; gate and up both have that of their input, and their product rounds once
# more; the worst row was 9.1% away (routed experts)
FP8_INPUTS = _limits(8e-2, 0.13, "inputs of FP8 products are rounded to FP8")
# a vector moved by a share of its length, then rounded to a grid of steps of a third: sqrt(0.01 * 0.33) for int8 inputs,
# sqrt(0.036 * 0.33) for FP8 ones, and room for a short vector. In a row of 32 one value on another step is much: the worst were
# 23.4% and 20.9% away
_THEN_FP4 = "inputs of products are rounded, and results then to FP4"
INT8_INPUTS_FP4 = _limits(0.1, 0.3, _THEN_FP4)
FP8_INPUTS_FP4 = _limits(0.15, 0.3, _THEN_FP4)


@dataclass(frozen=True)
class Difference:
    """What a comparison found.

    Attributes:
        max_abs: largest absolute difference. worst: largest difference in units of what is accepted; above 1 is a failure.
        tolerance: what was accepted. problem: what cannot be put in a number (shape, dtype, NaN), or None.
        relative_l2: |a - e| / |e| over the whole tensor. cosine: of the two as one vector each. worst_row: the largest
            |a - e| / |e| of a row of the last dimension. All over elements that are finite on either side; chosen ids have
            none, and keep 0, 1 and 0.
    """

    max_abs: float
    worst: float
    tolerance: Tolerance
    problem: str | None = None
    relative_l2: float = 0.0
    cosine: float = 1.0
    worst_row: float = 0.0

    @property
    def ok(self) -> bool:
        """Within the tolerance."""
        return self.problem is None and self.worst <= 1.0


def tolerance_for(op: Op[..., object], dtype: torch.dtype, numerics: Numerics | None = None) -> Tolerance:
    """The op's own tolerance for a dtype, else the default; discrete dtypes are compared exactly.

    Args:
        numerics: of the case; where they may leave roundings out, the op may have a wider tolerance for keeping them.
    """
    if not dtype.is_floating_point:
        return EXACT
    if numerics is not None and numerics.bf16_activations and not numerics.bf16_between:
        kept = op.kept_roundings.get(dtype)
        if kept is not None:
            return kept
    return op.tolerances.get(dtype) or DEFAULT_TOLERANCES.get(dtype, EXACT)


def compare(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Difference:
    """Compare element by element: |a - e| <= atol + rtol * |e|; equal infinities and equal NaNs agree."""
    if actual.shape != expected.shape:
        return _problem(tolerance, f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        return _problem(tolerance, f"dtype {actual.dtype}, expected {expected.dtype}")
    a, e = (t.detach().cpu().to(torch.float64) for t in (actual, expected))
    if not bool((a.isnan() == e.isnan()).all()):
        count = int((a.isnan() != e.isnan()).sum())
        return _problem(tolerance, f"{count} of {a.numel()} elements are NaN on one side only")
    same = (a == e) | (a.isnan() & e.isnan())
    gap = torch.where(same, 0.0, (a - e).abs())
    if not gap.numel() or not bool(gap.any()):
        return Difference(0.0, 0.0, tolerance)
    room = tolerance.atol + tolerance.rtol * torch.where(e.isfinite(), e.abs(), 0.0)
    worst = torch.where(gap > 0, gap / room.clamp_min(1e-300), 0.0).nan_to_num(nan=float("inf"))
    finite = a.isfinite() & e.isfinite()
    vectors = _as_vectors(a[finite], e[finite])
    rows = _worst_row(torch.where(finite, a, 0.0), torch.where(finite, e, 0.0))
    return Difference(float(gap.max()), float(worst.max()), tolerance, None, *vectors, rows)


def _as_vectors(a: Tensor, e: Tensor) -> tuple[float, float]:
    """Relative L2 and cosine."""
    apart, size, own = float((a - e).norm()), float(e.norm()), float(a.norm())
    if not size or not own:
        return (float("inf") if apart and not size else float(apart > 0), float(apart == 0))
    return apart / size, float((a * e).sum()) / (size * own)


def _worst_row(a: Tensor, e: Tensor) -> float:
    """The largest relative L2 of a row of the last dimension."""
    apart, size = (t.reshape(-1, t.shape[-1] if t.dim() else 1).norm(dim=-1) for t in (a - e, e))
    return float(torch.where(apart > 0, apart / size, 0.0).max())


def by_norm(found: Difference, limits: NormLimits) -> Difference:
    """Judge a difference that is too large element by element by its relative L2: inputs of products were rounded."""
    if found.ok or found.problem is not None or found.tolerance.atol + found.tolerance.rtol == 0:
        return found
    judged = ((found.relative_l2, limits.whole), (found.worst_row, limits.row))
    apart, limit = max(judged, key=lambda one: one[0] / one[1].rtol)
    return replace(found, worst=apart / limit.rtol, tolerance=limit)


def compare_on_grid(actual: Tensor, expected: Tensor, tolerance: Tolerance, step: Tolerance) -> Difference:
    """Compare values that were rounded to a coarse grid: few of them may lie one step further than `tolerance`, none more."""
    found = compare(actual, expected, tolerance)
    if found.ok or found.problem is not None:
        return found
    a, e = (t.detach().cpu().to(torch.float64) for t in (actual, expected))
    share = float(((a - e).abs() > tolerance.atol + tolerance.rtol * e.abs()).double().mean())
    worst = max(compare(actual, expected, step).worst, share / MAX_STEPPED)
    return replace(found, worst=worst, tolerance=step)


def compare_selection(actual: Tensor, expected: Tensor, max_flipped: float) -> Difference:
    """Compare chosen ids row by row as sets: near ties may fall either way, in a stated share of all choices."""
    tolerance = Tolerance(0.0, 0.0, f"at most {max_flipped:.0%} of the choices may differ at near ties")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return compare(actual, expected, tolerance)
    if expected.numel() == 0:
        return Difference(0.0, 0.0, tolerance)
    a, e = (t.detach().cpu().reshape(-1, t.shape[-1] if t.dim() > 1 else 1) for t in (actual, expected))
    flipped = sum(len(set(x) - set(y)) for x, y in zip(a.tolist(), e.tolist(), strict=True))
    share = flipped / max(1, e.numel())
    return Difference(float(flipped), share / max_flipped, tolerance)


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance | None = None) -> None:
    """Fail with the numbers unless two tensors agree.

    Raises:
        AssertionError: naming the largest difference and what is accepted.
    """
    tolerance = tolerance or DEFAULT_TOLERANCES.get(expected.dtype, EXACT)
    found = compare(actual, expected, tolerance)
    if not found.ok:
        raise AssertionError(describe(found))


def describe(found: Difference) -> str:
    """Say in words what differs."""
    if found.problem is not None:
        return found.problem
    t = found.tolerance
    return (
        f"differs by up to {found.max_abs:.3g}, {found.worst:.3g} times what is accepted "
        f"(atol {t.atol:g}, rtol {t.rtol:g}: {t.reason})"
    )


def _problem(tolerance: Tolerance, text: str) -> Difference:
    nan = float("nan")
    return Difference(nan, float("inf"), tolerance, text, nan, nan)
