"""How long a call takes on a device when Python is out of the way: recorded once, replayed, timed by the device's own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from v4sdk.backend import Backend, Evidence
from v4sdk.ops.op import Cost
from v4sdk_bench.record import Row, Value, judged
from v4sdk_bench.speed.ceilings import best, floor_s, last_level_cache_bytes, share
from v4sdk_bench.speed.timing import Call, Sample, device_seconds, judge, load
from v4sdk_bench.stage import Bench, BenchError

# a call that moves less than twice the cache is given so many sets of arguments that none is found there again
_MOST_COPIES = 8
# a replay shorter than this would measure its own start
_SHORTEST_REPLAY_S = 200e-6
_LEAST_ROUNDS, _MOST_CALLS = 15, 64


def is_timed(bench: Bench) -> bool:
    """Whether times mean anything here; an emulation has none."""
    evidence: str = bench.backend.evidence
    return evidence == "device"


def evidence_of(bench: Bench, has_kernel: bool) -> Evidence:
    """What a result is worth: on a device whatever ran there was seen there, in an emulation only kernels are emulated."""
    return bench.backend.evidence if has_kernel or is_timed(bench) else "reference"


def copies(nbytes: int, backend: Backend) -> int:
    """How many sets of arguments a call needs so that none of it is still in the cache from the time before."""
    cache = last_level_cache_bytes(backend.device)
    return max(1, min(_MOST_COPIES, math.ceil(2 * cache / max(1, nbytes)) + 1)) if nbytes < 2 * cache else 1


def unrecorded(run: Call) -> str | None:
    """Why what `Backend.record` gave runs the step itself, after two calls; None where it replays or never says."""
    reason: str | None = getattr(run, "reason", None)
    return reason


class Replay:
    """Calls recorded in a row, as often as it takes to make their start negligible.

    Raises:
        BenchError: the backend records, but not these calls: started by Python each, they have no time of the device's own.
    """

    def __init__(self, calls: Sequence[Call], backend: Backend) -> None:
        self._backend = backend
        once = self._recorded(list(calls))
        seconds = min(device_seconds(once, backend.device, 3))
        again = min(_MOST_CALLS // len(calls), math.ceil(_SHORTEST_REPLAY_S / max(seconds, 1e-9)))
        self.count = len(calls) * max(1, again)
        self._run = once if again <= 1 else self._recorded(list(calls) * again)

    def _recorded(self, calls: list[Call]) -> Call:
        def row() -> None:
            for call in calls:
                call()

        run = self._backend.record(row)
        # as it is, then while it is captured
        run()
        run()
        self._backend.synchronize()
        reason = unrecorded(run)
        if reason is not None:
            raise BenchError(f"no time of the device: the calls were not recorded: {reason}")
        return run

    def seconds(self, rounds: int = 1) -> list[float]:
        """Per call, of each round."""
        return [t / self.count for t in device_seconds(self._run, self._backend.device, rounds)]


def timed(calls: Sequence[Call], backend: Backend, budget_s: float) -> Sample:
    """Replay until the budget is used up; seconds per call."""
    replay, began, found = Replay(calls, backend), time.monotonic(), list[float]()
    while len(found) < _LEAST_ROUNDS or time.monotonic() - began < budget_s:
        found += replay.seconds(5)
    return Sample(tuple(found), 0.0, load())


def against(a: Sequence[Call], b: Sequence[Call], backend: Backend, budget_s: float) -> dict[str, Value]:
    """Two sides in turns and the first against itself, as values of a row: ratio of a's seconds to b's, noise, verdict."""
    first, second = Replay(a, backend), Replay(b, backend)
    rounds: list[tuple[float, float, float]] = []
    began = time.monotonic()
    while len(rounds) < _LEAST_ROUNDS or time.monotonic() - began < budget_s:
        rounds.append((first.seconds()[0], second.seconds()[0], first.seconds()[0]))
    found = judge(rounds)
    return {
        "kernel_a_s": found.a.median, "kernel_b_s": found.b.median, "speed_ratio": found.ratio, "low_ratio": found.low,
        "high_ratio": found.high, "noise": found.noise, "verdict": found.verdict,
    }  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is timed, in the words of its row.

    Attributes:
        key, what: of the row. cost: of one call. dtype: of its matrix products. setting: what another machine must share.
        checked: values of a comparison with the references, with `limits` on them. evidence: of what runs.
    """

    key: str
    what: str
    cost: Cost
    dtype: str
    setting: dict[str, Value]
    checked: dict[str, Value]
    limits: dict[str, float]
    evidence: Evidence


def row(bench: Bench, subject: Subject, calls: Sequence[Call] | None, budget_s: float, note: str = "") -> Row:
    """Time a subject, if it is right and times mean anything here; with its floor and the share reached.

    Args:
        calls: one per set of arguments; None where only correctness is told.
    """
    about: dict[str, Value] = {
        **subject.checked, "read_bytes": subject.cost.read_bytes, "write_bytes": subject.cost.write_bytes,
        "flops": subject.cost.flops,
    }  # fmt: skip
    state = judged(about, subject.limits)
    common: dict[str, Any] = {
        "evidence": subject.evidence, "limits": subject.limits, "setting": subject.setting,
        "command": bench.command(subject.key), "seed": bench.seed,
    }  # fmt: skip
    if state == "failed" or calls is None or subject.evidence != "device":
        return Row(subject.key, subject.what, state, values=about, note=note, **common)
    ceilings = best(bench.record.ceilings)
    try:
        found = timed(calls, bench.backend, budget_s)
        values = about | {
            "kernel_median_s": found.median, "kernel_low_s": found.low, "kernel_high_s": found.high,
            "rounds": len(found.seconds), "spread": found.spread, "sets_of_arguments": len(calls),
        }  # fmt: skip
        floor, bound = floor_s(subject.cost, ceilings, subject.dtype)
        values |= {"floor_s": floor, "bound": bound, "share_of_ceiling": share(floor, found.median)}
    except BenchError as exc:
        failed = f"{exc.message}; {exc.hint}" if exc.hint else exc.message
        return Row(subject.key, subject.what, "failed", values=about, note=failed, **common)
    return Row(subject.key, subject.what, state, values=values, note=note, **common)
