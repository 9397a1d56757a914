"""The kernels in Triton's interpreter, through the functions that call them, against the model's references and written formulas.

Outputs start as NaN. Whether a kernel is interpreted is settled when its module is imported, so all of them are imported here,
under the variable that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk.backend import Backend, EngineConfig, Kernel, kernel
from v4sdk.config import ModelConfig
from v4sdk.errors import ShapeError
from v4sdk.loading import bundled_folder
from v4sdk.numerics import FAST
from v4sdk.ops import OPS
from v4sdk.ops.op import Case
from v4sdk.ops.rope import rope
from v4sdk.testing.conformance import DEFAULT_SCALES, judge_case

INTERPRET = "TRITON_INTERPRET"
FAMILIES = ("910B", "910C", "950")
KERNELS = ("rope", "mixes", "swiglu")
# one step of each: the interpreter truncates where a chip rounds
STEP = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LIMIT = 10.0
# NumPy, which computes in place of a chip, warns of what a chip does in silence
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def _reason() -> str | None:
    """Import the kernels as the interpreter's; the reason why that cannot be done in this process, if so."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it is a test dependency on Linux"
    if torch.cuda.is_available() and os.environ.get(INTERPRET, "0") in ("", "0"):
        return f"Triton compiles in this process, for the GPU that is here; set {INTERPRET}=1 to interpret instead"
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    try:
        modules = [importlib.import_module(f"v4sdk_ascend.kernels.{name}") for name in KERNELS]
        from triton import language
        from triton.runtime.jit import JITFunction
    finally:
        if before is None:
            del os.environ[INTERPRET]
        else:
            os.environ[INTERPRET] = before
    compiled = [
        v.__name__ for m in (language, *modules) for v in vars(m).values() if isinstance(v, JITFunction)
    ]
    return (
        f"{compiled[0]} is not interpreted: Triton was imported before this file could say so"
        if compiled
        else None
    )


CANNOT_INTERPRET = _reason()
launch = importlib.import_module("v4sdk_ascend.kernels.launch")
tiles = importlib.import_module("v4sdk_ascend.kernels.tiles")


# 910C's tile is 910B's
TILED = ("910B", "950")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if CANNOT_INTERPRET is not None:
        # Triton missing, or wanted for a GPU, is a choice; the rest is a run that would pass without having looked
        (pytest.fail if "is not interpreted" in CANNOT_INTERPRET else pytest.skip)(CANNOT_INTERPRET)
    monkeypatch.setenv(INTERPRET, "1")


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for the same shape."""
    random = torch.Generator().manual_seed(sum((i + 1) * n for i, n in enumerate(shape)))
    return (torch.randn(*shape, generator=random) * scale).to(dtype)


def table(tokens: int, r: int) -> Tensor:
    """Cosines and sines of some angles."""
    angle = draw(tokens, r // 2, scale=3.0)
    return torch.cat((angle.cos(), angle.sin()), -1)


# --- partial interleaved RoPE


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", list(STEP), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "r"),
    [((2, 64, 512), 64), ((5, 3, 20), 6), ((63, 17, 10), 10), ((3, 1, 512), 64), ((7, 16), 8), ((0, 4, 16), 8), ((2, 0, 8), 4)],
    ids=str,
)  # fmt: skip
def test_rope_turns_the_last_dims_alone(
    shape: tuple[int, ...], r: int, dtype: torch.dtype, inverse: bool
) -> None:
    x, turns = draw(*shape, dtype=dtype), table(shape[0], r)
    before = x.clone()
    for family in TILED:
        found = launch.rope(family, x, turns, inverse)
        assert torch.equal(x, before), "the argument is unchanged"
        assert torch.equal(found[..., :-r], x[..., :-r])
        torch.testing.assert_close(found, rope(x, turns, inverse), rtol=STEP[dtype], atol=STEP[dtype])


@pytest.mark.usefixtures("poisoned")
def test_rope_in_place_leaves_what_lies_around_a_view() -> None:
    whole, turns = draw(9, 5, 48), table(9, 8)
    before, view = whole.clone(), whole[1:8, 1:4, 8:40]
    expected = rope(view.clone(), turns[1:8])
    assert launch.rotate("910B", view, turns[1:8]) is view
    torch.testing.assert_close(view, expected, rtol=1e-6, atol=1e-6)
    whole[1:8, 1:4, 8:40] = before[1:8, 1:4, 8:40]
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    ("x", "turns"),
    [
        (torch.zeros(2, 3, 8), torch.zeros(3, 4)),
        (torch.zeros(2, 3, 8), torch.zeros(2, 10)),
        (torch.zeros(2, 8, 3).transpose(1, 2), torch.zeros(2, 4)),
        (torch.zeros(2, 3, 8, dtype=torch.float64), torch.zeros(2, 4)),
    ],
    ids=["tokens", "too many dims", "layout", "dtype"],
)
def test_rope_refuses_what_it_cannot_turn(x: Tensor, turns: Tensor) -> None:
    with pytest.raises(ShapeError, match="rope is given"):
        launch.rotate("910B", x, turns)


# --- the mixes of the hyper-connections


class _OneKernel(Backend):
    """The CPU with a single kernel, for the public conformance of one op."""

    name = "one-kernel"

    def __init__(self, family: str) -> None:
        self._family = family

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> tuple[Kernel[Any, Any], ...]:
        rows = [row for row in launch.PROVIDERS if self._family in row.chips]
        return tuple(
            kernel(OPS[row.op], row.function, lambda c, e, row=row: row.unless(c, e, self._family))  # type: ignore[misc]
            for row in rows
        )


def hc_pre_cases() -> Iterator[Case]:
    """The shared cases, chip by chip in turn."""
    inputs = OPS["hc_pre"].inputs
    assert inputs is not None
    yield from (case for case in inputs() if case.scale in DEFAULT_SCALES)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(FAMILIES[i % 3], case, id=f"{FAMILIES[i % 3]}/{case.label}")
        for i, case in enumerate(hc_pre_cases())
    ],
)
def test_hc_pre_passes_conformance(family: str, case: Case) -> None:
    backend, config = _OneKernel(family), ModelConfig.from_folder(bundled_folder())
    result = judge_case(OPS["hc_pre"], case, backend, config)
    assert (result.status, result.how) == ("passed", "kernel"), result


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("streams", [2, 3, 4])
@pytest.mark.parametrize("family", TILED)
def test_mixes_of_more_tokens_than_one_tile(family: str, streams: int) -> None:
    tokens = tiles.TILES[family].mix_tokens * 2 + 7
    x, count = draw(tokens, streams, 24), (2 + streams) * streams
    args = (x, draw(count, streams * 24, scale=0.2), draw(count), draw(3), 20, 1e-6, 1e-6)
    found = launch.hc_pre(family, *args)
    for got, wanted in zip(found, OPS["hc_pre"](*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)
    for axis in (1, 2):
        torch.testing.assert_close(found[2].sum(axis), torch.ones(tokens, streams), rtol=0.0, atol=2e-3)


# --- clamped SwiGLU, quantised


def gated(gate: Tensor, up: Tensor, weights: Tensor | None, limit: float) -> Tensor:
    """The formula, in float64."""
    g, v = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    return g / (1 + torch.exp(-g)) * v * (1.0 if weights is None else weights.double()[:, None])


def misses(codes: Tensor, scales: Tensor, a: Tensor) -> Tensor:
    """How far each row's values lie from what the codes say, in scales; at most a half if the row is right."""
    step = a.abs().amax(-1) / 127
    off = (scales.double() - step).abs() / step.clamp(min=1e-30)
    assert bool((off[step > 0] <= 1e-5).all()), "scale is the row's largest value by 127"
    assert bool((scales[step == 0] == 0).all())
    error = (codes.double() * scales.double()[:, None] - a).abs().amax(-1)
    return error / step.clamp(min=1e-30)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("dtype", list(STEP), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (45, 130), (2, 2048), (3, 4097), (2, 9000)])
def test_swiglu_codes_are_the_nearest(rows: int, width: int, dtype: torch.dtype, weighted: bool) -> None:
    both = draw(rows, 2 * width, dtype=dtype, scale=8.0)
    both[rows // 2] = 0 if rows > 1 else both[rows // 2]
    gate, up = both[:, :width], both[:, width:]
    weights = draw(rows).abs() if weighted else None
    for family in TILED:
        codes, scales = launch.swiglu_quant(family, gate, up, weights, LIMIT)
        assert codes.dtype == torch.int8
        assert scales.dtype == torch.float32
        assert float(misses(codes, scales, gated(gate, up, weights, LIMIT)).max()) <= 0.501
        assert not codes[rows // 2].any() or rows == 1
    # the other model's clamp is not taken for right
    if width > 100:
        other = gated(gate, up, weights, 7.0)
        with pytest.raises(AssertionError, match="largest value"):
            misses(codes, scales, other)


@pytest.mark.usefixtures("poisoned")
def test_swiglu_rounds_ties_to_even() -> None:
    # silu(40) is 40 in float32: values of 127, 0.5, 1.5, 2.5, -0.5 and -3.5 steps
    up = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -3.5]])
    codes, scales = launch.swiglu_quant("910B", torch.full_like(up, 40.0), up, torch.tensor([1 / 40]), 1000.0)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -4]]
    torch.testing.assert_close(scales, torch.ones(1))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_swiglu_of_nothing(shape: tuple[int, int]) -> None:
    codes, _ = launch.swiglu_quant("950", torch.zeros(shape), torch.zeros(shape), None, LIMIT)
    assert tuple(codes.shape) == shape


def test_swiglu_refuses_halves_that_differ() -> None:
    with pytest.raises(ShapeError, match="swiglu is given"):
        launch.swiglu_quant("910B", torch.zeros(2, 4), torch.zeros(2, 8)[:, ::2], None, LIMIT)
    with pytest.raises(ShapeError, match="weights"):
        launch.swiglu_quant("910B", torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3), LIMIT)


# --- when they may serve


def test_kernels_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config, row = ModelConfig.from_folder(bundled_folder()), launch.PROVIDERS[0]
    assert row.unless(config, EngineConfig(FAST), row.function.args[0]) is None
    monkeypatch.delenv(INTERPRET)
    if importlib.util.find_spec("triton.backends.ascend") is None:
        assert "triton-ascend is not installed" in row.unless(
            config, EngineConfig(FAST), row.function.args[0]
        )


def test_every_family_has_a_tile_and_a_row() -> None:
    assert set(tiles.TILES) == set(FAMILIES)
    assert tiles.TILES["910C"] == tiles.TILES["910B"], "else it is tested by itself: see TILED"
    assert {family for row in launch.PROVIDERS for family in row.chips} == set(FAMILIES)
    assert all(
        isinstance(row.function, partial) and row.function.args == tuple(row.chips)
        for row in launch.PROVIDERS
    )
