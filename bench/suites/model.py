"""Suite `model`: whole models over context, batches and memory; single layers of the released sizes; peers.

Correctness first: a model whose decoding differs from reading the same tokens at once has no speed, and neither has one whose
parity is red in the same record.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4sdk.errors import MemoryRefused
from v4sdk_bench.peers.stage import STAGE as PEERS
from v4sdk_bench.record import SPEED_ENDINGS, Row, Value, judged, not_run
from v4sdk_bench.stage import Bench, BenchError, Stage
from v4sdk_bench.timing import Call, Sample, device_seconds, load, paired, percentile, sample

if TYPE_CHECKING:
    from v4sdk import Session
    from v4sdk_bench.frontier import Frontier, Loading
    from v4sdk_bench.real_shapes import LayerCase

BUNDLED = "v4-nano"
BATCHES = (1, 4, 16)
_CONTEXT = 512
_BATCH_STEPS = {True: 24, False: 128}
_PAIR_S = {True: 3.0, False: 20.0}
_LAYER_S = {True: 4.0, False: 20.0}
_MEMORY = {True: (1024, 8192), False: (16_384, 131_072)}
_CHUNK_TOKENS = {True: 4096, False: 131_072}
_CEILINGS_S = {True: 3.0, False: 20.0}
_PAIRS = 5
_KERNEL_ROUNDS = 10


@dataclass(frozen=True)
class Subject:
    """The model under test: its name in keys, its folder for loading, and what its rows must share with others'."""

    name: str
    folder: str | None
    setting: dict[str, Value]


def subject(bench: Bench) -> Subject:
    """Name the model and note it in the record."""
    from v4sdk.checkpoint import Checkpoint
    from v4sdk.loading import bundled_folder

    folder = bench.model or bundled_folder()
    name = BUNDLED if bench.model is None else Path(bench.model).resolve().name
    with Checkpoint(folder) as checkpoint:
        about = {"fingerprint": checkpoint.fingerprint(), "bytes": checkpoint.nbytes}
        layers, hidden = checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size
    bench.record.models[name] = {
        **bench.record.models.get(name, {}),
        **about,
        "layers": layers,
        "hidden": hidden,
    }
    return Subject(
        name, str(bench.model) if bench.model else None, {"model": name, "fingerprint": about["fingerprint"]}
    )  # fmt: skip


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
            yield Row(f"{key}/{part}", what, "failed", _evidence(bench, {}), setting=about.setting, note=note,
                      command=_command(bench, f"{key}/{part}"), seed=bench.seed)  # fmt: skip
        return
    yield from _frontiers(bench, about)
    with Session.load(about.folder, backend=bench.backend) as session:
        yield from _batches(bench, about, session)
        if bench.wants(f"{key}/calls"):
            yield _calls(bench, about, session)
        yield from _pairs(bench, about, session)


def _red(bench: Bench, name: str) -> Row | None:
    return bench.wrong(f"parity/model/{name}/") or bench.wrong(f"parity/invariance/{name}/")


def _gate_row(bench: Bench, about: Subject, exact: Session, session: Session) -> Row:
    from v4sdk_bench.model_speed import EXACT_LIMIT, KL_LIMIT, gate

    found = gate(exact, session, bench.seed)
    values = {"exact_relative_l2": found.exact, "kl_mean": found.kl_mean, "finite": int(found.finite)}
    limits = {"exact_relative_l2": EXACT_LIMIT, "kl_mean": KL_LIMIT, ">=finite": 1}
    key = f"model/{about.name}/gate"
    return _row(
        bench, key, f"{about.name}: decoding equals reading at once", about.setting, values, limits=limits
    )


def _frontiers(bench: Bench, about: Subject) -> Iterator[Row]:
    import torch

    from v4sdk_bench import frontier

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
        yield not_run(left, f"{about.name}: a context frontier", "the time of this stage was used up",
                      setting=setting, command=_command(bench, left))  # fmt: skip


def _load_row(bench: Bench, about: Subject, found: Loading) -> Row:
    values: dict[str, Value] = {
        "load_s": found.load_s, "start_s": found.start_s, "peak_bytes": found.peak_bytes, "load": load(),
    }  # fmt: skip
    note = "start_s is from the start of the process, imports included; files warm"
    return _row(bench, f"model/{about.name}/load", f"{about.name}: loading", about.setting, values, note=note)


def _frontier_row(bench: Bench, about: Subject, found: Frontier, shared: dict[str, Value]) -> Row:
    key = f"model/{about.name}/frontier/{found.tokens}{'/synthetic' if found.synthetic else ''}"
    what = f"{about.name}: {found.tokens:,} tokens of context{', synthetic KV' if found.synthetic else ''}"
    setting = shared | {"tokens": found.tokens, "state": "synthetic KV" if found.synthetic else "read"}
    if found.refused is not None:
        return not_run(key, what, found.refused, setting=setting, command=_command(bench, key))
    if not found.finite:
        return Row(key, what, "failed", _evidence(bench, {}), setting=setting, seed=bench.seed,
                   note="a log-probability is not a number", command=_command(bench, key))  # fmt: skip
    return _row(bench, key, what, setting, {**found.values(), "load": load()})


def _batches(bench: Bench, about: Subject, session: Session) -> Iterator[Row]:
    from v4sdk_bench.model_speed import aggregate, batch

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
            yield not_run(key, what, exc.message, setting=setting, command=_command(bench, key))
            continue
        if not found.probe.finite:
            yield Row(key, what, "failed", _evidence(bench, {}), setting=setting, seed=bench.seed,
                      note="a log-probability is not a number", command=_command(bench, key))  # fmt: skip
            continue
        steps = Sample(found.probe.seconds, 0.0, load())
        values: dict[str, Value] = {
            "tpot_s": steps.median, "tpot_low_s": steps.low, "tpot_high_s": steps.high,
            "tpot_p99_s": percentile(steps.seconds, 0.99), "steps": len(steps.seconds),
            "all_tokens_per_s": aggregate(size, steps.seconds), "each_tokens_per_s": 1 / steps.median, "load": steps.load,
        }  # fmt: skip
        if found.probe.kernel_seconds:
            values["kernel_tpot_s"] = statistics.median(found.probe.kernel_seconds)
        yield _row(bench, key, what, setting, values)


def _calls(bench: Bench, about: Subject, session: Session) -> Row:
    from v4sdk_bench.model_speed import calls

    bench.say(f"{about.name}: counting calls")
    found = calls(session, _CONTEXT, bench.seed)
    values: dict[str, Value] = {
        "op_calls": sum(found.ops.values()), "library_calls": found.library, "by_op": dict(sorted(found.ops.items())),
        "read_bytes": found.cost.read_bytes, "write_bytes": found.cost.write_bytes, "flops": found.cost.flops,
    }  # fmt: skip
    note = "library calls are those of torch below the ops, views included"
    setting = about.setting | {"context": _CONTEXT, "backend": bench.backend.name}
    return _row(
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
    from v4sdk_bench.model_speed import decode_step

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
            kernels = _kernels(bench, a=a, b=b)
        yield _row(bench, f"{key}/numerics", f"{about.name}: a decode step in reference (a) and fast (b) numerics", setting,
                   {**found.values(), "verdict": found.verdict, **kernels})  # fmt: skip
    if bench.wants(f"{key}/noise"):
        bench.say(f"{about.name}: the same build against itself")
        a, b = decode_step(session, _CONTEXT), decode_step(session, _CONTEXT)
        found, kernels = paired(a, b, budget), _kernels(bench, a=a, b=b)
        yield _row(bench, f"{key}/noise", f"{about.name}: a decode step against itself", about.setting | {"context": _CONTEXT},
                   {**found.values(), "verdict": found.verdict, "load": load(), **kernels})  # fmt: skip


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of processes that read a short and a long context, chunks in exact numerics, and the time to a first token."""
    from v4sdk_bench import long_context as lc

    about = subject(bench)
    short_n, long_n = _MEMORY[bench.quick]
    key = f"model/{about.name}/memory/{long_n}"
    what = f"{about.name}: memory from {short_n:,} to {long_n:,} tokens, and the KV formula"
    setting = about.setting | {"tokens": long_n, "short_tokens": short_n}
    if bench.backend.device.type != "cpu":
        yield not_run(
            key, what, "the peak of a process is not the device's; the frontiers tell that", setting=setting
        )
    elif bench.wants(key):
        runs = [
            lc.in_a_process(about.folder, n, None, None, None, bench.say, bench.backend.name)
            for n in (short_n, long_n)
        ]
        grown, formula, limit = lc.growth(*runs)
        values: dict[str, Value] = {
            "grown_bytes": grown, "kv_formula_bytes": formula, "workspace_bytes": max(lc.workspace(run) for run in runs),
            "peak_bytes": runs[1]["rss_peak_bytes"],
        }  # fmt: skip
        limits = {"grown_bytes": limit, "workspace_bytes": lc.WORKSPACE_LIMIT_BYTES}
        yield _row(bench, key, what, setting, values, limits=limits)
    yield from _chunks(bench, about)
    yield from _first_token(bench, about)


def _chunks(bench: Bench, about: Subject) -> Iterator[Row]:
    from v4sdk_bench import long_context as lc

    tokens = _CHUNK_TOKENS[bench.quick]
    key = f"model/{about.name}/chunks/{tokens}"
    if not bench.wants(key):
        return
    paths = [bench.scratch / f"chunk-{chunk}.pt" for chunk in lc.CHUNKS]
    for chunk, path in zip(lc.CHUNKS, paths, strict=True):
        lc.in_a_process(about.folder, tokens, "exact", chunk, path, bench.say, bench.backend.name)
    what = f"{about.name}: last logits of {tokens:,} tokens read in chunks of {lc.CHUNKS[0]} and of {lc.CHUNKS[1]:,}"
    setting = about.setting | {"tokens": tokens, "numerics": "exact"}
    yield _row(
        bench,
        key,
        what,
        setting,
        {"relative_l2": lc.chunk_difference(paths)},
        limits={"relative_l2": lc.CHUNK_LIMIT},
    )


def _first_token(bench: Bench, about: Subject) -> Iterator[Row]:
    from v4sdk_bench import first_token as ft

    key, what = (
        f"model/{about.name}/first-token",
        f"{about.name}: `v4sdk run` to its first token, beside `import torch`",
    )
    if bench.quick or bench.model is not None:
        why = (
            "takes a minute; a full run measures it"
            if bench.quick
            else "measured with the bundled model only"
        )
        yield not_run(key, what, why, setting=about.setting, command="python -m v4sdk_bench.first_token")
        return
    bench.say(f"{about.name}: the first token of a new process")
    pairs = ft.pairs(_PAIRS)
    differences = [run - imported for imported, run in pairs]
    values: dict[str, Value] = {
        "difference": statistics.median(differences), "difference_least": min(differences),
        "difference_most": max(differences), "import_s": statistics.median(p[0] for p in pairs),
        "first_token_s": statistics.median(p[1] for p in pairs), "pairs": len(pairs),
    }  # fmt: skip
    yield _row(
        bench,
        key,
        what,
        about.setting,
        values,
        limits={"difference": ft.LIMIT_S},
        note="differences in seconds",
    )


def layers(bench: Bench) -> Iterator[Row]:
    """Single layers of V4-Flash and V4-Pro, beside their floors."""
    from v4sdk_bench.ceilings import best
    from v4sdk_bench.real_shapes import cases
    from v4sdk_bench.suites.ops import measure_ceilings

    wanted = [case for case in cases(bench.quick) if bench.wants(case.key)]
    if not wanted:
        return
    # those of the ops suite count too: the best of the run is the ceiling
    measure_ceilings(bench, _CEILINGS_S[bench.quick])
    measured: list[tuple[LayerCase, Row]] = []
    for case in wanted:
        if bench.left() < 0:
            yield not_run(
                case.key,
                _layer_name(case),
                "the time of this stage was used up",
                command=_command(bench, case.key),
            )
            continue
        row = _layer_row(bench, case)
        if row.state == "ok":
            measured.append((case, row))
        yield row if row.state != "ok" else _with_floor(row, best(bench.record.ceilings))
    measure_ceilings(bench, _CEILINGS_S[bench.quick])
    for _, row in measured:
        yield _with_floor(row, best(bench.record.ceilings))


def _layer_name(case: LayerCase) -> str:
    step = "a decoded token" if case.tokens == 1 else f"{case.tokens} tokens read"
    return f"V4-{case.model.title()}: one {case.kind.upper()} layer, {step}"


def _layer_row(bench: Bench, case: LayerCase) -> Row:
    from v4sdk_bench.real_shapes import CONTEXT, OUTPUT_LIMIT, layer

    began = time.monotonic()
    setting: dict[str, Value] = {
        "shape": case.model, "kind": case.kind, "tokens": case.tokens, "context": CONTEXT, "state": "synthetic KV and weights",
        "numerics": "fast", "kv_format": "native",
    }  # fmt: skip
    try:
        found = layer(case, bench.backend, bench.say, bench.seed)
    except BenchError as exc:
        return not_run(
            case.key, _layer_name(case), exc.message, setting=setting, command=_command(bench, case.key)
        )
    values: dict[str, Value] = {
        "relative_l2": found.relative_l2, "finite": int(found.finite), "read_bytes": found.cost.read_bytes,
        "write_bytes": found.cost.write_bytes, "flops": found.cost.flops, "experts": found.experts,
        "weight_bytes": found.weight_bytes,
    }  # fmt: skip
    limits = {"relative_l2": OUTPUT_LIMIT, ">=finite": 1}
    if judged(values, limits) == "ok":
        bench.say(f"{case.key}: timing")
        # it ran before, for the comparison
        rounds = sample(found.step, _LAYER_S[bench.quick], least=3, warm=0)
        values |= {
            **rounds.values(),
            "spread": rounds.spread,
            "load": rounds.load,
            **_kernels(bench, median=found.step),
        }
    row = _row(bench, case.key, _layer_name(case), setting, values, limits=limits)
    return replace(row, seconds=round(time.monotonic() - began, 3))


def _with_floor(row: Row, ceilings: list[Any]) -> Row:
    """Put the floor and the share of the ceiling into a row; failed above 100%."""
    from v4sdk.ops.op import Cost
    from v4sdk_bench.ceilings import floor_s, share

    values: dict[str, Any] = dict(row.values)
    floor, bound = floor_s(
        Cost(values["read_bytes"], values["write_bytes"], values["flops"]), ceilings, "bfloat16"
    )
    try:
        of_ceiling = share(floor, values["median_s"])
    except BenchError as exc:
        plain = ("relative_l2", "finite", "read_bytes", "write_bytes", "flops", "experts", "weight_bytes")
        return replace(
            row, state="failed", values={k: values[k] for k in plain}, note=f"{exc.message}; {exc.hint}"
        )
    return replace(row, values={**values, "floor_s": floor, "bound": bound, "share_of_ceiling": of_ceiling})


def _kernels(bench: Bench, **steps: Call) -> dict[str, Value]:
    """Medians on the device's own clock; nothing on a host or an emulation."""
    if bench.backend.evidence != "device":
        return {}
    device = bench.backend.device
    return {
        f"kernel_{name}_s": statistics.median(device_seconds(step, device, _KERNEL_ROUNDS))
        for name, step in steps.items()
    }


def _evidence(bench: Bench, values: Mapping[str, Value]) -> Any:
    """The backend's word; times of the host around a device, such as loading, prove no kernel and do not carry it."""
    timed = any(name.endswith(SPEED_ENDINGS) for name in values)
    kernels = any(name.startswith("kernel") and name.endswith("_s") for name in values)
    return (
        "compiled" if bench.backend.evidence == "device" and timed and not kernels else bench.backend.evidence
    )


def _row(
    bench: Bench, key: str, what: str, setting: dict[str, Value], values: dict[str, Any],
    limits: dict[str, float] | None = None, note: str = "",
) -> Row:  # fmt: skip
    return Row(
        key, what, judged(values, limits or {}), _evidence(bench, values), values=values, limits=limits or {}, setting=setting,
        note=note, command=_command(bench, key), seed=bench.seed,
    )  # fmt: skip


def _command(bench: Bench, key: str) -> str:
    words = ["v4sdk", "bench", "run", "--suite", "model", "--backend", bench.backend.name]
    words += ["--quick"] if bench.quick else []
    words += ["--model", str(bench.model)] if bench.model else []
    return shlex.join([*words, "--only", key])


STAGES = (
    Stage("model/whole", whole, 45.0, 900.0),
    Stage("model/memory", memory, 25.0, 900.0),
    Stage("model/layers", layers, 35.0, 1800.0),
    PEERS,
)
