"""What is said of a machine's CUDA software: every refusal in one line, with the way out."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

backends = importlib.import_module("v4sdk_cuda.backend")
doctor = importlib.import_module("v4sdk_cuda.doctor")
CudaBackend = importlib.import_module("v4sdk_cuda.backend").CudaBackend
Target = importlib.import_module("v4sdk_cuda.target").Target
Choice = importlib.import_module("v4sdk_cuda.tiers").Choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch built with CUDA, a driver and a GPU, each of which a test may take away."""
    about = SimpleNamespace(driver="580.95.05", available=True, capability=(9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: about.available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: about.capability)
    monkeypatch.setattr(doctor, "driver_version", lambda: about.driver)
    monkeypatch.setattr(doctor, "c_compiler", lambda: "/usr/bin/gcc")
    return about


def test_a_machine_with_everything_is_usable(gpu: SimpleNamespace) -> None:
    assert CudaBackend().unavailable() is None
    assert all(row.ok for row in doctor.machine_rows(None))


def test_no_driver(gpu: SimpleNamespace) -> None:
    gpu.available, gpu.driver = False, None
    assert CudaBackend().unavailable() == "there is no NVIDIA driver, or none that answers"
    row = next(row for row in doctor.machine_rows("x") if row.subject == "driver")
    assert not row.ok
    assert "container" in (row.hint or "")


def test_no_c_compiler(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "c_compiler", lambda: None)
    monkeypatch.delenv("CC", raising=False)
    row = next(row for row in doctor.machine_rows(None) if row.subject == "C compiler")
    assert not row.ok
    assert "install gcc or clang" in (row.hint or "")
    monkeypatch.setenv("CC", "mine")
    assert doctor.compiler_row().finding == "CC is `mine`, which is no program"


def test_an_interpreted_run_needs_no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "C compiler" not in [row.subject for row in doctor.machine_rows(None)]


def test_a_driver_that_is_too_old(gpu: SimpleNamespace) -> None:
    gpu.available, gpu.driver = False, "470.57.02"
    found = CudaBackend().unavailable()
    assert found == (
        "NVIDIA driver 470.57.02 serves no GPU to this torch, which was built for CUDA 13.0: it may be too old"
    )


@pytest.mark.parametrize("value", ["", "-1", " "])
def test_gpus_that_are_hidden(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    gpu.available = False
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert "no GPU is to be seen" in str(CudaBackend().unavailable())


def test_a_gpu_without_bfloat16(gpu: SimpleNamespace) -> None:
    gpu.capability = (7, 5)
    assert CudaBackend().unavailable() == "the GPU has compute capability 7.5, expected 8.0 or newer"


@pytest.mark.parametrize(
    ("version", "problem"), [("3.2.0", "Triton 3.2.0 is too old, expected 3.6 or newer"), ("3.10.1", None)]
)
def test_the_version_of_triton(monkeypatch: pytest.MonkeyPatch, version: str, problem: str | None) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert doctor.triton_problem() == problem


def test_without_triton_every_op_runs_its_reference_and_that_is_said(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "triton_problem", lambda: "Triton is not installed")
    with caplog.at_level(logging.WARNING, "v4sdk"):
        assert CudaBackend().kernels() == ()
    assert "Triton is not installed: every op runs its reference; pip install 'v4sdk[cuda]'" in caplog.text


def test_a_chip_that_nobody_described_is_slow_not_refused(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    row = doctor.chip_row(Target(110, 100, 99 << 10, "device"))
    assert row.ok
    assert row.finding == "Card, compute capability 11.0, not described here: portable tiles, slow but right"


def test_tiers_are_told_with_their_reasons() -> None:
    choices = (
        Choice("sparse_attn", "triton", "Triton", ("sgl-flash-mla: not installed",)),
        Choice("linear", "vendor", "lib 1.0"),
        Choice("feed", "torch", "its parts or its reference", ("no kernel of ours",)),
    )
    rows: Any = [(row.subject, row.finding) for row in doctor.tier_rows(choices, Target(90, 1, 1, "device"))]
    assert rows == [
        ("1 ops by lib 1.0", "linear"),
        ("1 ops by Triton", "sparse_attn"),
        ("1 ops by its parts or its reference", "feed"),
        ("sparse_attn not by", "sgl-flash-mla: not installed"),
        ("evidence", "device"),
    ]
