"""Every kernel against its reference, on the device: the cases of `v4sdk conformance`, one row per op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS
from v4sdk.ops.op import Case
from v4sdk.testing import CaseResult, judge_case
from v4sdk_bench.device.replayed import is_timed
from v4sdk_bench.record import Row, judged, not_run
from v4sdk_bench.stage import OUT_OF_TIME, Bench

_SCALES = ("tiny", "odd", "edge")
# an interpreter takes a second where a device takes a millisecond
_TOY_CASES = 2


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/conformance/<op>`; an op whose row is red has no times in the stages after this one."""
    config = ModelConfig.from_folder(bundled_folder())
    for op in OPS.values():
        key = f"device/conformance/{op.name}"
        if not bench.wants(key):
            continue
        bench.say(f"conformance: {op.name}")
        every = [case for case in (op.inputs() if op.inputs else ()) if case.scale in _SCALES]
        cases = every if is_timed(bench) else _toys(every)
        found = []
        for case in cases:
            if bench.left() < 0:
                break
            found.append(judge_case(op, case, bench.backend, config))
        if not found:
            yield not_run(
                key,
                f"{op.name} against its reference",
                OUT_OF_TIME,
                command=bench.command(key),
            )
            continue
        yield _row(bench, key, op.name, found, len(every))


def _toys(cases: Sequence[Case]) -> list[Case]:
    """A decode step and a chunk, both in the default numerics where the op has any."""
    usual = [c for c in cases if "fast" in c.label] or list(cases)
    steps = [c for c in usual if "decode" in c.label][:1] + [c for c in usual if "chunk" in c.label][:1]
    return steps or list(usual[:_TOY_CASES])


def _row(bench: Bench, key: str, op: str, found: Sequence[CaseResult], every: int) -> Row:
    bad = [one for one in found if one.status not in ("passed", "known gap")]
    worst = max(found, key=lambda one: one.worst)
    values = {
        "cases": len(found), "of_cases": every, "failed": len(bad), "error": worst.worst,
        "max_abs": max(one.max_abs for one in found), "relative_l2": max(one.relative_l2 for one in found),
        "cosine": min(one.cosine for one in found), "how": worst.how,
    }  # fmt: skip
    limits = {"failed": 0.0}
    evidence = "reference" if all(one.evidence == "reference" for one in found) else bench.backend.evidence
    note = "; ".join(f"{one.case}: {one.detail}" for one in bad[:3]) or f"worst in {worst.case}"
    return Row(
        key, f"{op} against its reference", judged(values, limits), evidence, values=values, limits=limits, note=note,
        command=bench.command(key),
    )  # fmt: skip
