"""What doctor says of a machine and its ops, and the device test: who may say that something ran on a device."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from ascend.conftest import SOCS, StandIn
from ascend.test_probe import BARE, GOOD

from v4sdk import plugins
from v4sdk.backend import DoctorRow
from v4sdk.errors import BackendUnavailable

doctor = importlib.import_module("v4sdk_ascend.doctor")
chip = importlib.import_module("v4sdk_ascend.chip")
probe = importlib.import_module("v4sdk_ascend.probe")
results = importlib.import_module("v4sdk_ascend.results")
roofline = importlib.import_module("v4sdk_ascend.roofline")
device_test = importlib.import_module("v4sdk_ascend.device_test")
Choice = importlib.import_module("v4sdk_ascend.ops").Choice
PROVIDERS = importlib.import_module("v4sdk_ascend.ops").PROVIDERS
RecordedStep = importlib.import_module("v4sdk_ascend.graph").RecordedStep
AscendBackend = importlib.import_module("v4sdk_ascend.backend").AscendBackend

DEVICE = probe.Device(
    8, 0, "Ascend910B3", 223, chip.by_code(223), "2.10.0.post4", "9.1.0", (60 * 10**9, 64 * 10**9)
)
TESTED = results.Tested("rms_norm", "stock", 3, True, 0.3, 12e-6)
RESULT = results.Result(
    "Ascend910B3", 223, "NPU-1234", "25.5.0", "9.1.0", "2.10.0.post4", "2.10.0", "0.1.0", "2026-11-30T12:00:00+08:00", 1e-3,
    (TESTED, results.Tested("linear", "stock", 3, False, 4.0, None, "decode: differs")), True,
)  # fmt: skip


def by_subject(rows: Any) -> dict[str, DoctorRow]:
    return {row.subject: row for row in rows}


def test_a_machine_with_everything_has_nothing_missing() -> None:
    rows = doctor.machine_rows(GOOD)
    assert all(row.ok for row in rows)
    assert (
        by_subject(rows)["version pair"].finding
        == "torch_npu 2.10.0.post4 was released for CANN 9.1.0, found 9.1.0"
    )


def test_a_bare_machine_still_shows_the_table_of_who_would_serve() -> None:
    rows = doctor.machine_rows(replace(GOOD, **BARE, driver=None, nodes=()))
    assert all(row.hint for row in rows if not row.ok)
    assert {row.subject for row in rows if not row.ok} == {
        "torch_npu",
        "CANN",
        "libascendcl.so",
        "driver",
        "device nodes",
    }
    planned = by_subject(doctor.planned_rows(PROVIDERS, "schema"))
    assert planned["evidence"].finding.startswith("schema")
    assert planned["sparse_attn"].finding.startswith("cann_ops_transformer on 910B/910C/950")
    assert {p.op for p in PROVIDERS} == planned.keys() - {"evidence"}


def test_a_pair_that_the_table_does_not_know_is_said_and_one_that_differs_warns() -> None:
    newer = by_subject(doctor.machine_rows(replace(GOOD, torch_npu="2.13.0")))["version pair"]
    assert newer.ok
    assert "not in the vendor's table" in newer.finding
    wrong = by_subject(doctor.machine_rows(replace(GOOD, cann="8.5.0")))["version pair"]
    assert not wrong.ok
    assert "install CANN 9.1.0" in (wrong.hint or "")


def test_onnxruntime_is_named_and_not_used() -> None:
    row = by_subject(doctor.machine_rows(replace(GOOD, packs={"onnxruntime-cann": "1.24.4"})))[
        "onnxruntime-cann"
    ]
    assert row.finding.startswith("1.24.4: named, not used")


def test_the_device_is_described_with_its_verdict() -> None:
    rows = by_subject(doctor.device_rows(DEVICE, GOOD))
    assert rows["NPU"].finding == "Ascend910B3, SoC code 223, device 0 of 8, 60.0 of 64.0 GB free"
    assert rows["chip"].ok
    assert not by_subject(doctor.device_rows(replace(DEVICE, chip=None, code=999), GOOD))["chip"].ok


def test_ops_are_told_with_provider_evidence_and_reasons() -> None:
    choices = (
        Choice("sparse_attn", "transformer", []),
        Choice("rms_norm", "stock", ["vendorpack: _C_ascend.rms_norm is not registered here"]),
        Choice("linear", "stock", []),
        Choice("route", "parts", ["stock: norm_type 2 is not documented"]),
    )
    rows = doctor.op_rows(choices, "schema", RESULT)
    told = {(row.subject, row.finding) for row in rows}
    assert ("1 ops by cann_ops_transformer", "sparse_attn (schema)") in told
    assert ("1 ops by torch_npu", "rms_norm (device)") in told, "only what the device test found right"
    assert ("1 ops by torch_npu", "linear (schema)") in told
    assert ("rms_norm not by", "vendorpack: _C_ascend.rms_norm is not registered here") in told
    assert any(row.subject.endswith("by parts or reference") and "route" in row.finding for row in rows)


def test_roofline_rows_say_what_they_are() -> None:
    rows = doctor.roofline_rows(DEVICE)
    assert rows
    assert all(row.subject == "roofline (model, not measurement)" for row in rows)
    assert doctor.roofline_rows(replace(DEVICE, chip=None)) == ()


def test_every_chip_of_the_source_has_one_roofline_row() -> None:
    names = [name for profile in roofline.PROFILES for name in profile.chips]
    assert len(names) == len(set(names))
    assert {c.name for c in chip.CHIPS} - set(names) == {"Ascend910_9363"}, "the source has no row for it"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(results.FILE_VARIABLE, str(tmp_path / "kept" / "result.json"))
    return Path(results.path())


def test_a_result_comes_back_as_it_was_written(file: Path) -> None:
    assert results.read(file) is None
    results.write(RESULT, file)
    assert results.read(file) == RESULT
    assert [p.name for p in file.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"uuid": "unknown"}, "lacks UUID"),
        ({"driver": ""}, "lacks driver"),
        ({"kernel_s": 0}, "lacks time of a kernel"),
        ({"ops": [asdict(replace(TESTED, seconds=None))]}, "lacks times of its ops"),
        ({"evidence": "emulated"}, "is not a device test"),
        ({"format": 99}, "is not a device test"),
        ({"speed": 3}, "does not hold what a device test holds"),
    ],
    ids=["uuid", "driver", "kernel", "op-times", "word", "format", "strange"],
)
def test_a_file_without_what_only_a_device_gives_is_rejected(
    file: Path, change: dict[str, Any], said: str
) -> None:
    results.write(RESULT, file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = results.read(file)
    assert isinstance(found, str)
    assert said in found


@pytest.mark.parametrize(
    ("machine", "device", "said"),
    [
        ({}, {}, None),
        ({"driver": "26.0"}, {}, "driver 25.5.0, now 26.0"),
        ({}, {"cann": "9.2.0"}, "CANN 9.1.0, now 9.2.0"),
        ({}, {"torch_npu": "2.12.0"}, "torch_npu 2.10.0.post4, now 2.12.0"),
        ({}, {"name": "Ascend910B4"}, "SoC Ascend910B3, now Ascend910B4"),
    ],
)
def test_a_result_counts_for_the_versions_it_was_made_with(
    machine: dict[str, Any], device: dict[str, Any], said: str | None
) -> None:
    why = RESULT.why_not_here(replace(DEVICE, **device), replace(GOOD, **machine))
    assert why is None if said is None else said in why


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, file: Path) -> Any:
    """The backend as on a machine with everything."""
    monkeypatch.setattr(probe, "look", lambda: GOOD)
    backend = AscendBackend()
    backend._npu = DEVICE
    return backend


def test_the_word_device_comes_from_a_passed_device_test_of_this_machine_alone(
    opened: Any, file: Path
) -> None:
    assert opened.evidence == "schema"
    results.write(RESULT, file)
    assert opened.evidence == "schema", "one op was wrong"
    results.write(replace(RESULT, ops=(TESTED,)), file)
    assert opened.evidence == "device"
    opened._npu = replace(DEVICE, cann="9.2.0")
    assert opened.evidence == "schema"
    row = doctor.evidence_rows("schema", opened.tested)[0]
    assert not row.ok
    assert "CANN 9.1.0, now 9.2.0" in row.finding
    assert "--device-test" in (row.hint or "")


@pytest.mark.parametrize("change", [{"emulates": True}, {"is_stand_in": True}], ids=["emulated", "stand-in"])
def test_a_device_test_is_refused_where_no_device_is(
    monkeypatch: pytest.MonkeyPatch, file: Path, change: dict[str, bool]
) -> None:
    monkeypatch.setattr(probe, "look", lambda: replace(GOOD, **change))
    backend = AscendBackend()
    backend._npu = DEVICE
    with pytest.raises(BackendUnavailable, match="a device test wants an NPU"):
        backend.device_test()
    assert not file.exists()


@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_replayed_step_is_held_against_one_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, is_replayed: bool
) -> None:
    backend = plugins.select("cpu")
    backend.choices = ()  # type: ignore[attr-defined]
    small = {"rms_norm": device_test.OPS["rms_norm"], "hc_head": device_test.OPS["hc_head"]}
    monkeypatch.setattr(device_test, "OPS", small)

    class Replaying(RecordedStep):  # type: ignore[misc, valid-type]
        def __init__(self, step: Any) -> None:
            super().__init__(step, None, None)

        def _capture(self) -> None:
            self.graph = self._step if is_replayed else (lambda: None)
            self._run = self.graph
            self._run()

    monkeypatch.setattr(type(backend), "record", lambda self, step: Replaying(step))
    same, why = device_test.judge_graph(backend)
    assert same is is_replayed
    assert why == (
        "2 calls captured as one ACL graph and replayed: same numbers" if is_replayed
        else "rms_norm gives other numbers than without a graph"
    )  # fmt: skip


def test_the_comparisons_run_on_emulated_functions_of_each_chip(stand_in: StandIn, family: str) -> None:
    # cheap ones at released widths; the others take a device
    ops = ("rms_norm", "hc_pre", "hc_post", "kv_project_store", "route", "sample")
    found = stand_in.facts(SOCS[family], "device_test.py", *ops, V4SDK_ASCEND_EMULATE="1")
    assert "a device test wants an NPU" in found["refused"]
    assert found["evidence"] == "emulated"
    assert [one["op"] for one in found["tested"]] == list(ops)
    assert [one["op"] for one in found["tested"] if not one["ok"]] == []
    served = {one["op"]: one["provider"] for one in found["tested"]}
    assert served["rms_norm"] == "stock"
    assert served["hc_post"] in ("transformer", "stock", "vendorpack")


def test_doctor_behind_the_stand_in_names_what_it_stands_for(stand_in: StandIn, family: str) -> None:
    ended = stand_in.python(
        SOCS[family],
        "-m",
        "v4sdk",
        "doctor",
        "--backend",
        "ascend",
        V4SDK_ASCEND_EMULATE="1",
        V4SDK_ASCEND_DEVICE_TEST="/none",
    )
    assert ended.returncode == 0, ended.stderr
    said = re.sub(r"\s+", " ", ended.stdout)
    assert f"stands in for {SOCS[family]}" in said
    assert "emulated: computed on the CPU from the vendor's documents" in said
    assert "model, not measurement" in said
    assert "ops by torch_npu" in said
