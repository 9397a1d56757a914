"""Every kernel through its real wrapper, in the interpreter or on a GPU, against the references.

Outputs start as NaN, every address is checked, arguments must come back unchanged, and results also arrive in `out=`. A third of
the shared cases runs by default: each layout in each geometry, each numerics in each of them; the others are `slow`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS
from v4sdk.ops.op import Case
from v4sdk.testing.conformance import DEFAULT_SCALES, judge_case

LAYOUTS = ("decode", "first", "prefill", "chunk")
NUMERICS = ("exact", "reference", "fast")
# FP8 is bytes on a chip without that type: the ops that read weights or rows in it, one decode step and one prompt each
OTHER_ARCH = "80"
ON_OTHER_ARCH = ("tiny-decode-fast", "odd-chunk-reference")
READS_FP8 = ("linear", "q_project", "kv_project_store", "index_query", "sparse_attn", "grouped_out", "routed_experts",
             "shared_expert", "compress")  # fmt: skip


def kernels() -> list[str]:
    """The ops that have a kernel, by the backend's table."""
    pytest.importorskip("triton", reason="Triton is not installed; it is a test dependency on Linux")
    launch = importlib.import_module("v4sdk_cuda.launch").Launch
    target = importlib.import_module("v4sdk_cuda.target").described(90, "emulated")
    rows = importlib.import_module("v4sdk_cuda.backend").table(launch(target, torch.device("cpu")))
    return [row.op.name for row in rows]


def cases(name: str) -> Iterator[Case]:
    """The shared cases of one op."""
    given = OPS[name].inputs
    yield from (case for case in (given() if given else ()) if case.scale in DEFAULT_SCALES)


def is_chosen(case: Case) -> bool:
    """Whether a case runs by default: a Latin square over layouts and numerics, turned by one for odd sizes."""
    words = case.label.split("-")
    layout = next((i for i, word in enumerate(LAYOUTS) if word in words), None)
    numerics = next((i for i, word in enumerate(NUMERICS) if word in words), None)
    if layout is None or numerics is None or case.scale == "edge":
        return True
    if "mapped" in words and "tiny-decode" not in case.label:
        # experts come stacked to a device, however a checkpoint was mapped
        return False
    if "float" in words or "wide" in words:
        return layout in (0, 3)
    return (layout + numerics + ("odd" in words)) % 3 == 0


def parameters() -> list[object]:
    """Op and case, those beyond the default marked slow."""
    return [
        pytest.param(
            name, case, id=f"{name}/{case.label}", marks=() if is_chosen(case) else (pytest.mark.slow,)
        )
        for name in kernels()
        for case in cases(name)
    ]


def other_parameters() -> list[object]:
    """Op and case for the chip without FP8."""
    return [
        pytest.param(name, case, id=f"{name}/{case.label}")
        for name in kernels() if name in READS_FP8
        for case in cases(name) if case.label.endswith(ON_OTHER_ARCH) and "mapped" not in case.label
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """What a kernel's `unless` is asked about."""
    return ModelConfig.from_folder(bundled_folder())


def judge(name: str, case: Case, cuda: object, config: ModelConfig) -> None:
    """Fail with what differs."""
    found = judge_case(OPS[name], case, cuda, config)  # type: ignore[arg-type]
    assert found.how == "kernel", found.detail
    assert found.status in ("passed", "known gap"), found.detail


@pytest.mark.parametrize(("name", "case"), parameters())
def test_a_kernel_computes_what_its_reference_does(
    name: str, case: Case, cuda: object, config: ModelConfig
) -> None:
    judge(name, case, cuda, config)


@pytest.mark.parametrize(("name", "case"), other_parameters())
def test_a_chip_without_fp8_computes_the_same(
    name: str, case: Case, cuda: object, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V4SDK_CUDA_ARCH", OTHER_ARCH)
    judge(name, case, cuda, config)


def test_every_case_of_the_other_chip_exists() -> None:
    missing = [
        f"{name}/{label}" for name in kernels() if name in READS_FP8 for label in ON_OTHER_ARCH
        if not any(case.label.endswith(label) for case in cases(name))
    ]  # fmt: skip
    assert not missing
