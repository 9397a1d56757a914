"""What doctor says of a machine, its ops and their evidence."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ascend.conftest import SOCS, StandIn
from ascend.test_device_test import DEVICE, RESULT
from ascend.test_probe import BARE, GOOD

from v4sdk.backend import DoctorRow

doctor = importlib.import_module("v4sdk_ascend.doctor")
chip = importlib.import_module("v4sdk_ascend.chip")
contract = importlib.import_module("v4sdk_ascend.contract")
probe = importlib.import_module("v4sdk_ascend.probe")
roofline = importlib.import_module("v4sdk_ascend.roofline")
Choice = importlib.import_module("v4sdk_ascend.ops").Choice
PROVIDERS = importlib.import_module("v4sdk_ascend.ops").PROVIDERS


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
    assert planned["index_topk"].finding.startswith("torch_npu on"), "quantised indexers decline every model"
    assert "cann_ops_transformer" not in planned["compress"].finding


def test_the_readme_says_which_releases_were_read_and_which_kernel_a_run_takes(
    tables: tuple[Any, ...],
) -> None:
    said = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = said[said.index("## The Ascend backend") : said.index("## Share the experts")]
    assert [t.version for t in tables if t.version not in section] == []
    assert {p.op for p in PROVIDERS if p.pack == "kernels"} == {"hc_pre"}, "and the README names no other"
    assert "a kernel of ours\n(`hc_pre` only)" in section


@pytest.mark.parametrize("one", [p for p in PROVIDERS if p.is_declined], ids=lambda p: f"{p.op}-{p.pack}")
def test_a_provider_that_declines_every_model_has_no_adapter(one: Any) -> None:
    with pytest.raises(contract.ContractBroken, match=f"`{one.op}` was asked of a provider that declines"):
        one.function(None)


def test_the_way_out_of_emulation_without_a_wheel_is_the_command_that_brings_it() -> None:
    rows = by_subject(doctor.machine_rows(replace(GOOD, **BARE, emulates=True)))
    assert rows["torch_npu"].hint == probe.EMULATED_RUN


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


@pytest.mark.parametrize("by", ["vendorpack", "kernels", "parts"])
def test_a_device_test_of_one_provider_says_nothing_of_another(by: str) -> None:
    rows = doctor.op_rows((Choice("rms_norm", by, []),), "schema", RESULT)
    assert "(device)" not in "".join(row.finding for row in rows)


def test_roofline_rows_say_what_they_are() -> None:
    rows = doctor.roofline_rows(DEVICE)
    assert rows
    assert all("model, not measurement" in row.subject + row.finding for row in rows)
    # by each link: within a machine, and the one between machines
    links = [row.finding for row in rows if row.subject == "expert exchange"]
    assert [re.findall(r"(\d+) GB/s", line) for line in links] == [["196"], ["25"]]
    assert doctor.roofline_rows(replace(DEVICE, chip=None)) == ()


def test_every_chip_of_the_source_has_one_roofline_row() -> None:
    names = [name for profile in roofline.PROFILES for name in profile.chips]
    assert len(names) == len(set(names))
    assert {c.name for c in chip.CHIPS} - set(names) == {"Ascend910_9363"}, "the source has no row for it"


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
