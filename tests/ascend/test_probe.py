"""What is said of a machine: every refusal in one line with its way out, pairs of versions, the chip behind the stand-in."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ascend.conftest import SOCS, StandIn

from v4sdk import plugins
from v4sdk.errors import BackendUnavailable, CheckpointError
from v4sdk.weights import ExpertWeights, Weight

probe = importlib.import_module("v4sdk_ascend.probe")
verdicts = importlib.import_module("v4sdk_ascend.verdict")
versions = importlib.import_module("v4sdk_ascend.versions")
stub = importlib.import_module("v4sdk_ascend.testing.stub")
backends = importlib.import_module("v4sdk_ascend.backend")
AscendBackend = backends.AscendBackend

# everything in place: torch_npu for this torch, CANN, a driver and two NPUs
GOOD = probe.Machine(
    torch="2.10.0+cpu", torch_npu="2.10.0.post4", has_package=True, toolkit=Path("/opt/cann"), cann="9.1.0", driver="25.5.0",
    missing=None, nodes=("davinci0", "davinci1"), accelerator=None, is_stand_in=False, emulates=False,
)  # fmt: skip
# torch without another vendor's device, beside which torch_npu does not load
PAIR = "with torch's CPU build, pip install torch=={} torch-npu=={}"
BARE: dict[str, Any] = {
    "torch_npu": None, "has_package": False, "toolkit": None, "cann": None, "missing": "libascendcl.so is not found"
}  # fmt: skip


def test_a_machine_with_everything_is_not_refused() -> None:
    assert verdicts.refusal(GOOD) is None


@pytest.mark.parametrize(
    ("change", "reason", "hint"),
    [
        (BARE, "neither CANN nor torch_npu is installed", PAIR.format("2.10.0", "2.10.0.post4")),
        (
            {"torch_npu": None, "has_package": False, "cann": "8.5.0", "torch": "2.8.0"},
            "CANN 8.5.0 is here, but torch_npu is not installed", PAIR.format("2.8.0", "2.8.0.post2"),
        ),
        (
            {"torch": "2.13.0"}, "torch_npu 2.10.0.post4 was built for torch 2.10.0, and this is torch 2.13.0",
            "install the CPU build of torch 2.10.0",
        ),
        ({"accelerator": "cuda"}, "this torch already serves `cuda`", "CPU build"),
        (
            {"toolkit": None, "missing": "libascendcl.so is not found"},
            "torch_npu is installed, but CANN is not found: libascendcl.so is not found", "install CANN 9.1.0",
        ),
        (
            {"missing": "libruntime.so is not found"}, "CANN in /opt/cann cannot be loaded: libruntime.so is not found",
            "source /opt/cann/set_env.sh",
        ),
        (
            {**BARE, "emulates": True}, "V4SDK_ASCEND_EMULATE is set, and torch_npu, whose dispatcher takes the calls, is not",
            "python -m v4sdk_ascend.testing.run",
        ),
        (
            {"toolkit": None, "missing": "libascendcl.so is not found", "emulates": True},
            "V4SDK_ASCEND_EMULATE is set, and torch_npu finds no CANN", "python -m v4sdk_ascend.testing.run",
        ),
        ({"is_stand_in": True}, "CANN is a link-time stand-in here", "V4SDK_ASCEND_EMULATE=1"),
        ({"nodes": ()}, "there is no /dev/davinci*", "npu-smi info"),
    ],
    ids=[
        "bare", "cann-alone", "torch", "accelerator", "npu-alone", "library", "emulated", "emulated-npu", "stand-in", "nodes",
    ],
)  # fmt: skip
def test_every_refusal_says_what_and_the_way_out(change: dict[str, Any], reason: str, hint: str) -> None:
    found = verdicts.refusal(replace(GOOD, **change))
    assert found is not None
    assert found.reason.startswith(reason)
    assert hint in found.hint
    assert "\n" not in found.reason + found.hint


def test_emulation_wants_neither_nodes_nor_a_real_cann() -> None:
    assert verdicts.refusal(replace(GOOD, emulates=True, is_stand_in=True, nodes=())) is None


@pytest.mark.parametrize(
    ("torch_npu", "cann"),
    [("2.10.0.post4", "9.1.0"), ("2.8.0.post2", "8.5.0"), ("2.8.0", "8.3.RC1"), ("2.13.0", None)],
)
def test_pairs_are_those_of_the_table(torch_npu: str, cann: str | None) -> None:
    assert versions.cann_of(torch_npu) == cann


def test_a_cann_of_the_same_line_fits_and_another_does_not() -> None:
    assert versions.fits_cann("2.10.0.post4", "9.1.RC1") is True
    assert versions.fits_cann("2.10.0.post4", "8.5.0") is False
    assert versions.fits_cann("2.13.0", "9.1.0") is None


def test_a_pair_is_for_the_torch_at_hand_where_there_is_one() -> None:
    assert versions.pair_for("9.1.0", "2.9.0+cpu") == PAIR.format("2.9.0", "2.9.0.post6")
    assert versions.pair_for("9.1.0", "2.13.0") == PAIR.format("2.12.0", "2.12.0")
    assert versions.pair_for(None, "2.13.0") == versions.pair_for(versions.NEWEST_CANN, "2.13.0")


def test_no_torch_npu_goes_with_two_lines_of_cann() -> None:
    every = [version for listed in versions.PAIRS.values() for version in listed]
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("libhccl.so: cannot open shared object file: No such file or directory", "libhccl.so is not found"),
        (
            "/x/torch_npu/lib/libtorch_npu.so: undefined symbol: aclrtMallocHost",
            "libtorch_npu.so wants aclrtMallocHost, which this CANN does not have",
        ),
        ("Two accelerators cannot be used\n[ERROR] 2026", "Two accelerators cannot be used"),
        ("", "ImportError"),
    ],
)
def test_what_is_missing_is_named(text: str, words: str) -> None:
    assert probe.why(ImportError(text)) == words


def test_versions_of_cann_and_driver_are_read_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x86_64-linux").mkdir()
    (tmp_path / "x86_64-linux" / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend\nversion=9.1.0\n"
    )
    (tmp_path / "version.info").write_text("Version=25.5.0\nascendhal_version=7.35.23\n")
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci_manager").touch()
    monkeypatch.setenv(probe.TOOLKIT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(probe, "_DRIVER_FILE", tmp_path / "version.info")
    monkeypatch.setattr(probe, "_NODES", tmp_path)
    found = probe.look()
    assert (found.toolkit, found.cann, found.driver, found.nodes) == (
        tmp_path,
        "9.1.0",
        "25.5.0",
        ("davinci0",),
    )


@pytest.mark.parametrize(("value", "emulates"), [("1", True), ("0", False), ("", False)])
def test_emulation_is_asked_for_by_a_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, emulates: bool
) -> None:
    monkeypatch.setenv(probe.EMULATE_VARIABLE, value)
    assert probe.look().emulates is emulates


def test_another_vendor_that_has_taken_the_private_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.look().accelerator is None
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "dipu")
    assert probe.look().accelerator == "dipu"


def test_the_stand_in_is_told_by_the_variable_that_its_builder_sets() -> None:
    assert probe.STAND_IN_VARIABLE == stub.SOC


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch_npu as `find` asks it, with answers that a test may change."""
    about = SimpleNamespace(count=2, current=1, name="Ascend910B3", code=223, memory=(3 << 30, 64 << 30))

    def mem_get_info() -> tuple[int, int]:
        if about.memory is None:
            raise RuntimeError("no device")
        return about.memory

    devices = SimpleNamespace(
        device_count=lambda: about.count, current_device=lambda: about.current,
        get_device_name=lambda index: about.name, mem_get_info=mem_get_info,
        set_device=lambda index: setattr(about, "chosen", index),
    )  # fmt: skip
    monkeypatch.setattr(torch, "get_device_module", lambda name: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    about.package = SimpleNamespace(
        _C=SimpleNamespace(_npu_get_soc_version=lambda: about.code), __version__="2.10.0.post4",
        npu=SimpleNamespace(utils=SimpleNamespace(get_cann_version=lambda: "9.1.0")),
    )  # fmt: skip
    return about


def test_a_device_is_found_with_its_memory(npu: SimpleNamespace) -> None:
    found = probe.find(npu.package)
    assert (found.index, found.count, found.family, found.cann) == (1, 2, "910B", "9.1.0")
    assert found.memory == (3 << 30, 64 << 30)
    npu.memory = None
    assert probe.find(npu.package).memory is None


def test_a_chip_that_nobody_described_runs_references_and_that_is_said(npu: SimpleNamespace) -> None:
    npu.code, npu.name = 999, "Ascend990"
    found = probe.find(npu.package)
    assert found.family is None
    assert verdicts.verdict(found).startswith(
        "SoC code 999 is not known here: no vendor's function is called"
    )


def test_no_device_names_the_variable_that_hides_them(
    npu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu.count = 0
    monkeypatch.setenv(probe.VISIBLE_VARIABLE, "7")
    with pytest.raises(
        BackendUnavailable, match="torch_npu sees no NPU with ASCEND_RT_VISIBLE_DEVICES=7"
    ) as caught:
        probe.find(npu.package)
    assert "npu-smi" in (caught.value.hint or "")


def test_each_process_of_a_host_takes_an_npu_of_its_own(
    npu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert probe.find(npu.package).index == 0
    assert npu.chosen == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        BackendUnavailable, match="process 2 of this host has no NPU of its own: 2 are to be seen"
    ):
        probe.find(npu.package)


def test_listing_does_not_load_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "look", lambda: GOOD)
    monkeypatch.setattr(probe, "load", lambda: pytest.fail("torch_npu was loaded"))
    backend = AscendBackend()
    assert backend.unavailable() is None
    assert backend.evidence == "schema"
    assert backend.capability() == {}
    assert backend.doctor()
    assert all(row.unless is not None for row in backend.kernels())
    assert next(s for s in plugins.statuses() if s.name == "ascend").state == "available"


def test_experts_are_checked_where_they_lie_all_three_matrices_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = AscendBackend()
    monkeypatch.setattr(backend, "_npu", SimpleNamespace(family="910B", index=0))
    monkeypatch.setattr(backends.layout, "experts", lambda experts, device: experts)
    monkeypatch.setattr(Weight, "to", lambda self, device: pytest.fail("a matrix was copied to be looked at"))
    backend.machine = replace(GOOD, emulates=True)
    kept = Weight(torch.zeros(2, 4, dtype=torch.bfloat16))
    backend.prepare_experts("experts", ExpertWeights((kept,), (kept,), (kept,)))
    strange = Weight(torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.zeros(1, 1), "fp8", (128, 128))
    for wrong in (
        ExpertWeights((kept,), (kept,), (strange,)),
        ExpertWeights((kept, strange), (kept, kept), (kept, kept)),
        ExpertWeights(packed=(kept, kept, strange)),
    ):
        with pytest.raises(CheckpointError, match="`experts` is fp8, of which 910B has no products"):
            backend.prepare_experts("experts", wrong)


def test_a_chosen_backend_is_opened_and_a_failure_has_its_own_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise BackendUnavailable(
            "torch_npu 2.10.0.post4 cannot be loaded: libhccl.so is not found", hint="source it"
        )

    monkeypatch.setattr(probe, "look", lambda: GOOD)
    monkeypatch.setattr(probe, "load", failing)
    with pytest.raises(
        BackendUnavailable, match="backend `ascend` cannot be used here: torch_npu .* libhccl.so"
    ) as caught:
        plugins.select("ascend")
    assert caught.value.hint == "source it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "call aclnnMatmul failed, detail:EZ1001: a\n[ERROR] 2026-11-30 (PID:1, Device:0, RankID:-1) ERR00100 PTA",
            "call aclnnMatmul failed, detail:EZ1001: a",
        ),
        (
            "\nThe Inner error is reported\n[ERROR] x (PID:9, Device:3, RankID:-1) ERR00100",
            "The Inner error is reported (ERR00100)",
        ),
        ("shape '[2]' is invalid for input of size 3", None),
    ],
)
def test_errors_of_the_device_are_told_from_others(text: str, said: str | None) -> None:
    assert AscendBackend().failure(RuntimeError(text)) == said


def test_the_chip_behind_the_stand_in_is_the_one_it_names(stand_in: StandIn, family: str) -> None:
    found = stand_in.facts(SOCS[family], "probe_facts.py")
    assert found["stand_in"]
    assert found["refused"].startswith("CANN is a link-time stand-in")
    assert found["device"]["name"] == SOCS[family]
    assert found["device"]["chip"]["family"] == family
    assert found["verdict"].startswith(family)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("V4SDK_", "ASCEND_"))}
    return subprocess.run(
        [sys.executable, "-m", "v4sdk", *arguments], env=kept | environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(
    probe.look().has_package or probe.look().toolkit is not None, reason="this machine has CANN or torch_npu"
)
def test_a_run_on_a_machine_without_anything_ends_in_two_lines() -> None:
    ended = run("run", "--backend", "ascend", "hello")
    assert ended.returncode == 1
    assert ended.stdout == ""
    error, hint = ended.stderr.splitlines()
    assert error == "error: backend `ascend` cannot be used here: neither CANN nor torch_npu is installed"
    assert hint.startswith(
        "hint: --backend auto takes another; or install the NPU's driver and CANN 9.1.0, source its set_env.sh, then with"
    )
    # what stands behind the command would be read by pip
    assert re.search(r"pip install torch==[\w.]+ torch-npu==[\w.]+$", hint)


def test_a_run_with_the_wheel_and_without_cann_names_the_library(stand_in: StandIn) -> None:
    ended = run("run", "--backend", "ascend", "hello", PYTHONPATH=str(stand_in.wheel))
    assert ended.returncode == 1
    error, hint = ended.stderr.splitlines()
    assert error.endswith("torch_npu is installed, but CANN is not found: libascendcl.so is not found")
    assert hint == "hint: install CANN, and source its set_env.sh"


def test_a_run_behind_the_stand_in_is_refused_unless_it_is_emulated(stand_in: StandIn) -> None:
    ended = stand_in.python(SOCS["910B"], "-m", "v4sdk", "run", "--backend", "ascend", "hello")
    assert ended.returncode == 1
    error, hint = ended.stderr.splitlines()
    assert "CANN is a link-time stand-in here, behind which there is no NPU" in error
    assert "V4SDK_ASCEND_EMULATE=1" in hint
