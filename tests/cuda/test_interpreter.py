"""The interpreter that lane B believes: it rounds as a GPU does, checks every address, and says when it cannot."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from v4sdk.numerics import EXACT
from v4sdk.ops import OPS
from v4sdk.ops.inputs import DECODE, TINY, Draw, embed

triton = pytest.importorskip("triton", reason="Triton is not installed; it is a test dependency on Linux")
tl = importlib.import_module("triton.language")

# what is replaced in Triton, all of it private
BUILDER = ("cast_impl", "binary_op", "unary_op", "ternary_op", "create_dot", "create_fma", "create_masked_load",
           "create_masked_store", "create_atomic_rmw")  # fmt: skip
EXECUTOR = ("_init_args_hst", "_restore_args_dev")
REDUCE = ("sum", "min_max")
MODULE = ("_convert_float", "_get_np_dtype", "_patch_lang", "InterpretedFunction")


@pytest.fixture
def fresh(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as before its first use; whatever a test makes of Triton is put back."""
    interpreter.install()
    private = importlib.import_module("triton.runtime.interpreter")
    owners = (
        (private.InterpreterBuilder, BUILDER),
        (private.GridExecutor, EXECUTOR),
        (private.ReduceOps, REDUCE),
        (private.InterpretedFunction, ("__call__",)),
    )
    for owner, names in (*owners, (private, MODULE)):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(interpreter, "_installed", False)
    return interpreter


def test_it_computes_what_torch_does(interpreter: Any) -> None:
    interpreter.install()
    assert importlib.import_module("v4sdk_cuda.proof").differences() == []


def test_the_proof_sees_what_triton_does_by_itself() -> None:
    """Without the replacement every number format is wrong: the self-test would notice if it stopped being applied."""
    code = "from v4sdk_cuda.proof import differences; print('; '.join(differences()))"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    for wrong in ("rounding to torch.bfloat16", "rounding to torch.float8_e4m3fn", "values of torch.float8_e4m3fn",
                  "sums of bfloat16", "products of bfloat16"):  # fmt: skip
        assert wrong in said


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *(("InterpreterBuilder", name) for name in BUILDER),
        *(("GridExecutor", name) for name in EXECUTOR),
        *(("ReduceOps", name) for name in REDUCE),
        *((None, name) for name in MODULE),
    ],
)
def test_a_private_name_that_is_gone_is_said(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, owner: str | None, name: str
) -> None:
    private = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.delattr(getattr(private, owner) if owner else private, name)
    with pytest.raises(
        fresh.Unreliable, match=f"another interpreter than those this was written for.*{name}"
    ):
        fresh.install()


def truncating(original: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion that cuts where it should round, as Triton's own does."""

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return original(values, source, target, rounding)
        return (values.view("uint32") >> 16).astype("uint16")

    return convert


def test_arithmetic_that_is_wrong_is_said(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fresh._converter
    monkeypatch.setattr(fresh, "_converter", lambda private: truncating(right(private)))
    with pytest.raises(fresh.Unreliable, match="wrong about rounding to torch.bfloat16"):
        fresh.install()


@pytest.mark.parametrize(
    ("name", "said"), [("create_dot", "products of bfloat16"), ("binary_op", "sums of bfloat16")]
)
def test_a_replacement_that_does_nothing_is_said(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    own = next(
        c.cell_contents
        for c in getattr(builder, name).__closure__
        if getattr(c.cell_contents, "__name__", "") == name
    )
    monkeypatch.setattr(fresh, "_replace_arithmetic", lambda private: setattr(builder, name, own))
    with pytest.raises(fresh.Unreliable, match=said):
        fresh.install()


def test_kernels_imported_for_a_device_are_said(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(fresh.Unreliable, match="not interpreted in this process"):
        fresh.install()


def copied(x, y, index, n, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """y[i] = x[index[i]], rows of `width` values; the index is believed."""
    i, k = tl.program_id(0), tl.arange(0, BLOCK)
    row = tl.load(index + i)
    tl.store(y + i * width + k, tl.load(x + row * width + k, mask=k < width), mask=k < width)


def run_copied(index: list[int], x: torch.Tensor, y: torch.Tensor, width: int = 5) -> None:
    at = torch.tensor(index, dtype=torch.int64)
    triton.jit(copied)[(len(index),)](x, y, at, len(index), width, BLOCK=8)


def test_lanes_that_are_masked_may_point_anywhere(interpreter: Any) -> None:
    interpreter.install()
    x, y = torch.arange(20.0).view(4, 5), torch.empty(2, 5)
    run_copied([3, 0], x, y)
    assert torch.equal(y, x[[3, 0]])


@pytest.mark.parametrize("index", [4, -1, 1 << 40])
def test_a_load_outside_of_every_tensor_is_caught(interpreter: Any, index: int) -> None:
    interpreter.install()
    with pytest.raises(Exception, match="load: 5 of 5 lanes lie outside every tensor argument") as caught:
        run_copied([0, index], torch.zeros(4, 5), torch.empty(2, 5))
    assert "OutOfBounds" in repr(caught.value) or isinstance(caught.value, interpreter.OutOfBounds)


def test_a_store_outside_of_every_tensor_is_caught(interpreter: Any) -> None:
    interpreter.install()
    with pytest.raises(Exception, match="store: 5 of 5 lanes lie outside every tensor argument"):
        run_copied([0, 1], torch.zeros(4, 5), torch.empty(1, 5))


def test_the_gaps_between_the_rows_of_a_view_are_nobodys(interpreter: Any) -> None:
    interpreter.install()
    wide = torch.zeros(4, 9)
    # rows of five values, nine apart: addressing them as if they were dense runs into the gap
    with pytest.raises(Exception, match="lanes lie outside every tensor argument"):
        run_copied([0, 1], wide[:, :5], torch.empty(2, 5))


def test_a_token_that_the_table_does_not_have_is_caught_in_a_real_kernel(cuda: Any, interpreter: Any) -> None:
    functions = {row.op.name: row.function for row in cuda.kernels()}
    args = embed(Draw("outside", torch.device("cpu")), TINY, EXACT, DECODE)
    functions["embed"](**args)
    args["token_ids"][1] = TINY.vocab + (1 << 24)
    with pytest.raises(Exception, match="load: .* lanes lie outside every tensor argument"):
        functions["embed"](**args)


def test_a_reduction_of_a_narrow_type_is_refused(interpreter: Any) -> None:
    interpreter.install()

    def summed(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))

    with pytest.raises(Exception, match="widen to float32 first"):
        triton.jit(summed)[(1,)](torch.ones(8, dtype=torch.bfloat16), torch.empty(1), BLOCK=8)


def test_every_op_is_known_by_its_name(cuda: Any) -> None:
    names = [row.op.name for row in cuda.kernels()]
    assert len(set(names)) == len(names)
    assert set(names) <= set(OPS)
