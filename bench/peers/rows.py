"""The rows of the stage `model/peers`: parity in words, speeds with their spread and their share of what memory gives."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import Evidence
from v4sdk.config import ModelConfig
from v4sdk_bench.parity import metrics
from v4sdk_bench.peers.formats import Stored, bytes_per_token
from v4sdk_bench.peers.lanes import KL_LIMITS, OURS, Lane, Phase
from v4sdk_bench.peers.process import PeerError, environment
from v4sdk_bench.peers.rounds import Depth, Running, Times, Trial
from v4sdk_bench.peers.texts import ParityText
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.speed import ceilings as limits
from v4sdk_bench.speed.timing import judge, percentile
from v4sdk_bench.stage import Bench, BenchError

# weights that a cache holds are not read from memory, and then memory's bandwidth says nothing
_TIMES_CACHE = 4
# where the cache is said to be large enough, as many bytes are tried, unless they are few; read so much faster, a cache has them
_LEAST_ASKED_BYTES, _FASTER_IN_CACHE = 64_000_000, 1.3
_COMPARABLE: tuple[metrics.Verdict, ...] = ("same model", "same within precision")


@dataclass(frozen=True)
class Subject:
    """What all rows share."""

    model: str
    fingerprint: str
    config: ModelConfig
    evidence: Evidence
    threads: int
    seed: int
    command: str

    def key(self, *parts: str) -> str:
        """A key under this model."""
        return "/".join(("model/peers", self.model, *parts))

    def setting(self, **more: Value) -> dict[str, Value]:
        """What another machine's row must share."""
        return {"model": self.model, "fingerprint": self.fingerprint, "seed": self.seed, "batch": 1, **more}


def skipped_row(subject: Subject, engine: str, why: str, *parts: str) -> Row:
    """An engine that is not there."""
    return not_run(
        subject.key(engine, *parts),
        f"{engine} on {subject.model}",
        why,
        command=subject.command,
        seed=subject.seed,
    )


def died_row(subject: Subject, engine: str, error: PeerError, *parts: str) -> Row:
    """An engine that failed, in its own words."""
    own = f" ({error.hint})" if error.hint and error.hint != error.way_out else ""
    return not_run(
        subject.key(engine, *parts), f"{engine} on {subject.model}", f"{error.message}{own}", command=subject.command,
        seed=subject.seed,
    )  # fmt: skip


def load_row(subject: Subject, run: Running, by_phase: Mapping[Phase, Lane]) -> Row:
    """Loading, first and second calls, memory, version and the settings the engine reports."""
    phases = [phase for phase, lane in by_phase.items() if lane == run.lane]
    values: dict[str, Value] = {
        "load_s": run.about["seconds"], **run.cold, "peak_bytes": run.peak_bytes, "version": run.about["version"],
        "settings": run.about["settings"], "environment": environment(subject.threads, run.lane.own_wait),
    }  # fmt: skip
    parts = ("load",) if len(phases) == len(by_phase) else ("load", *phases)
    return Row(
        subject.key(run.lane.engine, *parts),
        f"{run.lane.engine} {run.about['version']} on {subject.model}: loading, and its first calls beside its second",
        "info", subject.evidence, values, setting=subject.setting(engine=run.lane.engine), command=subject.command,
        seed=subject.seed, note="files may lie in the system's cache already",
    )  # fmt: skip


def parity_row(
    subject: Subject, text: ParityText, run: Running, phase: Phase, want: Tensor, got: Tensor | None
) -> Row:
    """Logits against `exact`; failed where the engine computes another model, or the same one too coarsely."""
    lane = run.lane
    key, what = (
        subject.key(lane.engine, "parity", phase),
        f"{lane.engine}: logits of {phase} against v4sdk exact",
    )
    if got is None:
        return not_run(key, what, f"{lane.engine} takes no given tokens one by one", command=subject.command)
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        shape = f"logits of shape {list(got.shape)}, expected {list(want.shape)}"
        why = shape if got.shape != want.shape else "logits that are not finite"
        return Row(
            key, what, "failed", subject.evidence, {"version": run.about["version"]}, command=subject.command,
            seed=subject.seed, setting=subject.setting(engine=lane.engine), note=f"not comparable: it gave {why}",
        )  # fmt: skip
    counted = text.counted if phase == "prefill" else text.counts[-1][text.split :]
    counted = counted if counted.any() else torch.ones_like(counted)
    agreement = metrics.agreement(want[counted], got[counted])
    verdict = metrics.verdict(agreement, rounded=lane.precision != "float32")
    limit = {"kl_mean": KL_LIMITS[lane.precision]}
    values: dict[str, Value] = {
        **agreement.values(), "verdict": verdict, "precision": lane.precision, "setting": lane.label,
        "version": run.about["version"], "kl_mean_everywhere": float(metrics.divergence(want, got).mean()),
    }  # fmt: skip
    if phase == "prefill":
        by_bucket = metrics.by_bucket(want, got, subject.config, text.positions)
        values["kl_mean_by_position"] = {name: found.kl_mean for name, found in by_bucket.items()}
    state = judged(values, limit) if verdict in _COMPARABLE else "failed"
    told = f"{verdict}, mean KL {agreement.kl_mean:.2g}"
    return Row(
        key, what, state, subject.evidence, values, limit, subject.setting(engine=lane.engine, text=text.what),
        told if state == "ok" else f"not comparable: {told}, expected at most {limit['kl_mean']:g} of {lane.precision}",
        subject.command, subject.seed,
    )  # fmt: skip


def with_ceilings(bench: Bench, budget_s: float) -> list[limits.Ceiling]:
    """Bandwidth measured now, added to the record."""
    bench.say("measuring memory bandwidth")
    found: list[limits.Ceiling] = limits.measure(
        bench.backend.device, bench.backend.synchronize, budget_s, dtypes=()
    )
    bench.record.ceilings += [asdict(ceiling) for ceiling in found]
    return found


def speed_row(
    subject: Subject, run: Running, phase: Phase, depth: Depth, times: Times, ceilings: Sequence[limits.Ceiling],
    trials: Sequence[Trial],
) -> Row:  # fmt: skip
    """Tokens per second of one engine at one depth."""
    lane, first_lane = run.lane, times.of(phase)
    per_token = [s / depth.tokens for s in first_lane] if phase == "prefill" else first_lane
    middle, low, high = (
        statistics.median(per_token), percentile(per_token, 0.1), percentile(per_token, 0.9)
    )  # fmt: skip
    values: dict[str, Value] = {
        "tokens_per_s": 1 / middle, "low_tokens_per_s": 1 / high, "high_tokens_per_s": 1 / low,
        "spread": (high - low) / middle, "rounds": len(per_token),
        "cpu_per_token_s": statistics.median(times.cpu[phase]), "load": depth.load, "version": run.about["version"],
        "chosen": lane.label, "tried": [trial.to_json() for trial in trials], "settings": run.about["settings"],
    }  # fmt: skip
    where = f"of {depth.tokens:,} tokens" if phase == "prefill" else f"after {depth.tokens:,} tokens"
    where += ", one core busy elsewhere" if depth.neighbours else ""
    made: dict[str, Any] = {
        "key": subject.key(lane.engine, phase, *depth.parts), "what": f"{lane.engine} on {subject.model}: {phase} {where}",
        "evidence": subject.evidence,
        "setting": subject.setting(
            engine=lane.engine, phase=phase, depth=depth.tokens, neighbours=depth.neighbours
        ),
        "command": subject.command, "seed": subject.seed,
    }  # fmt: skip
    untried = (
        "its defaults" if lane.engine == OURS else "its documented defaults; a full run tries its settings"
    )
    note = "" if trials else untried
    if phase == "decode":
        size = bytes_per_token(subject.config, lane.stored, depth.tokens)
        values["read_per_token_bytes"] = size
        if not ceilings:
            pass
        elif reads_memory(subject.config, lane.stored):
            try:
                values |= shares_of(size, first_lane, depth.bandwidth, ceilings)
            except BenchError as exc:
                return Row(state="failed", values={"version": run.about["version"]}, note=exc.message, **made)
        else:
            cached = "caches hold a good part of the weights: no share of memory's bandwidth"
            note = f"{note}; {cached}" if note else cached
    return Row(state="info", values=values, note=note, **made)


def reads_memory(config: ModelConfig, stored: Stored) -> bool:
    """Whether the weights of a token are too many for caches to hold a good part of them."""
    size: int = bytes_per_token(config, stored)
    cached: int = limits.last_level_cache_bytes(torch.device("cpu"))
    return size >= _TIMES_CACHE * cached or (size >= _LEAST_ASKED_BYTES and _is_read_as_slowly(size))


@cache
def _is_read_as_slowly(size: int) -> bool:
    """Whether as many bytes are read no faster than far more of them: a large cache may be a whole host's, little of it ours."""
    device = torch.device("cpu")
    try:
        small, large = (limits.ReadProbe(device, None, n).rate() for n in (size, limits.BUFFER_BYTES))
    except BenchError:
        return False
    return bool(small <= _FASTER_IN_CACHE * large)


def shares_of(
    size: int, seconds: Sequence[float], bandwidth: Sequence[float], ceilings: Sequence[limits.Ceiling]
) -> dict[str, Value]:
    """What share of memory's bandwidth reading `size` bytes per token is, of `seconds` per token by round.

    On a shared machine the bandwidth of one second is not that of the next: each round is held against what was measured just
    before and after it, and all against the fastest moment of the run.
    """
    fastest = max(c.value for c in ceilings if c.unit == limits.BYTES)
    values: dict[str, Value] = {"read_of_fastest": limits.share(size / fastest, statistics.median(seconds))}
    if bandwidth:
        pairs = zip(seconds, bandwidth[:-1], bandwidth[1:], strict=True)
        shares = [size / s / ((before + after) / 2) for s, before, after in pairs]
        middle = statistics.median(shares)
        values |= {
            "read_of_ceiling": limits.share(middle, 1.0),
            "low_read_of_ceiling": percentile(shares, 0.1), "high_read_of_ceiling": percentile(shares, 0.9),
            "ceiling_bytes_per_s": statistics.median(bandwidth),
        }  # fmt: skip
    return values


def ratio_row(subject: Subject, run: Running, phase: Phase, depth: Depth, times: Times) -> Row:
    """v4sdk's speed over the peer's, from the same rounds, beside v4sdk's speed over its own."""
    first, again, theirs = depth.times[0].of(phase), depth.again.of(phase), times.of(phase)
    pair = judge(list(zip(first, theirs, again, strict=True)))
    engine = run.lane.engine
    values: dict[str, Value] = {
        # `judge` gives seconds of ours over seconds of theirs
        f"{OURS}_to_{engine}_ratio": 1 / pair.ratio, "low_ratio": 1 / pair.high, "high_ratio": 1 / pair.low,
        "noise": pair.noise, "rounds": len(theirs), "load": depth.load,
        "verdict": pair.verdict.replace("b is", f"{engine} is").replace("the same build", OURS),
    }  # fmt: skip
    return Row(
        subject.key("ratio", engine, phase, *depth.parts),
        f"speed of {OURS} over {engine}, {phase} at {depth.tokens:,} tokens on {subject.model}", "info", subject.evidence,
        values,
        setting=subject.setting(peer=engine, phase=phase, depth=depth.tokens, neighbours=depth.neighbours),
        command=subject.command, seed=subject.seed, note=str(values["verdict"]),
    )  # fmt: skip
