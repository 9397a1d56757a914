"""How long a call takes, and which of two is faster: medians with their spread, interleaved pairs, verdicts in words.

A difference is told only where it is larger than the difference of a build to itself, measured in the same rounds.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from v4sdk_bench.record import Value

if TYPE_CHECKING:
    import torch

# a build that differs from itself by more than this was measured on a machine that does other things too
MAX_NOISE = 0.10
# rounds shorter than this are made of several calls, or the clock itself would be measured
_SHORTEST_ROUND_S = 50e-6
# and in pairs long enough that one interruption of the process does not decide a round
_SHORTEST_PAIR_S = 5e-3

Call = Callable[[], object]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated between neighbours.

    Raises:
        ValueError: without values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    # not a weighted sum: that would miss both neighbours by a rounding where they are equal
    return low + (high - low) * (at - math.floor(at))


@dataclass(frozen=True)
class Sample:
    """Rounds of one call.

    Attributes:
        seconds: wall time of each round, per call. cpu_s: processor seconds of this process per call, all threads, median.
        load: one-minute load average of the machine at the end; NaN where the system does not say.
    """

    seconds: tuple[float, ...]
    cpu_s: float
    load: float

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """10th percentile."""
        return percentile(self.seconds, 0.1)

    @property
    def high(self) -> float:
        """90th percentile."""
        return percentile(self.seconds, 0.9)

    @property
    def spread(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def values(self, prefix: str = "") -> dict[str, Value]:
        """As values of a row."""
        return {
            f"{prefix}median_s": self.median,
            f"{prefix}low_s": self.low,
            f"{prefix}high_s": self.high,
            f"{prefix}rounds": len(self.seconds),
            f"{prefix}cpu_s": self.cpu_s,
        }


@dataclass(frozen=True)
class Paired:
    """Two builds measured in the same rounds.

    Attributes:
        a, b: each for itself. ratio: a's seconds over b's, median over rounds; above 1 where b is faster.
        low, high: 10th and 90th percentile of the ratio. noise: 90th percentile of |a / a - 1| within the rounds.
    """

    a: Sample
    b: Sample
    ratio: float
    low: float
    high: float
    noise: float

    @property
    def verdict(self) -> str:
        """Which is faster and by how much, in words; or that nothing can be said."""
        if self.noise > MAX_NOISE:
            return f"no verdict: the same build differs from itself by {self.noise:.0%}"
        if abs(self.ratio - 1) <= self.noise:
            return f"no difference (within the noise of {_percent(self.noise)})"
        if self.low <= 1 <= self.high:
            return f"no difference (rounds from {self.low:.2f} to {self.high:.2f})"
        if self.ratio > 1:
            return f"b is {self.ratio:.2f} times faster ({self.low:.2f} to {self.high:.2f})"
        return f"b is {1 / self.ratio:.2f} times slower ({1 / self.high:.2f} to {1 / self.low:.2f})"

    def values(self, prefix: str = "") -> dict[str, Value]:
        """As values of a row."""
        return {
            **self.a.values(f"{prefix}a_"),
            **self.b.values(f"{prefix}b_"),
            f"{prefix}speed_ratio": self.ratio,
            f"{prefix}low_ratio": self.low,
            f"{prefix}high_ratio": self.high,
            f"{prefix}noise": self.noise,
        }


def sample(
    call: Call, budget_s: float, least: int = 5, most: int = 1000, sync: Call | None = None, warm: int = 1
) -> Sample:
    """Time a call until the budget is used up.

    Args:
        budget_s: for all of it; exceeded where `least` rounds take longer.
        sync: waits for the device; called before the clock is read. warm: calls that are not counted.
    """
    began = time.perf_counter()
    once = 0.0
    for _ in range(max(0, warm)):
        once = _round(call, 1, sync)[0]
    calls = max(1, math.ceil(_SHORTEST_ROUND_S / once)) if once > 0 else 1
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) < least or (len(wall) < most and time.perf_counter() - began < budget_s):
        seconds, processor = _round(call, calls, sync)
        wall.append(seconds)
        cpu.append(processor)
    return Sample(tuple(wall), statistics.median(cpu), load())


def paired(a: Call, b: Call, budget_s: float, least: int = 5, sync: Call | None = None) -> Paired:
    """Time two calls in turns, and the first of them against itself.

    A round runs a, b and a again; the order rotates from round to round, so that none of the three has a place of its own.
    What else the machine does falls on all of them.
    """
    began = time.perf_counter()
    once = max(min(_round(call, 1, sync)[0] for _ in range(2)) for call in (a, b))
    calls = max(1, math.ceil(_SHORTEST_PAIR_S / once)) if once > 0 else 1
    rounds: list[tuple[float, float, float]] = []
    cpu: dict[int, list[float]] = {0: [], 1: []}
    while len(rounds) < least or time.perf_counter() - began < budget_s:
        times = [0.0, 0.0, 0.0]
        for place in range(3):
            which = (place + len(rounds)) % 3
            times[which], processor = _round(b if which == 1 else a, calls, sync)
            cpu[which % 2].append(processor)
        rounds.append((times[0], times[1], times[2]))
    return judge(rounds, statistics.median(cpu[0]), statistics.median(cpu[1]))


class _HostEvent:
    """A point in time, with the members of a device's event."""

    def record(self) -> None:
        """Happen now."""
        self._at_s = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is outstanding: a host's calls return when they are done."""

    def elapsed_time(self, end: _HostEvent) -> float:
        """Milliseconds until `end`."""
        return (end._at_s - self._at_s) * 1e3


def device_seconds(
    call: Call,
    device: torch.device,
    rounds: int,
    reset: Call | None = None,
    event: Callable[[], Any] | None = None,
) -> list[float]:
    """Seconds that a call takes on the device's own clock: between two events in its queue, the host's share left out.

    Where the processor is the device, its clock is the host's.

    Args:
        reset: called before each round, outside the timed part. event: makes an event; by default one of the device.
    """
    import torch

    make = event or (
        (lambda: torch.Event(device, enable_timing=True)) if device.type != "cpu" else _HostEvent
    )
    found = []
    for _ in range(rounds):
        if reset:
            reset()
        begin, end = make(), make()
        begin.record()
        call()
        end.record()
        end.synchronize()
        # events tell milliseconds
        found.append(begin.elapsed_time(end) / 1e3)  # type: ignore[arg-type]
    return found


def judge(rounds: Sequence[tuple[float, float, float]], a_cpu_s: float = 0.0, b_cpu_s: float = 0.0) -> Paired:
    """Sum up rounds of (a, b, a) seconds."""
    # the mean of both a cancels a drift over the round
    ratios = [(first + second) / 2 / b for first, b, second in rounds]
    itself = [abs(first / second - 1) for first, _, second in rounds]
    a = Sample(tuple(t for first, _, second in rounds for t in (first, second)), a_cpu_s, load())
    b = Sample(tuple(t for _, t, _ in rounds), b_cpu_s, load())
    return Paired(
        a, b, statistics.median(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9), percentile(itself, 0.9)
    )  # fmt: skip


def load() -> float:
    """One-minute load average, NaN where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return math.nan


def _round(call: Call, calls: int, sync: Call | None) -> tuple[float, float]:
    """Wall and processor seconds per call."""
    if sync:
        sync()
    processor, began = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    if sync:
        sync()
    ended = time.perf_counter()
    return (ended - began) / calls, (time.process_time() - processor) / calls


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.01 else f"{share:.0%}"
