"""The device test: what it counts, on which machine, and who may say that something ran on a device."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ascend.conftest import SOCS, StandIn
from ascend.test_probe import GOOD

from v4sdk import __version__, plugins
from v4sdk.errors import BackendUnavailable

doctor = importlib.import_module("v4sdk_ascend.doctor")
chip = importlib.import_module("v4sdk_ascend.chip")
probe = importlib.import_module("v4sdk_ascend.probe")
results = importlib.import_module("v4sdk_ascend.results")
identity = importlib.import_module("v4sdk_ascend.identity")
device_test = importlib.import_module("v4sdk_ascend.device_test")
Vendor = importlib.import_module("v4sdk_ascend.contract").Vendor
Choice = importlib.import_module("v4sdk_ascend.ops").Choice
RecordedStep = importlib.import_module("v4sdk_ascend.graph").RecordedStep
AscendBackend = importlib.import_module("v4sdk_ascend.backend").AscendBackend

# with a pack beside torch_npu
MACHINE = replace(GOOD, packs={"vllm_ascend": "0.23.0", "onnxruntime-cann": "1.24.4"})
DEVICE = probe.Device(
    8, 0, "Ascend910B3", 223, chip.by_code(223), "2.10.0.post4", "9.1.0", (60 * 10**9, 64 * 10**9)
)
TESTED = results.Tested("rms_norm", "stock", 3, True, 0.3, 12e-6)
RESULT = results.Result(
    "Ascend910B3", 223, "NPU-1234", "25.5.0", "9.1.0", "2.10.0.post4", "2.10.0+cpu", __version__, results.sources(),
    "2026-11-30T12:00:00+08:00", 1e-3, (TESTED, results.Tested("linear", "stock", 3, False, 4.0, None, "decode: differs")), True,
    {"vllm_ascend": "0.23.0"},
)  # fmt: skip


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
        ({"ops": [3]}, "does not hold what a device test holds"),
    ],
    ids=["uuid", "driver", "kernel", "op-times", "word", "format", "strange", "op"],
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
        ({"torch": "2.12.0+cpu"}, {}, "torch 2.10.0+cpu, now 2.12.0+cpu"),
        ({"packs": {"vllm_ascend": "0.24.0"}}, {}, "vllm_ascend 0.23.0, now 0.24.0"),
        ({"packs": {}}, {}, "vllm_ascend 0.23.0, now unknown"),
        (
            {"packs": {"vllm_ascend": "0.23.0", "triton-ascend": "3.2.0"}},
            {},
            "triton-ascend unknown, now 3.2.0",
        ),
        ({}, {"cann": "9.2.0"}, "CANN 9.1.0, now 9.2.0"),
        ({}, {"torch_npu": "2.12.0"}, "torch_npu 2.10.0.post4, now 2.12.0"),
        ({}, {"name": "Ascend910B4"}, "SoC Ascend910B3, now Ascend910B4"),
    ],
)
def test_a_result_counts_for_the_versions_it_was_made_with(
    machine: dict[str, Any], device: dict[str, Any], said: str | None
) -> None:
    why = RESULT.why_not_here(replace(DEVICE, **device), replace(MACHINE, **machine), "NPU-1234")
    assert why is None if said is None else said in why


@pytest.mark.parametrize(
    ("made", "number", "said"),
    [
        (RESULT, "NPU-5678", "UUID NPU-1234, now NPU-5678"),
        (RESULT, None, "UUID NPU-1234, now unknown"),
        (replace(RESULT, v4sdk="0.0.9"), "NPU-1234", f"v4sdk 0.0.9, now {__version__}"),
        (replace(RESULT, plugin="0123456789ab"), "NPU-1234", "sources of this plugin 0123456789ab, now"),
    ],
    ids=["another", "unnamed", "v4sdk", "plugin"],
)
def test_a_result_counts_on_its_npu_and_for_its_sources(made: Any, number: str | None, said: str) -> None:
    assert said in (made.why_not_here(DEVICE, MACHINE, number) or "")


@pytest.mark.parametrize(("graph", "ok"), [(True, True), (None, True), (False, False)])
def test_a_wrong_replay_is_a_failed_test_and_is_named(graph: bool | None, ok: bool) -> None:
    made = replace(RESULT, ops=(TESTED,), graph=graph)
    assert made.ok is ok
    row = doctor.evidence_rows("schema", made)[0]
    assert row.ok is ok
    words = {True: "a replayed step equals", False: "a replayed step differs", None: "no step was captured"}
    assert words[graph] in row.finding


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, file: Path) -> Any:
    """The backend as on a machine with everything."""
    monkeypatch.setattr(probe, "look", lambda: MACHINE)
    backend = AscendBackend()
    backend._npu = DEVICE
    backend.number = "NPU-1234"
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


def npus(**said: Any) -> Any:
    """`torch.npu` as it is asked for a device's properties."""
    return SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(**said))


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A host of two cards, of two chips each, as npu-smi tells of them; collects what it was asked."""
    asked: list[tuple[str, ...]] = []
    mapping = (
        "\tNPU ID   Chip ID   Chip Logic ID   Chip Name\n\t4   0   0   Ascend910\n\t4   1   1   Ascend910\n\t4   2   -   Mcu\n"
        "\t9   0   2   Ascend910\n\t9   1   3   Ascend910\n"
    )
    boards = {"4": "Serial Number : 0A1", "9": "Serial Number : NA"}
    dies = {("9", "1"): "VDie ID : 52CC90 4040", ("9", "0"): "VDie ID : 0"}

    def answer(*arguments: str) -> str:
        asked.append(arguments)
        if arguments == ("-m",):
            return mapping
        card = arguments[arguments.index("-i") + 1]
        chip = arguments[arguments.index("-c") + 1] if "-c" in arguments else None
        return dies.get((card, chip), "") if chip else boards[card]

    monkeypatch.setattr(identity, "_smi", answer)
    monkeypatch.delenv(probe.VISIBLE_VARIABLE, raising=False)
    return asked


@pytest.mark.parametrize(
    ("visible", "index", "number"),
    [
        (None, 3, "NPU-52CC90-4040"),
        ("3,1", 0, "NPU-52CC90-4040"),
        ("3,1", 1, "NPU-0A1-1"),
        (None, 0, "NPU-0A1-0"),
        (None, 2, None),
        ("3", 1, None),
        ("all", 0, None),
    ],
)
def test_npu_smi_is_asked_for_the_card_and_chip_of_this_process(
    smi: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    index: int,
    number: str | None,
) -> None:
    if visible is not None:
        monkeypatch.setenv(probe.VISIBLE_VARIABLE, visible)
    assert identity.uuid(npus(), index) == number


def test_torch_npu_is_believed_where_it_says_a_uuid(smi: list[tuple[str, ...]]) -> None:
    assert identity.uuid(npus(uuid="12-34"), 0) == "NPU-12-34"
    assert not smi
    assert identity.uuid(npus(uuid="00000000-0000"), 0) == "NPU-0A1-0"


@pytest.mark.parametrize(
    ("number", "machine", "said"),
    [
        (None, {}, "torch_npu 2.10.0.post4 gives no UUID"),
        ("NPU-1234", {"driver": None}, "version of the driver"),
        ("NPU-1234", {"cann": None}, "version of the CANN"),
    ],
)
def test_what_a_result_cannot_count_without_is_said_before_the_test(
    opened: Any,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: str | None,
    machine: dict[str, Any],
    said: str,
) -> None:
    opened.number, opened.machine = number, replace(GOOD, **machine)
    opened._npu = replace(DEVICE, cann=None)
    monkeypatch.setattr(device_test, "judge_ops", lambda *args: pytest.fail("the test was started"))
    with pytest.raises(BackendUnavailable, match=said) as caught:
        opened.device_test()
    assert caught.value.hint
    assert not file.exists()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU in the place of an NPU, whose RMS norm is said to be torch_npu's; gives the backend."""
    backend = plugins.select("cpu")
    for name, value in {
        "npu": DEVICE,
        "vendor": Vendor(),
        "choices": (Choice("rms_norm", "stock", []),),
    }.items():
        monkeypatch.setattr(backend, name, value, raising=False)
    return backend


def test_a_pack_is_named_only_where_one_of_its_functions_was_called(judged: Any) -> None:
    def silent(work: Any) -> float:
        work()
        return 1e-6

    def calling(work: Any) -> float:
        for told in judged.vendor.observers:
            told("npu.npu_quant_matmul", (), {})
            told("npu.npu_rms_norm", (), {})
        return silent(work)

    (found,) = device_test.judge_ops(judged, silent, ["rms_norm"])
    assert (found.ok, found.provider, found.calls) == (True, "parts", ())
    (found,) = device_test.judge_ops(judged, calling, ["rms_norm"])
    assert (found.ok, found.provider, found.calls) == (True, "stock", ("npu.npu_rms_norm",))
    assert not judged.vendor.observers


def test_an_op_that_two_providers_served_in_turn_is_not_right(
    judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, turns = device_test.judge_case, iter(("vendorpack", "stock", "stock"))

    def judge(*args: Any) -> Any:
        judged.choices = (Choice("rms_norm", next(turns), []),)
        return compare(*args)

    monkeypatch.setattr(device_test, "judge_case", judge)
    (found,) = device_test.judge_ops(judged, lambda work: 1e-6, ["rms_norm"])
    assert not found.ok
    assert (
        found.detail
        == "not one provider for all cases: vendorpack from device-decode, stock from device-prefill"
    )


@pytest.mark.parametrize(
    ("ops", "calls", "fault"),
    [
        (("rms_norm", "hc_head"), 2, "rms_norm gives other numbers than without a graph"),
        (("compress",), 3, "compress writes other numbers than without a graph"),
    ],
    ids=["gives", "writes"],
)
@pytest.mark.parametrize("is_replayed", [True, False])
def test_a_replayed_step_is_held_against_one_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, ops: tuple[str, ...], calls: int, fault: str, is_replayed: bool
) -> None:
    backend = plugins.select("cpu")
    monkeypatch.setattr(backend, "npu", DEVICE, raising=False)
    small = {name: device_test.OPS[name] for name in ops}
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
        f"{calls} calls captured as one ACL graph and replayed: same numbers" if is_replayed else fault
    )


def test_the_comparisons_run_on_emulated_functions_of_each_chip(stand_in: StandIn, family: str) -> None:
    # cheap ones at released widths; the others take a device
    ops = ("rms_norm", "linear", "hc_pre", "hc_post", "kv_project_store", "route", "sample")
    found = stand_in.facts(SOCS[family], "device_test.py", *ops, V4SDK_ASCEND_EMULATE="1")
    assert "a device test wants an NPU" in found["refused"]
    assert found["evidence"] == "emulated"
    assert [one["op"] for one in found["tested"]] == list(ops)
    assert [one["op"] for one in found["tested"] if not one["ok"]] == []
    served = {one["op"]: one["provider"] for one in found["tested"]}
    assert served["rms_norm"] == served["linear"] == "stock"
    called = {one["op"]: one["calls"] for one in found["tested"]}
    assert "npu.npu_quant_matmul" in called["linear"]
    assert called["sample"] == []
    assert served["hc_post"] in ("transformer", "stock", "vendorpack")
