"""Every op at the released shapes on the device: bytes, FLOPs, the floor they imply, and the share of it that is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from v4sdk.backend import EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.numerics import FAST, Numerics
from v4sdk.ops import OPS
from v4sdk.ops.op import Cost
from v4sdk.testing import judge_case
from v4sdk.testing.arguments import clone, on_backend
from v4sdk_bench.device.replayed import Subject, copies, evidence_of, is_timed, row
from v4sdk_bench.record import Row, not_run
from v4sdk_bench.speed.ceilings import free_bytes
from v4sdk_bench.speed.op_cases import OpCase, argument_bytes, chosen, dtype_of
from v4sdk_bench.speed.timing import Call
from v4sdk_bench.stage import OUT_OF_TIME, Bench

_BUDGET_S = {True: 0.05, False: 0.3}
# judging draws on the host, where the references run too
_LIMIT_BYTES = {True: 300_000_000, False: 4_500_000_000}
_HELD_COPIES = 6


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/op/<op>/<case>`: Flash and Pro on a device, toy sizes in an emulation."""
    own = ModelConfig.from_folder(bundled_folder())
    for subject in subjects(bench):
        key = f"device/op/{subject.label}"
        if not bench.wants(key):
            continue
        bench.say(f"op: {subject.label}")
        red = bench.wrong(f"device/conformance/{subject.op.name}")
        size, free = argument_bytes(subject.case), free_bytes(bench.backend)
        what = f"{subject.op.name}, {subject.case.label}"
        if red is not None:
            yield not_run(key, what, f"no time: {red.key} failed", command=bench.command(key))
        elif bench.left() < 10:
            yield not_run(key, what, OUT_OF_TIME, command=bench.command(key))
        elif size > _LIMIT_BYTES[bench.quick] or (free is not None and size * _HELD_COPIES > free):
            yield not_run(
                key,
                what,
                f"its arguments take {size:,} bytes, too many for this run",
                command=bench.command(key),
            )
        else:
            yield one(bench, key, subject, own)


def subjects(bench: Bench) -> list[OpCase]:
    """Cases in the ops' own order; ops that a model calls at least once per token."""
    if is_timed(bench):
        return [c for c in chosen(quick=bench.quick) if c.real]
    found = []
    for op in OPS.values():
        toys = [c for c in chosen(quick=True, ops=(op.name,)) if c.case.scale == "tiny"]
        found += toys[:1]
    return found


@dataclass(frozen=True)
class Judged:
    """A case held against its reference, ready to be timed.

    Attributes:
        subject: what a row says of it. function: what the backend binds. note: what else is to be said.
        sets: arguments, as many as the cache asks for; none where it is wrong or times mean nothing.
    """

    subject: Subject
    function: Callable[..., Any]
    sets: tuple[dict[str, Any], ...]
    note: str

    def calls(self, function: Callable[..., Any]) -> list[Call] | None:
        """A call of `function` per set of arguments."""
        return [_call(function, given) for given in self.sets] or None


def one(bench: Bench, key: str, case: OpCase, own: ModelConfig) -> Row:
    """Judge a case, then time it."""
    found = judged_case(bench, key, case, own)
    return row(bench, found.subject, found.calls(found.function), _BUDGET_S[bench.quick], found.note)


def judged_case(bench: Bench, key: str, case: OpCase, own: ModelConfig) -> Judged:
    """Hold what the backend binds against the reference."""
    op, backend = case.op, bench.backend
    drawn = case.case.make(torch.device("cpu"))
    config = case.config(own)

    # the same values are judged and timed
    found = judge_case(op, replace(case.case, make=lambda device: drawn), backend, config)
    cost = op.cost(**drawn) if op.cost else Cost(0, 0, 0)
    numerics = next((v for v in drawn.values() if isinstance(v, Numerics)), FAST)
    binding = bind(backend, config, EngineConfig(numerics, numerics.default_kv_format, backend.capability()))
    sets: tuple[dict[str, Any], ...] = ()
    if found.status == "passed" and is_timed(bench):
        first = on_backend(drawn, backend)
        sets = (first, *(clone(first) for _ in range(copies(cost.bytes, backend) - 1)))
    error = found.worst if found.status == "passed" else max(found.worst, math.inf)
    subject = Subject(
        key, f"{op.name}, {case.case.label}", cost, dtype_of(drawn),
        {"op": op.name, "case": case.case.label, "scale": case.case.scale},
        {"error": error, "max_abs": found.max_abs, "relative_l2": found.relative_l2, "how": found.how}, {"error": 1.0},
        evidence_of(bench, found.evidence != "reference"),
    )  # fmt: skip
    return Judged(subject, binding.table[op], sets, found.detail or "")


def _call(function: Any, given: dict[str, Any]) -> Call:
    return lambda: function(**given)
