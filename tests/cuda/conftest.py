"""Kernels in Triton's interpreter, inside the process of all other tests, which must not see that.

Whether a kernel is interpreted is settled when its module is imported, and again asked while it runs: so all of them are imported
here, under the variable, and the variable is set around each test of this folder and nowhere else. With a GPU at hand and
TRITON_INTERPRET not set, the same tests run on the device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRET = "TRITON_INTERPRET"
ARCH = "V4SDK_CUDA_ARCH"
ON_DEVICE = torch.cuda.is_available() and os.environ.get(INTERPRET, "0") in ("", "0")


def _import_kernels() -> str | None:
    """Import every kernel as the interpreter's; the reason why that cannot be done in this process, if so."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it is a test dependency on Linux"
    kernels = importlib.import_module("v4sdk_cuda.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"v4sdk_cuda.kernels.{module.name}")
    importlib.import_module("v4sdk_cuda.proof")
    from triton import language
    from triton.runtime.jit import JITFunction

    mine = [
        m for name, m in sys.modules.items() if name.startswith(("v4sdk_cuda.kernels.", "v4sdk_cuda.proof"))
    ]
    compiled = [v.__name__ for m in (language, *mine) for v in vars(m).values() if isinstance(v, JITFunction)]
    if compiled:
        return (
            f"{compiled[0]} is not interpreted: Triton was imported before tests/cuda/conftest.py could say so; "
            f"set {INTERPRET}=1 for the whole run, or run tests/cuda by itself"
        )
    return None


def _reason() -> str | None:
    before = os.environ.get(INTERPRET)
    os.environ[INTERPRET] = "1"
    try:
        return _import_kernels()
    finally:
        if before is None:
            del os.environ[INTERPRET]
        else:
            os.environ[INTERPRET] = before


# tests of processes of their own
NOT_INTERPRETED = ("test_compiled.py",)
CANNOT_INTERPRET = None if ON_DEVICE else _reason()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU gives infinity and says nothing; NumPy, which computes in its place, may do so as well."""
    quiet = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(quiet)


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variable for one test, unless tests run on a device."""
    if ON_DEVICE or request.path.name in NOT_INTERPRETED:
        return
    if CANNOT_INTERPRET is not None:
        # Triton missing is a choice; the rest is a run that would pass without having looked
        (pytest.skip if "not installed" in CANNOT_INTERPRET else pytest.fail)(CANNOT_INTERPRET)
    monkeypatch.setenv(INTERPRET, "1")
    monkeypatch.delenv(ARCH, raising=False)


@pytest.fixture
def cuda() -> Any:
    """The backend, a fresh one: the plugin's own belongs to the tests of this process that are not interpreted."""
    return importlib.import_module("v4sdk_cuda.backend").CudaBackend()


@pytest.fixture
def gpu() -> None:
    """For tests that only a device can pass."""
    if not ON_DEVICE:
        pytest.skip("needs a GPU; ends where torch finds one and TRITON_INTERPRET is not set")


@pytest.fixture
def interpreter() -> Any:
    """The module that makes the interpreter honest."""
    if ON_DEVICE:
        pytest.skip(
            "of the interpreter, and a GPU is here; ends with TRITON_INTERPRET=1, or where there is no GPU"
        )
    return importlib.import_module("v4sdk_cuda.interpreter")
