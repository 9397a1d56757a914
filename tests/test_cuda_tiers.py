"""Who serves an op: vendors only after their numbers were right, every refusal with its reason, overrides checked."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from vendor_libraries import flash_mla_sparse_fwd, install

from v4sdk import ops as o
from v4sdk.backend import EngineConfig, bind, kernel
from v4sdk.config import ModelConfig
from v4sdk.errors import V4Error
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS

tiers = importlib.import_module("v4sdk_cuda.tiers")
Launch = importlib.import_module("v4sdk_cuda.launch").Launch
Target = importlib.import_module("v4sdk_cuda.target").Target
described = importlib.import_module("v4sdk_cuda.target").described
flash_mla = importlib.import_module("v4sdk_cuda.vendor.flash_mla")

CPU = torch.device("cpu")


def launch(arch: int = 90, evidence: Any = "device") -> Launch:
    target: Target = described(arch, evidence)
    return Launch(target, CPU)


def rows() -> list[Any]:
    """Rows whose functions are the references under the signature of a kernel."""

    def of(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return OPS[name](*args, **kwargs)

        run.__signature__ = OPS[name].signature  # type: ignore[attr-defined]
        return run

    return [kernel(OPS[name], of(name)) for name in ("sparse_attn", "rms_norm")]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return install(monkeypatch, "sgl-flash-mla")


def of(choices: tuple[tiers.Choice, ...], op: str) -> tiers.Choice:
    return next(choice for choice in choices if choice.op == op)


@pytest.mark.usefixtures("library")
def test_a_library_whose_numbers_are_right_serves_its_op() -> None:
    kept, choices = tiers.choose(launch(), rows())
    assert of(choices, "sparse_attn") == tiers.Choice("sparse_attn", "vendor", "sgl-flash-mla 1.0.0")
    assert of(choices, "rms_norm").tier == "triton"
    assert of(choices, "linear").tier == "torch"
    assert len(kept) == 2


def test_a_library_whose_numbers_are_wrong_does_not(library: ModuleType) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, *rest = flash_mla_sparse_fwd(*args, **kwargs)
        return out * 1.05, *rest

    library.flash_mla_sparse_fwd = wrong  # type: ignore[attr-defined]
    choice = of(tiers.choose(launch(), rows())[1], "sparse_attn")
    assert choice.tier == "triton"
    assert "its numbers differ" in choice.passed_over[0]


def test_a_library_that_fails_is_passed_over_in_words(library: ModuleType) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device\nmore lines")

    library.flash_mla_sparse_fwd = broken  # type: ignore[attr-defined]
    choice = of(tiers.choose(launch(), rows())[1], "sparse_attn")
    assert choice.passed_over == (
        "sgl-flash-mla: RuntimeError: no kernel image is available for execution on the device",
    )


def test_a_library_built_from_source_serves_without_a_version(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert of(tiers.choose(launch(), rows())[1], "sparse_attn").by == "flash_mla from source"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (launch(), "not installed (pip install --no-deps sgl-flash-mla)"),
        (launch(120), "has no kernels for compute capability 12.0"),
        (launch(90, "emulated"), "needs a GPU"),
    ],
)
def test_a_library_that_cannot_be_used_says_why(where: Launch, reason: str) -> None:
    choice = of(tiers.choose(where, rows())[1], "sparse_attn")
    assert choice.tier == "triton"
    assert reason in choice.passed_over[0]


def test_the_environment_decides_per_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiers.TIERS_VARIABLE, "rms_norm=torch, sparse_attn=triton")
    kept, choices = tiers.choose(launch(), rows())
    assert [row.op.name for row in kept] == ["sparse_attn"]
    assert of(choices, "rms_norm").passed_over == ("V4SDK_CUDA_TIERS asks for it",)
    assert of(choices, "sparse_attn").passed_over == ()
    monkeypatch.setenv(tiers.TIERS_VARIABLE, "all=torch")
    assert tiers.choose(launch(), rows())[0] == ()


@pytest.mark.parametrize("words", ["rms_norm", "rms_norm=fast", "nothing=torch"])
def test_an_override_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv(tiers.TIERS_VARIABLE, words)
    with pytest.raises(V4Error, match="expected OP=TIER"):
        tiers.wanted()


def test_a_vendor_is_refused_for_an_op_that_no_library_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiers.TIERS_VARIABLE, "rms_norm=vendor")
    with pytest.raises(
        V4Error, match="no vendor's library has a function for `rms_norm`, expected one of sparse_attn"
    ) as caught:
        tiers.choose(launch(), rows())
    assert "rms_norm=triton" in (caught.value.hint or "")


@pytest.mark.parametrize("words", ["sparse_attn=vendor", "all=vendor"])
def test_a_vendor_that_was_asked_for_and_does_not_serve_stands_in_the_way(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv(tiers.TIERS_VARIABLE, words)
    choices = tiers.choose(launch(), rows())[1]
    assert of(choices, "rms_norm").asked is None
    told = importlib.import_module("v4sdk_cuda.doctor").tier_rows(choices, launch().target)
    bad = [row for row in told if not row.ok]
    assert [row.subject for row in bad] == ["sparse_attn not by"]
    assert "not installed" in bad[0].finding
    assert "sparse_attn=vendor" in (bad[0].hint or "")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of a GPU, whose own kernels are the references."""
    module, here = importlib.import_module("v4sdk_cuda.backend"), launch()
    monkeypatch.setattr(module, "table", lambda launch: rows())
    monkeypatch.setattr(module, "triton_problem", lambda: None)
    made = module.CudaBackend()
    vars(made).update(launch=here, target=here.target)
    return made


@pytest.mark.usefixtures("library")
def test_a_library_is_tried_once_however_often_a_model_is_bound(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, tried = importlib.import_module("v4sdk_cuda.probe"), []

    def difference(op: Any, *rest: Any) -> None:
        tried.append(op.name)

    monkeypatch.setattr(probe, "difference", difference)
    config = ModelConfig.from_folder(bundled_folder())
    for _ in range(2):
        bind(backend, config, EngineConfig())
    assert tried == ["sparse_attn"]


def test_ours_is_there_to_be_compared_with_the_library_that_serves(backend: Any, library: ModuleType) -> None:
    assert list(backend.variants("sparse_attn")) == ["ours"]
    assert backend.declined("sparse_attn") == []
    assert list(backend.variants("rms_norm")) == []
    assert list(backend.declined("rms_norm")) == []


def test_what_does_not_serve_has_a_reason_and_nothing_to_be_compared(backend: Any) -> None:
    assert list(backend.variants("sparse_attn")) == []
    assert "not installed" in backend.declined("sparse_attn")[0]


@pytest.mark.usefixtures("library")
def test_the_adapter_takes_what_the_library_has_kernels_for_and_no_more() -> None:
    asked = []

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(args[0].shape)
        return o.sparse_attn(*args, **kwargs)

    adapter = flash_mla.FlashMla(ours).sparse_attn
    inputs = OPS["sparse_attn"].inputs
    assert inputs is not None
    for case in inputs():
        if case.scale == "tiny" and case.label.endswith(("chunk-fast", "decode-fast")):
            args = case.make(CPU)
            assert torch.equal(adapter(**args), o.sparse_attn(**args))
    # heads of 128 columns are none of the library's
    assert len(asked) == 6
