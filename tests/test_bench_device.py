"""The device suite: what it says on a host, what it draws, how it times, and that red results have no speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk import ops as o
from v4sdk.backend import Backend, Evidence, Kernel, kernel
from v4sdk.ops.inputs import FLASH, TINY
from v4sdk.ops.op import Cost
from v4sdk.plugins import select
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.weights import ExpertWeights
from v4sdk_bench.device import drawn, experts, libraries, op_rows, replayed, stack
from v4sdk_bench.record import Record, Row
from v4sdk_bench.stage import Bench
from v4sdk_bench.suites import device

CPU = torch.device("cpu")


class Pretended(Backend):
    """The CPU, speaking as a device would: enough to run the timed paths of the suite."""

    name = "pretended"
    evidence: Evidence = "device"

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return CPU

    def identity(self) -> dict[str, str | float]:
        return {"name": "pretended", "uuid": "GPU-0", "driver": "1", "kernel_s": 1e-6}

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        return experts


class Emulated(Pretended):
    evidence: Evidence = "emulated"


def bench(backend: Backend, tmp_path: Path, **rest: Any) -> Bench:
    record = Record("2026-01-01T00:00:00+00:00", "test", {}, {}, {})
    return Bench(backend, record, tmp_path, tmp_path, quick=True, **rest)


def test_on_a_host_only_the_reason_is_told(tmp_path: Path) -> None:
    on_host = bench(select("cpu"), tmp_path)
    rows = [row for stage in device.STAGES[1:] for row in stage.run(on_host)]
    assert rows == []


def test_no_stage_takes_more_than_ten_minutes() -> None:
    assert all(stage.full_s <= 600 and stage.quick_s <= stage.full_s for stage in device.STAGES)


def test_an_emulation_has_rows_of_the_same_kind_and_no_times(tmp_path: Path) -> None:
    rows = list(op_rows.run(bench(Emulated(), tmp_path, only=("device/op/rms_norm", "device/op/linear"))))
    assert [row.key.split("/")[2] for row in rows] == ["rms_norm", "linear"]
    assert all(row.state == "ok" and row.evidence == "reference" for row in rows)
    assert not any(name.endswith("_s") for row in rows for name in row.values)
    assert all(row.values["read_bytes"] for row in rows)


def ceilings(record: Record) -> None:
    common = {"low": 1.0, "high": 1.0, "threads": 1, "buffer_bytes": 1, "date": ""}
    record.ceilings = [
        {"name": "copy", "value": 1e15, "unit": "bytes_per_s", **common},
        {"name": "gemm/bfloat16", "value": 1e18, "unit": "flops_per_s", **common},
        {"name": "gemm/float32", "value": 1e18, "unit": "flops_per_s", **common},
    ]


def subject(error: float = 0.0) -> replayed.Subject:
    return replayed.Subject(
        "device/op/x/y", "x", Cost(1_000_000, 0, 0), "float32", {}, {"error": error}, {"error": 1.0}, "device"
    )


def test_a_timed_row_has_the_devices_times_its_floor_and_its_share(tmp_path: Path) -> None:
    b = bench(Pretended(), tmp_path)
    ceilings(b.record)
    x = torch.ones(1000, 1000)
    row = replayed.row(b, subject(), [lambda: x.sum()], 0.01)
    assert row.state == "ok"
    assert row.values["floor_s"] == pytest.approx(1e-9)
    assert 0 < float(str(row.values["share_of_ceiling"])) < 1
    b.record.add(row)


def test_what_is_faster_than_its_floor_was_measured_wrongly(tmp_path: Path) -> None:
    b = bench(Pretended(), tmp_path)
    ceilings(b.record)
    slow = replace(subject(), cost=Cost(10**18, 0, 0))
    row = replayed.row(b, slow, [lambda: None], 0.01)
    assert row.state == "failed"
    assert "below its floor" in row.note
    b.record.add(row)


def test_a_wrong_result_has_no_time(tmp_path: Path) -> None:
    called = []
    row = replayed.row(bench(Pretended(), tmp_path), subject(2.0), [lambda: called.append(1)], 0.01)
    assert row.state == "failed"
    assert called == []


class Refused:
    """A step that its device would not record."""

    reason = "operation not permitted when stream is capturing"

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def __call__(self) -> None:
        self._step()


class Unrecording(Pretended):
    """A device that records nothing, and says so only where it is asked."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        return Refused(step)


def test_what_was_not_recorded_has_no_time_of_the_device(tmp_path: Path) -> None:
    b = bench(Unrecording(), tmp_path)
    ceilings(b.record)
    row = replayed.row(b, subject(), [lambda: None], 0.01)
    assert row.state == "failed"
    assert "not recorded: operation not permitted" in row.note
    assert not any(name.endswith("_s") for name in row.values)
    b.record.add(row)


def test_a_stack_whose_step_was_not_recorded_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = stack.build(bench(Emulated(), tmp_path))
    b = bench(Unrecording(), tmp_path)
    ceilings(b.record)
    row = stack._step_row(b, toy, "device/stack/toy/1/40", "a step", 1, 40)
    assert row.state == "failed"
    assert row.values["not_recorded"] == 1.0
    assert "not recorded: operation not permitted" in row.note
    assert not any(name.endswith("_s") for name in row.values)


class Served(Pretended):
    """A device where somebody else's library serves `rms_norm`, and another one declines `linear`."""

    def kernels(self) -> list[Kernel[Any, Any]]:
        return [kernel(o.rms_norm, self._theirs)]

    def _theirs(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, out: Any = None
    ) -> torch.Tensor:
        self.called.append("theirs")
        return o.rms_norm(x, weight, eps, dtype, out=out)

    def __init__(self) -> None:
        self.called: list[str] = []

    def variants(self, op: str) -> dict[str, Callable[..., Any]]:
        return {"ours": lambda **given: self.called.append("ours")} if op == "rms_norm" else {}

    def declined(self, op: str) -> list[str]:
        return ["lib: not installed (pip install lib)", "other: needs a GPU"] if op == "linear" else []


class ServedEmulation(Served):
    evidence: Evidence = "emulated"


def test_a_library_is_timed_beside_our_kernel_on_the_same_arguments(tmp_path: Path) -> None:
    backend = Served()
    b = bench(backend, tmp_path)
    ceilings(b.record)
    rows = {row.key: row for row in libraries.run(b)}
    assert (
        rows.pop("device/library/linear").note == "lib: not installed (pip install lib); other: needs a GPU"
    )
    assert rows
    assert set(backend.called) == {"theirs", "ours"}
    for key, row in rows.items():
        assert key.startswith("device/library/rms_norm/flash")
        assert row.state == "ok", row.note
        assert float(str(row.values["kernel_a_s"])) > 0
        assert float(str(row.values["kernel_b_s"])) > 0
        assert {"verdict", "speed_ratio"} <= set(row.values)
        assert "a: the library" in row.note
        b.record.add(row)


def test_an_emulation_tells_why_libraries_have_no_times(tmp_path: Path) -> None:
    rows = {row.key: row for row in libraries.run(bench(ServedEmulation(), tmp_path))}
    assert set(rows) == {"device/library/linear", "device/library/rms_norm"}
    assert all(row.state == "not run" for row in rows.values())
    assert "not installed" in rows["device/library/linear"].note
    assert rows["device/library/rms_norm"].note == "an emulation has no times"


def test_a_library_whose_op_is_red_is_not_timed(tmp_path: Path) -> None:
    b = bench(Served(), tmp_path, only=("device/library/rms_norm",))
    b.record.add(Row("device/conformance/rms_norm", "x", "failed", "device", {"failed": 1}, {"failed": 0.0}))
    rows = list(libraries.run(b))
    assert [row.state for row in rows] == ["not run"]
    assert "device/conformance/rms_norm failed" in rows[0].note


def test_products_are_compared_in_the_numerics_that_libraries_take(tmp_path: Path) -> None:
    labels = [one.case.label for one in libraries._cases(bench(Served(), tmp_path), o.linear)]
    assert labels == [
        "flash-decode-8k-fast", "flash-decode-8k-reference", "flash-prefill-8k-fast", "flash-prefill-8k-reference"
    ]  # fmt: skip


def test_a_red_op_is_not_timed_in_later_stages(tmp_path: Path) -> None:
    b = bench(Pretended(), tmp_path, only=("device/op/rms_norm", "device/experts", "device/stack"))
    for op in ("rms_norm", "routed_experts"):
        b.record.add(Row(f"device/conformance/{op}", op, "failed", "device", {"failed": 1}, {"failed": 0.0}))
    rows = [*op_rows.run(b), *experts.run(b), *stack.run(b)]
    assert rows
    assert all(row.state == "not run" and "failed" in row.note for row in rows)


def test_a_replay_takes_each_set_of_arguments_equally_often() -> None:
    calls: list[int] = []
    replay = replayed.Replay([lambda: calls.append(0), lambda: calls.append(1)], Pretended())
    assert replay.count % 2 == 0
    calls.clear()
    replay.seconds(3)
    assert len(calls) == 3 * replay.count
    assert calls.count(0) == calls.count(1)


def test_small_calls_get_sets_of_arguments_that_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "last_level_cache_bytes", lambda device: 60_000_000)
    assert replayed.copies(80_000_000, Pretended()) == 3
    assert replayed.copies(500_000_000, Pretended()) == 1
    assert replayed.copies(1, Pretended()) == 8


def test_drawn_tensors_have_the_shapes_and_types_of_a_checkpoint() -> None:
    config = shrunk(
        V4_FLASH, (0, 4), vocab_size=64, hidden_size=256, n_routed_experts=4, moe_intermediate_size=64, num_hash_layers=1,
        num_experts_per_tok=2, num_attention_heads=8, head_dim=128, q_lora_rank=128, o_lora_rank=64, o_groups=2,
    )  # fmt: skip
    found = drawn.DrawnTensors(config, CPU)
    for spec in drawn.expected_tensors(config):
        tensor = found[spec.name]
        assert tuple(tensor.shape) == spec.shape, spec.name
        assert tensor.nbytes == spec.nbytes, spec.name
        if tensor.is_floating_point():
            assert bool(torch.isfinite(tensor.float()).all()), spec.name
    assert torch.equal(found["embed.weight"], found["embed.weight"])
    table = found["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == 2 for row in table.tolist())


def test_drawn_weights_have_unit_gain() -> None:
    random = drawn.random_on(CPU, "gain")
    for weight in (drawn.fp4((2, 64, 512), random),):
        y = torch.randn(16, 512) @ weight.dequantize()[0].T
        assert 0.3 < float(y.std()) < 3


def test_experts_cost_what_all_their_calls_cost_in_the_mean() -> None:
    random = drawn.random_on(CPU, "cost")
    layer = experts.Layer(TINY, ExpertWeights(packed=drawn.experts(TINY, random)), o.routed_experts, True)
    few, many = torch.zeros(2, 3, dtype=torch.int32), torch.arange(6, dtype=torch.int32).view(2, 3)
    assert experts.distinct([few, many]) == 3.5
    cheap, dear, both = (layer.cost(ids) for ids in ([few], [many], [few, many]))
    assert both.read_bytes == (cheap.read_bytes + dear.read_bytes) / 2
    assert both.flops == cheap.flops == dear.flops


@pytest.mark.parametrize(
    ("routing", "tokens", "distinct"), [("distinct", 4, 24), ("shared", 8, 6), ("random", 8, None)]
)
def test_routing_is_what_it_is_called(routing: str, tokens: int, distinct: int | None) -> None:
    ids = experts.routes(FLASH, tokens, routing, drawn.random_on(CPU, routing))
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == FLASH.chosen for row in ids.tolist())
    if distinct is not None:
        assert torch.unique(ids).numel() == distinct


def test_layers_that_fit_are_counted_by_their_bytes() -> None:
    whole = sum(s.nbytes for s in drawn.expected_tensors(V4_FLASH) if s.block == "backbone")
    assert stack.layers_that_fit(V4_FLASH, whole) == 43
    assert stack.layers_that_fit(V4_FLASH, whole - 1) == 42
    assert 30 < stack.layers_that_fit(V4_FLASH, 130_000_000_000) < 40
    assert stack.layers_that_fit(V4_FLASH, 0) == 0


def test_fused_experts_are_compared_with_the_same_values_in_other_ways(tmp_path: Path) -> None:
    random = drawn.random_on(CPU, "experts")
    layer = experts.Layer(TINY, ExpertWeights(packed=drawn.experts(TINY, random)), o.routed_experts, True)
    rows = list(experts._of(bench(Emulated(), tmp_path), layer, 8, "random", random))
    by_name = {row.key.rsplit("/", 1)[1]: row for row in rows}
    assert by_name["unfused"].state == "not run"
    assert by_name["8"].state == by_name["bf16"].state == by_name["naive"].state == "ok"
    # four bits and a scale's share against sixteen
    assert int(str(by_name["bf16"].values["read_bytes"])) > 3 * int(str(by_name["8"].values["read_bytes"]))


def test_an_expert_kernel_that_is_wrong_is_red(tmp_path: Path) -> None:
    def wrong(*args: Any) -> torch.Tensor:
        return o.routed_experts(*args) * 1.1

    random = drawn.random_on(CPU, "experts")
    layer = experts.Layer(TINY, ExpertWeights(packed=drawn.experts(TINY, random)), wrong, True)
    rows = list(experts._of(bench(Pretended(), tmp_path), layer, 1, "random", random))
    assert [row.state for row in rows] == ["failed"]
