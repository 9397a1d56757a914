"""The expert-parallel measurement: right before fast, an emulated link that keeps its word, and rows with honest names."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk.plugins import select
from v4sdk_bench.claims import expert_parallel
from v4sdk_bench.claims.expert_parallel import bound, measure, rows
from v4sdk_bench.claims.expert_parallel_rank import DelayedLink, Load
from v4sdk_bench.record import Record
from v4sdk_bench.stage import Bench, BenchError

TINY = Load(
    processes=2, tokens=7, hidden=64, width=32, experts=5, chosen=2, waves=2, budget_s=0.1, least=3,
    bandwidth_bytes_per_s=1e6, latency_s=2e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(TINY, tmp_path_factory.mktemp("scratch"))


def test_both_schedules_are_checked_and_timed_over_both_links(found: dict[str, Any]) -> None:
    first, second = rows(found, TINY, "reference", 1.0)
    assert first.key == "claims/expert-parallel/gloo/2"
    assert first.what == "wave overlap vs our sequential exchange (gloo, 2 processes)"
    assert second.key == "claims/expert-parallel/emulated-link/2"
    assert "emulated link" in second.what
    assert (second.setting["link"], second.setting["link_bytes_per_s"]) == ("emulated link", 1e6)
    assert "1 MB/s each way and 2 ms" in second.note
    for row in (first, second):
        assert (row.state, row.evidence, row.values["unequal_elements"]) == ("ok", "reference", 0)
        assert row.values["a_rounds"] >= 2 * TINY.least
        assert row.values["speed_ratio"] > 0
        assert 1 < row.values["bound_ratio"] < 2
        assert "--processes 2" in row.command
        assert "1.5" not in row.what
        assert "1.9" not in row.what
    # three transfers one after the other, each held back by the latency
    assert second.values["transfer_s"] > 3 * TINY.latency_s


def test_a_wrong_schedule_fails_and_has_no_speed(tmp_path: Path) -> None:
    load = replace(TINY, planted=True)
    found = measure(load, tmp_path)
    # one element on each rank and link
    assert found["unequal"] == 4
    for row in rows(found, load, "reference", 1.0):
        assert row.state == "failed"
        assert row.values == {"unequal_elements": 4}


def test_a_rank_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="rank [01] of 2 ended with status 1: .*absent"):
        measure(replace(TINY, backend="absent"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass
class _Instant:
    waited: list[str] = field(default_factory=list)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> _Instant:
        return self

    def wait(self) -> None:
        self.waited.append("wait")


def _transfer(link: DelayedLink, sent: list[int], received: list[int]) -> Any:
    return link.all_to_all(torch.empty(sum(received), 100), torch.empty(sum(sent), 100), received, sent)


def test_a_delayed_link_takes_as_long_as_its_bytes_and_latency() -> None:
    inner = _Instant()
    link = DelayedLink(inner, 0, bandwidth_bytes_per_s=400e3, latency_s=0.01)
    start = time.perf_counter()
    # 50 rows of 400 bytes come in, 25 go out; those of the rank itself cross nothing
    _transfer(link, [999, 25], [999, 50]).wait()
    assert 0.06 <= time.perf_counter() - start < 1.0
    assert inner.waited == ["wait"]


def test_transfers_of_a_delayed_link_queue() -> None:
    link = DelayedLink(_Instant(), 0, bandwidth_bytes_per_s=400e3, latency_s=0.0)
    start = time.perf_counter()
    first, second = (_transfer(link, [0, 40], [0, 0]) for _ in range(2))
    second.wait()
    assert time.perf_counter() - start >= 0.08
    before = time.perf_counter()
    first.wait()
    assert time.perf_counter() - before < 0.03, "it had arrived long before"


def test_the_bound_counts_the_part_that_cannot_hide() -> None:
    assert bound(1.0, 1.0, 1) == 1.0
    assert bound(1.0, 1.0, 4) == pytest.approx(1.6)
    assert bound(3.0, 1.0, 10**9) == pytest.approx(4 / 3)
    assert bound(1.0, 0.0, 4) == 1.0


def _bench(tmp_path: Path, **fields: Any) -> Bench:
    record = Record("", "", {}, {}, {})
    return Bench(select("cpu"), record, tmp_path, tmp_path, quick=True, **fields)


def test_the_stage_measures_each_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Load] = []

    def note(load: Load, scratch: Path) -> dict[str, Any]:
        asked.append(load)
        return {"unequal": 1}

    monkeypatch.setattr(expert_parallel, "measure", note)
    made = list(expert_parallel.STAGE.run(_bench(tmp_path)))
    assert [load.processes for load in asked] == [2, 4]
    assert [row.key for row in made] == [
        f"claims/expert-parallel/{link}/{n}" for n in (2, 4) for link in ("gloo", "emulated-link")
    ]


def test_the_stage_says_what_it_skips(tmp_path: Path) -> None:
    made = list(expert_parallel.STAGE.run(_bench(tmp_path, deadline=time.monotonic())))
    assert [row.state for row in made] == ["not run"] * 4
    assert {row.note for row in made} == {"the budget of this stage is used up"}
