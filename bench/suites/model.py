"""Suite `model`: whole models over context, batches and memory; single layers of the released sizes; peers.

Correctness first: a model whose decoding differs from reading the same tokens at once has no speed, and neither has one whose
parity is red in the same record.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from v4sdk.errors import MemoryRefused
from v4sdk_bench.peers.stage import STAGE as PEERS
from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.speed.timing import Sample, load, paired, percentile
from v4sdk_bench.stage import OUT_OF_TIME, Bench, Stage
from v4sdk_bench.suites.model_layers import layers
from v4sdk_bench.suites.model_memory import memory
from v4sdk_bench.suites.model_rows import Subject, evidence, kernels, row_of, subject
from v4sdk_bench.suites.model_step import STAGE as STEP

if TYPE_CHECKING:
    from v4sdk import Session
    from v4sdk_bench.speed.frontier import Frontier, Loading

BATCHES = (1, 4, 16)
_CONTEXT = 512
_BATCH_STEPS = {True: 24, False: 128}
_PAIR_S = {True: 3.0, False: 20.0}


def whole(bench: Bench) -> Iterator[Row]:
    """Rows of one model: gate, load, frontiers, batches, calls, numerics and noise."""
    from v4sdk import Session

    about = subject(bench)
    key = f"model/{about.name}"
    bench.say(f"{about.name}: decoding against reading at once")
    with (
        Session.load(about.folder, backend=bench.backend, numerics="exact") as exact,
        Session.load(about.folder, backend=bench.backend) as session,
    ):
        about = replace(
            about, setting=about.setting | {"numerics": session.numerics.name, "kv_format": session.kv_format}
        )
        gate = _gate_row(bench, about, exact, session)
    yield gate
    red = gate if gate.state == "failed" else _red(bench, about.name)
    if red is not None:
        what = f"{about.name}: speed"
        note = f"no speed: {red.key} is red"
        for part in ("load", "frontier", "batch", "calls", "numerics", "noise"):
            yield Row(f"{key}/{part}", what, "failed", evidence(bench, {}), setting=about.setting, note=note,
                      command=bench.command(f"{key}/{part}"), seed=bench.seed)  # fmt: skip
        return
    yield from _frontiers(bench, about)
    with Session.load(about.folder, backend=bench.backend) as session:
        yield from _batches(bench, about, session)
        if bench.wants(f"{key}/calls"):
            yield _calls(bench, about, session)
        yield from _pairs(bench, about, session)


def _red(bench: Bench, name: str) -> Row | None:
    """What the parity suite of this run found wrong with the model."""
    rows = (*bench.record.under("parity/model/"), *bench.record.under("parity/invariance/"))
    return next((r for r in rows if r.state == "failed" and r.setting.get("model", name) == name), None)


def _gate_row(bench: Bench, about: Subject, exact: Session, session: Session) -> Row:
    from v4sdk_bench.speed.model import EXACT_LIMIT, KL_LIMIT, gate

    found = gate(exact, session, bench.seed)
    values = {"exact_relative_l2": found.exact, "kl_mean": found.kl_mean, "finite": int(found.finite)}
    limits = {"exact_relative_l2": EXACT_LIMIT, "kl_mean": KL_LIMIT, ">=finite": 1}
    key = f"model/{about.name}/gate"
    return row_of(
        bench, key, f"{about.name}: decoding equals reading at once", about.setting, values, limits=limits
    )


def _frontiers(bench: Bench, about: Subject) -> Iterator[Row]:
    import torch

    from v4sdk_bench.speed import frontier

    key = f"model/{about.name}"
    reads, made_up = (
        (frontier.QUICK, frontier.SYNTHETIC) if bench.quick else (frontier.FULL, frontier.FULL_SYNTHETIC)
    )
    # a segment is what was read since the last frontier, so all are walked or none
    reads = reads if any(bench.wants(f"{key}/frontier/{n}") for n in reads) else ()
    made_up = tuple(n for n in made_up if bench.wants(f"{key}/frontier/{n}/synthetic"))
    if not (reads or made_up or bench.wants(f"{key}/load")):
        return
    setting = about.setting | {"probe": frontier.PROBE}
    plan = frontier.Walk(
        bench.backend.name, about.folder, reads, made_up, seed=bench.seed, threads=torch.get_num_threads()
    )  # fmt: skip
    waiting = [f"{key}/frontier/{n}" for n in reads] + [f"{key}/frontier/{n}/synthetic" for n in made_up]
    bench.say(f"{about.name}: loading in a process of its own")
    for found in frontier.in_a_process(plan):
        if isinstance(found, frontier.Frontier):
            row = _frontier_row(bench, about, found, setting)
            waiting.remove(row.key)
            yield row
            bench.say(f"{about.name}: {found.tokens:,} tokens of context done")
        else:
            yield _load_row(bench, about, found)
        if bench.left() < 0:
            break
    for left in waiting:
        yield not_run(left, f"{about.name}: a context frontier", OUT_OF_TIME,
                      setting=setting, command=bench.command(left))  # fmt: skip


def _load_row(bench: Bench, about: Subject, found: Loading) -> Row:
    values: dict[str, Value] = {
        "load_s": found.load_s, "start_s": found.start_s, "peak_bytes": found.peak_bytes, "load": load(),
    }  # fmt: skip
    note = "start_s is from the start of the process, imports included; files warm"
    return row_of(
        bench, f"model/{about.name}/load", f"{about.name}: loading", about.setting, values, note=note
    )


def _frontier_row(bench: Bench, about: Subject, found: Frontier, shared: dict[str, Value]) -> Row:
    key = f"model/{about.name}/frontier/{found.tokens}{'/synthetic' if found.synthetic else ''}"
    what = f"{about.name}: {found.tokens:,} tokens of context{', synthetic KV' if found.synthetic else ''}"
    setting = shared | {"tokens": found.tokens, "state": "synthetic KV" if found.synthetic else "read"}
    if found.refused is not None:
        return not_run(key, what, found.refused, setting=setting, command=bench.command(key))
    if not found.finite:
        return Row(key, what, "failed", evidence(bench, {}), setting=setting, seed=bench.seed,
                   note="a log-probability is not a number", command=bench.command(key))  # fmt: skip
    note = "peak_bytes is of the whole walk so far, from short to long contexts"
    return row_of(bench, key, what, setting, {**found.values(), "load": load()}, note=note)


def _batches(bench: Bench, about: Subject, session: Session) -> Iterator[Row]:
    from v4sdk_bench.speed.model import aggregate, batch

    for size in BATCHES:
        key = f"model/{about.name}/batch/{size}"
        if not bench.wants(key):
            continue
        bench.say(f"{about.name}: {size} sequences at once")
        setting = about.setting | {"batch": size, "context": _CONTEXT}
        what = f"{about.name}: {size} sequence{'s' if size > 1 else ''} decoded at once"
        try:
            found = batch(session, size, _CONTEXT, _BATCH_STEPS[bench.quick], bench.seed)
        except MemoryRefused as exc:
            yield not_run(key, what, exc.message, setting=setting, command=bench.command(key))
            continue
        if not found.probe.finite:
            yield Row(key, what, "failed", evidence(bench, {}), setting=setting, seed=bench.seed,
                      note="a log-probability is not a number", command=bench.command(key))  # fmt: skip
            continue
        steps = Sample(found.probe.seconds, 0.0, load())
        values: dict[str, Value] = {
            "tpot_s": steps.median, "tpot_low_s": steps.low, "tpot_high_s": steps.high,
            "tpot_p99_s": percentile(steps.seconds, 0.99), "steps": len(steps.seconds),
            "all_tokens_per_s": aggregate(size, steps.seconds), "each_tokens_per_s": 1 / steps.median, "load": steps.load,
        }  # fmt: skip
        if found.probe.kernel_seconds:
            values["kernel_tpot_s"] = statistics.median(found.probe.kernel_seconds)
        yield row_of(bench, key, what, setting, values)


def _calls(bench: Bench, about: Subject, session: Session) -> Row:
    from v4sdk_bench.speed.model import calls

    bench.say(f"{about.name}: counting calls")
    found = calls(session, _CONTEXT, bench.seed)
    values: dict[str, Value] = {
        "op_calls": sum(found.ops.values()), "library_calls": found.torch_calls, "by_op": dict(sorted(found.ops.items())),
        "read_bytes": found.cost.read_bytes, "write_bytes": found.cost.write_bytes, "flops": found.cost.flops,
    }  # fmt: skip
    note = "library calls are those of torch below the ops, views included"
    setting = about.setting | {"context": _CONTEXT, "backend": bench.backend.name}
    return row_of(
        bench,
        f"model/{about.name}/calls",
        f"{about.name}: calls of one decoded token",
        setting,
        values,
        note=note,
    )


def _pairs(bench: Bench, about: Subject, session: Session) -> Iterator[Row]:
    """Numerics against numerics, and the same build against itself."""
    from v4sdk import Session as Loader
    from v4sdk_bench.speed.model import decode_step

    key, budget = f"model/{about.name}", _PAIR_S[bench.quick]
    setting = {k: v for k, v in about.setting.items() if k != "numerics"} | {"context": _CONTEXT}
    if bench.wants(f"{key}/numerics"):
        bench.say(f"{about.name}: reference and fast numerics in turns")
        with (
            Loader.load(about.folder, backend=bench.backend, numerics="reference") as slow,
            Loader.load(about.folder, backend=bench.backend, numerics="fast") as fast,
        ):
            a, b = decode_step(slow, _CONTEXT), decode_step(fast, _CONTEXT)
            found = paired(a, b, budget)
            own = kernels(bench, a=a, b=b)
        yield row_of(bench, f"{key}/numerics", f"{about.name}: a decode step in reference (a) and fast (b) numerics", setting,
                   {**found.values(), "verdict": found.verdict, **own})  # fmt: skip
    if bench.wants(f"{key}/noise"):
        bench.say(f"{about.name}: the same build against itself")
        a, b = decode_step(session, _CONTEXT), decode_step(session, _CONTEXT)
        found, own = paired(a, b, budget), kernels(bench, a=a, b=b)
        yield row_of(bench, f"{key}/noise", f"{about.name}: a decode step against itself", about.setting | {"context": _CONTEXT},
                   {**found.values(), "verdict": found.verdict, "load": load(), **own})  # fmt: skip


STAGES = (
    Stage("model/whole", whole, 45.0, 900.0),
    Stage("model/memory", memory, 25.0, 900.0),
    Stage("model/layers", layers, 35.0, 1800.0),
    STEP,
    PEERS,
)
