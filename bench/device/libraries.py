"""Other people's libraries against our own kernels: where one serves an op, both sides in turns on the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.numerics import FAST, REFERENCE
from v4sdk.ops import OPS
from v4sdk.ops.op import Op
from v4sdk_bench.device.op_rows import judged_case
from v4sdk_bench.device.replayed import against, is_timed, row
from v4sdk_bench.record import Row, not_run
from v4sdk_bench.speed.ceilings import free_bytes
from v4sdk_bench.speed.op_cases import OpCase, argument_bytes
from v4sdk_bench.stage import OUT_OF_TIME, Bench

_BUDGET_S = {True: 0.1, False: 1.0}
_LIMIT_BYTES = {True: 300_000_000, False: 4_500_000_000}
# arguments of the library's calls, of ours, and of the comparison with the reference
_HELD_COPIES = 6
_SCALES = {True: ("flash",), False: ("flash", "pro")}
_LAYOUTS = ("decode", "prefill")


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/library/<op>/<case>`: a is the library, b ours; `device/library/<op>` with reasons where none serves."""
    own = ModelConfig.from_folder(bundled_folder())
    for op in OPS.values():
        key = f"device/library/{op.name}"
        if not bench.wants(key):
            continue
        ours, declined = (
            bench.backend.variants(op.name).get("ours"),
            "; ".join(bench.backend.declined(op.name)),
        )
        what = f"{op.name}: a library of others against our kernel"
        red = bench.wrong(f"device/conformance/{op.name}")
        if ours is None:
            if declined:
                yield not_run(key, what, declined, command=bench.command(key))
        elif red is not None or not is_timed(bench):
            why = f"no time: {red.key} failed" if red else "an emulation has no times"
            yield not_run(key, what, why, command=bench.command(key))
        else:
            for case in _cases(bench, op):
                yield _compared(bench, f"{key}/{case.case.label}", case, own, ours, declined)


def _cases(bench: Bench, op: Op[..., Any]) -> Iterator[OpCase]:
    """Of the released sizes, also in the numerics that round every product's input: some libraries take no other."""
    for case in op.inputs() if op.inputs else ():
        words = case.label.split("-")
        if case.scale not in _SCALES[bench.quick] or not any(word in _LAYOUTS for word in words):
            continue
        yield OpCase(op, case)
        if "numerics" in op.signature.parameters and words[-1] == FAST.name:
            yield OpCase(
                op, replace(case, label="-".join((*words[:-1], REFERENCE.name)), make=_rounding(case.make))
            )


def _rounding(make: Callable[[torch.device], dict[str, Any]]) -> Callable[[torch.device], dict[str, Any]]:
    return lambda device: {**make(device), "numerics": REFERENCE}


def _compared(
    bench: Bench, key: str, case: OpCase, own: ModelConfig, ours: Callable[..., Any], declined: str
) -> Row:  # fmt: skip
    what = f"{case.op.name}, {case.case.label}: a library of others (a) against our kernel (b)"
    size, free = argument_bytes(case.case), free_bytes(bench.backend)
    if bench.left() < 10:
        return not_run(key, what, OUT_OF_TIME, command=bench.command(key))
    if size > _LIMIT_BYTES[bench.quick] or (free is not None and size * _HELD_COPIES > free):
        why = f"its arguments take {size:,} bytes, too many for this run"
        return not_run(key, what, why, command=bench.command(key))
    bench.say(f"library: {case.label}")
    judged = judged_case(bench, key, case, own)
    theirs, mine = judged.calls(judged.function), judged.calls(ours)
    found = row(bench, replace(judged.subject, what=what), theirs, _BUDGET_S[bench.quick], judged.note)
    if found.state == "failed" or theirs is None or mine is None:
        return found
    told = against(theirs, mine, bench.backend, _BUDGET_S[bench.quick])
    said = ("a: the library, or ours where it takes no such call; b: ours", judged.note, declined)
    return replace(found, values={**found.values, **told}, note="; ".join(filter(None, said)))
