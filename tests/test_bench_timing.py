"""Statistics, verdicts at the border of the noise, ceilings and floors."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from v4sdk.ops.op import Cost
from v4sdk_bench.speed import timing
from v4sdk_bench.speed.ceilings import BYTES, FLOPS, Ceiling, best, floor_s, measure, share
from v4sdk_bench.speed.timing import Sample, device_seconds, judge, paired, percentile, sample
from v4sdk_bench.stage import BenchError


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = self.processor = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.processor

    def spend(self, seconds: float, threads: float = 1.0) -> None:
        self.now += seconds
        self.processor += seconds * threads


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert percentile([5.0], 0.9) == 5.0
    assert percentile([0.1] * 7, 0.9) == 0.1
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_sample_tells_median_and_ends() -> None:
    found = Sample(tuple(float(n) for n in range(1, 12)), 4.0, 0.5)
    assert (found.median, found.low, found.high) == (6.0, 2.0, 10.0)
    assert found.spread == pytest.approx(8 / 6)
    assert found.values("a_") == {
        "a_median_s": 6.0,
        "a_low_s": 2.0,
        "a_high_s": 10.0,
        "a_rounds": 11,
        "a_cpu_s": 4.0,
    }


def test_a_sample_fills_its_budget_without_the_warm_calls(clock: Clock) -> None:
    costs = iter([9.0] + [1.0] * 100)
    found = sample(lambda: clock.spend(next(costs), threads=2), budget_s=20.0)
    # 9 s were spent on the warm call, which is not among the rounds
    assert found.seconds == (1.0,) * 11
    assert found.cpu_s == 2.0


def test_a_slow_call_is_repeated_all_the_same(clock: Clock) -> None:
    assert len(sample(lambda: clock.spend(60.0), budget_s=1.0, least=5).seconds) == 5
    assert len(sample(lambda: clock.spend(0.001), budget_s=1e9, most=17).seconds) == 17


def test_calls_too_short_for_the_clock_are_grouped(clock: Clock) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.spend(1e-6)

    found = sample(call, budget_s=0.0, least=4)
    assert found.seconds == pytest.approx([1e-6] * 4)
    # 50 us of calls that take 1 us, or one call more where the division rounds up
    assert calls in (1 + 4 * 50, 1 + 4 * 51)


def test_the_device_is_waited_for_before_the_clock_is_read(clock: Clock) -> None:
    queued = []
    found = sample(
        lambda: queued.append(2.0), 0.0, least=3, sync=lambda: [clock.spend(queued.pop()) for _ in queued[:]]
    )
    assert found.seconds == (2.0,) * 3


def test_pairs_rotate_and_drop_no_build(clock: Clock) -> None:
    order: list[str] = []

    def build(name: str, seconds: float) -> Any:
        return lambda: (order.append(name), clock.spend(seconds))

    found = paired(build("a", 2.0), build("b", 1.0), budget_s=0.0, least=6)
    warm, rounds = order[:4], ["".join(order[4 + at : 7 + at]) for at in range(0, 18, 3)]
    assert warm == ["a", "a", "b", "b"]
    assert Counter(rounds) == {"aba": 2, "baa": 2, "aab": 2}
    assert (found.ratio, found.low, found.high, found.noise) == (2.0, 2.0, 2.0, 0.0)
    assert (len(found.a.seconds), len(found.b.seconds)) == (12, 6)
    assert found.verdict == "b is 2.00 times faster (2.00 to 2.00)"


def rounds_of(ratio: float, noise: float, count: int = 10) -> list[tuple[float, float, float]]:
    """Rounds in which the first a is slower than the second by `noise`, and b is `ratio` times faster than their mean."""
    return [(1.0 + noise, (2.0 + noise) / 2 / ratio, 1.0) for _ in range(count)]


@pytest.mark.parametrize(
    ("ratio", "noise", "said"),
    [
        (1.42, 0.03, "b is 1.42 times faster (1.42 to 1.42)"),
        (0.5, 0.03, "b is 2.00 times slower (2.00 to 2.00)"),
        (1.029, 0.03, "no difference (within the noise of 3%)"),
        (0.971, 0.03, "no difference (within the noise of 3%)"),
        (1.031, 0.03, "b is 1.03 times faster (1.03 to 1.03)"),
        (5.0, 0.11, "no verdict: the same build differs from itself by 11%"),
        (1.0, 0.0, "no difference (within the noise of 0.0%)"),
    ],
)
def test_verdicts_at_the_border_of_the_noise(ratio: float, noise: float, said: str) -> None:
    assert judge(rounds_of(ratio, noise)).verdict == said


def test_rounds_on_both_sides_of_one_are_no_difference() -> None:
    rounds = [(1.0, 0.8, 1.0), (1.0, 1.2, 1.0), (1.0, 0.9, 1.0)] * 5
    assert judge(rounds).verdict == "no difference (rounds from 0.83 to 1.25)"


def test_values_of_a_pair_end_in_their_units() -> None:
    values = judge(rounds_of(2.0, 0.05)).values()
    assert values["speed_ratio"] == pytest.approx(2.0)
    assert values["noise"] == pytest.approx(0.05)
    assert {"low_ratio", "high_ratio", "a_median_s", "b_median_s"} <= set(values)


def test_device_time_is_read_between_events() -> None:
    told: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.at = 0

        def record(self) -> None:
            told.append("record")
            self.at = len(told)

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at)

    found = device_seconds(
        lambda: told.append("call"), torch.device("cpu"), 2, lambda: told.append("reset"), Event
    )
    assert told == ["reset", "record", "call", "record", "wait"] * 2
    assert found == [2.0, 2.0]


def ceiling(name: str, value: float, unit: str = FLOPS) -> Ceiling:
    return Ceiling(name, value, unit, value, value, 1, 8, "2026-01-01T00:00:00+00:00")


MACHINE = [
    ceiling("copy", 20e9, BYTES), ceiling("read", 25e9, BYTES), ceiling("gemm/float32", 100e9),
    ceiling("gemm/bfloat16", 400e9), ceiling("gemm/int8", 800e9),
]  # fmt: skip


def test_floors_by_hand() -> None:
    # 50 MB at the faster of read and copy is 2 ms; 200 MFLOP at 400 GFLOP/s half a millisecond
    bytes_bound = Cost(40_000_000, 10_000_000, 200_000_000)
    assert floor_s(bytes_bound, MACHINE, "bfloat16") == (pytest.approx(2e-3), "bytes")
    assert floor_s(bytes_bound, MACHINE, "bfloat16", in_cache=True) == (pytest.approx(0.5e-3), "flops")
    # in float32 the same products take 2 ms too; a little more and they are what bounds
    assert floor_s(replace(bytes_bound, flops=210_000_000), MACHINE, "float32") == (
        pytest.approx(2.1e-3),
        "flops",
    )
    assert floor_s(Cost(25, 0, 0), MACHINE, "float32") == (pytest.approx(1e-9), "bytes")
    assert floor_s(Cost(25, 0, 0), MACHINE, "float32", in_cache=True) == (0.0, "flops")


def test_a_narrow_product_may_run_wide_where_that_is_faster() -> None:
    slow = [c for c in MACHINE if c.name != "gemm/bfloat16"] + [ceiling("gemm/bfloat16", 10e9)]
    assert floor_s(Cost(0, 0, 100_000_000), slow, "bfloat16")[0] == pytest.approx(1e-3)


def test_no_floor_without_its_ceiling() -> None:
    with pytest.raises(BenchError, match="matrix products in float32"):
        floor_s(Cost(8, 0, 8), [ceiling("read", 1e9, BYTES)], "float32")
    with pytest.raises(BenchError, match="memory bandwidth"):
        floor_s(Cost(8, 0, 0), [ceiling("gemm/float32", 1e9)], "float32")


def test_nothing_is_faster_than_its_floor() -> None:
    assert share(1.0, 4.0) == 0.25
    assert share(1.0, 1.0) == 1.0
    with pytest.raises(BenchError, match="below its floor.*120% of the ceiling"):
        share(1.2, 1.0)


def test_the_best_of_before_and_after_counts() -> None:
    after = [ceiling("read", 30e9, BYTES), ceiling("gemm/float32", 90e9)]
    found = {c.name: c.value for c in best([*MACHINE, *(asdict(c) for c in after)])}
    assert found["read"] == 30e9
    assert found["gemm/float32"] == 100e9
    assert len(found) == len(MACHINE)


@pytest.fixture(scope="module")
def measured() -> list[Ceiling]:
    return measure(
        torch.device("cpu"), None, 0.3, ("float32", "bfloat16", "no_such_dtype"), buffer_bytes=8_000_000
    )


def test_ceilings_of_this_machine(measured: list[Ceiling]) -> None:
    assert [c.name for c in measured] == ["copy", "read", "gemm/float32", "gemm/bfloat16"]
    for found in measured:
        assert 0 < found.low <= found.high <= found.value
        assert found.threads == torch.get_num_threads()
        assert found.how
    assert {c.buffer_bytes for c in measured[:2]} == {8 << 20}
    # a copy counts what it reads and what it writes: of the same order as reading, not a fiftieth
    assert measured[0].value > measured[1].value / 20
