"""What Triton raises where something is missing: one line and a way out, and everything else as it was."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it is a test dependency on Linux")

failures = importlib.import_module("v4sdk_cuda.failures")
launches = importlib.import_module("v4sdk_cuda.launch")
described = importlib.import_module("v4sdk_cuda.target").described
of_triton = importlib.import_module("triton.runtime.errors")
of_compiler = importlib.import_module("triton.compiler.errors")


class Kernel:
    """A kernel whose start ends in an exception."""

    fn = SimpleNamespace(__name__="norm_kernel")

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            raise self._error

        return run


def start(error: Exception) -> None:
    launches.Launch(described(90, "device"), torch.device("cpu"))(Kernel(error), (1,), warps=4, stages=1)


PTXAS = "`ptxas` failed with error code 255\n`ptxas` stderr:\nptxas fatal   : Value 'sm_999' is not defined\nRepro command: ptxas"
NO_LIBRARY = 'libcuda.so cannot found!\nPlease make sure GPU is set up and then run "/sbin/ldconfig"'


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
            "Triton finds no C compiler", "install gcc or clang",
        ),
        (
            of_triton.OutOfResources(245_760, 101_376, "shared memory"),
            "it needs 245,760 of shared memory, the chip has 101,376", "V4SDK_CUDA_TIERS=OP=torch",
        ),
        (
            of_triton.PTXASError(PTXAS),
            "its assembler refuses it: ptxas fatal   : Value 'sm_999' is not defined", "TRITON_PTXAS_PATH",
        ),
        (
            of_compiler.CompilationError("def k():\n  pass\n", ast.parse("pass").body[0], "no such type\nmore"),
            "Triton cannot compile it: no such type", "v4sdk doctor",
        ),
        (AssertionError(NO_LIBRARY), "Triton does not find libcuda.so.1", "TRITON_LIBCUDA_PATH"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "does not find libcuda", "ldconfig"),
        (FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"), "does not find libcuda", "TRITON_LIBCUDA_PATH"),
        (CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "the C compiler `/usr/bin/gcc` ended with 1", "python3-dev"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_triton_raises_is_one_line_and_a_way_out(error: Exception, said: str, hint: str) -> None:
    with pytest.raises(failures.KernelFailed) as caught:
        start(error)
    assert caught.value.message.startswith("kernel `norm_kernel` cannot be started: ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_compiler_that_is_no_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(failures.KernelFailed, match="CC is `no-such-compiler`, which is no program"):
        start(FileNotFoundError(2, "No such file or directory", "no-such-compiler"))


@pytest.mark.parametrize(
    "error",
    [ValueError("shape"), RuntimeError("stream"), AssertionError("x"), of_triton.InterpreterError("y")],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)):
        start(error)


@pytest.mark.parametrize(
    ("programs", "given", "found"),
    [
        (("gcc", "clang"), None, "gcc"),
        (("clang",), None, "clang"),
        (("cc", "c++"), None, None),
        (("gcc", "mine"), "mine", "mine"),
        (("gcc",), "mine", None),
    ],
)
def test_the_c_compiler_is_the_one_that_triton_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: tuple[str, ...], given: str | None, found: str | None
) -> None:  # fmt: skip
    for name in programs:
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if given is not None:
        monkeypatch.setenv("CC", given)
    assert failures.c_compiler() == (str(tmp_path / found) if found else None)
    of_triton_too = importlib.import_module("triton.runtime.build")._find_compiler.__wrapped__
    if found:
        assert Path(of_triton_too("c")).name == found
