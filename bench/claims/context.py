"""Stages of the claims suite about the context: cache bytes really allocated, work that does not grow, the price of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from v4sdk.kv_cache import kv_bytes
from v4sdk_bench.claims import arithmetic, context_cost, kv_allocation
from v4sdk_bench.claims.figures import MODELS
from v4sdk_bench.claims.ledger import ledger
from v4sdk_bench.claims.rows import answer
from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.speed.timing import MAX_NOISE
from v4sdk_bench.stage import Bench

_LENGTHS = (8_192, 65_536, 262_144, 1_048_576)
_QUICK_LENGTHS = (8_192, 65_536, 1_048_576)
_COMPRESSED_TOKENS = 1024


def allocated(bench: Bench, lengths: tuple[int, ...] = ()) -> Iterator[Row]:
    """Caches of the released shapes, really allocated; judged at the last length, the claim's own."""
    claim = ledger().claim("kv-allocated")
    wanted = [key for key in claim.keys if bench.wants(key)]
    lengths = lengths or (_QUICK_LENGTHS if bench.quick else _LENGTHS)
    for at, key in enumerate(wanted):
        model = key.rpartition("/")[2]
        config, base = MODELS[model], arithmetic.v32_kv_bytes_per_token()
        fitting = [n for n in lengths if kv_allocation.fits(config, n, bench.backend)]
        if not fitting:
            why = f"no room for the cache of {lengths[0]:,} tokens beside what is in use"
            yield not_run(key, claim.figure(key).what, why, command=bench.command(key))
            continue
        found = _allocations(bench, model, fitting, bench.left() / (len(wanted) - at))
        last = found[-1]
        more: dict[str, Value] = {
            "tokens": last.num_tokens,
            "v32_bytes": base * last.num_tokens,
            "share_by_tokens": {f"{a.num_tokens:,}": a.tensor_bytes / (base * a.num_tokens) for a in found},
            "tensor_bytes_by_tokens": {f"{a.num_tokens:,}": a.tensor_bytes for a in found},
            "resident_bytes_by_tokens": {f"{a.num_tokens:,}": a.resident_bytes for a in found},
            "formula_error_bytes": max(abs(a.own_bytes - a.formula_bytes) for a in found),
        }
        limits = {"formula_error_bytes": 0.0}
        short = last.num_tokens < lengths[-1]
        if last.resident_bytes is not None:
            more["resident_share"] = last.resident_bytes / last.tensor_bytes
        if last.resident_bytes is not None and not short:
            # of a small cache the allocator may have held back most from an earlier one
            limits |= {"resident_share": 1.1, ">=resident_share": 0.9}
        share = last.tensor_bytes / (base * last.num_tokens)
        setting: dict[str, Value] = {
            "config": f"v4-{model}",
            "kv_format": "native",
            "tokens": last.num_tokens,
        }
        note = f"at {last.num_tokens:,} tokens"
        if last.resident_bytes is not None and len(found) > 1:
            note += "; resident bytes are what the process grew by, and small caches find room it already had"
        if short:
            why = (
                "there was no time for more"
                if last.num_tokens < fitting[-1]
                else "more does not fit into memory"
            )
            note += f", where windows and scratch still weigh; the claim is about {lengths[-1]:,}, and {why}"
        yield answer(
            bench, claim, key, share, more=more, limits=limits, setting=setting, note=note, judge=not short,
            evidence=bench.backend.evidence,
        )  # fmt: skip


def _allocations(
    bench: Bench, model: str, lengths: list[int], budget_s: float
) -> list[kv_allocation.Allocation]:
    """Allocate one length after the other, as long as the next one is expected to end in time; the first always."""
    found: list[kv_allocation.Allocation] = []
    began, config, s_per_byte = time.monotonic(), MODELS[model], 0.0
    for n in lengths:
        expected_s = s_per_byte * kv_bytes(config, n, "native")
        if found and time.monotonic() - began + expected_s > budget_s:
            break
        bench.say(f"allocating the cache of {model} for {n:,} tokens")
        start = time.monotonic()
        found.append(kv_allocation.allocate(config, n, bench.backend))
        s_per_byte = (time.monotonic() - start) / found[-1].tensor_bytes
    return found


def bounded(
    bench: Bench, contexts: tuple[int, int] = (8_192, 131_072), budget_s: float = 2.5
) -> Iterator[Row]:
    """Work that does not grow with the context: picked rows, picks, experts."""
    evidence, (short, long) = bench.backend.evidence, contexts
    claim = ledger().claim("sparse-attention")
    rows, duration = claim.keys
    setting: dict[str, Value] = {"shape": "v4-flash, CSA", "short": short, "long": long}
    if bench.wants(rows):
        near, far = (context_cost.attention_reading(bench.backend, n, bench.seed) for n in contexts)
        more: dict[str, Value] = {
            "rows_at_short": near.rows,
            "visible_entries": far.entries,
            "differing_outputs": near.differing + far.differing,
        }
        yield answer(
            bench,
            claim,
            rows,
            far.rows,
            more=more,
            limits={"differing_outputs": 0},
            setting=setting,
            evidence=evidence,
            seed=bench.seed,
        )
    if bench.wants(duration):
        times, by_bytes, by_flops = context_cost.attention_growth(
            bench.backend, short, long, budget_s, bench.seed
        )
        more = {
            "bytes_growth": by_bytes,
            "flops_growth": by_flops,
            "noise": times.noise,
            "long_median_s": times.a.median,
            "short_median_s": times.b.median,
        }
        quiet = times.noise <= MAX_NOISE
        note = f"the same call differs from itself by {times.noise:.0%}{'' if quiet else ', so there is no verdict'}"
        yield answer(
            bench, claim, duration, times.ratio, more=more, setting=setting, note=note, judge=quiet, evidence=evidence,
            seed=bench.seed,
        )  # fmt: skip
    claim = ledger().claim("index-recall")
    if bench.wants(claim.keys[0]):
        recall = partial(context_cost.score_recall, bench.backend, 65_536, 16, bench.seed)
        setting = {"shape": "v4-flash", "tokens": 65_536, "queries": 16}
        yield answer(
            bench,
            claim,
            claim.keys[0],
            recall(),
            more={"with_head_weights_of_one_sign": recall(positive=True)},
            setting=setting,
            evidence=evidence,
            seed=bench.seed,
        )
    claim = ledger().claim("experts-per-token")
    if bench.wants(claim.keys[0]):
        fewest, most, experts = context_cost.experts_per_token(bench.backend)
        yield answer(
            bench,
            claim,
            claim.keys[0],
            most,
            more={"fewest": fewest, "experts": experts},
            limits={">=fewest": 6},
            evidence=evidence,
        )


def whole_model(bench: Bench, long: int | None = None, budget_s: float = 4.0) -> Iterator[Row]:
    """Entries that appear in the cache, and the price of context, on the model under test."""
    compression, growth = ledger().claim("compression"), ledger().claim("decode-context")
    if not any(bench.wants(key) for key in (*compression.keys, *growth.keys)):
        return
    long = long or (8_192 if bench.quick else 131_072)
    evidence = bench.backend.evidence
    with context_cost.opened(bench.backend, str(bench.model) if bench.model else None) as loaded:
        setting: dict[str, Value] = {"model": loaded.fingerprint}
        written = context_cost.entries_written(loaded, _COMPRESSED_TOKENS)
        for key, ratio in zip(compression.keys, (4, 128), strict=True):
            if not bench.wants(key):
                continue
            counts = written.get(ratio)
            if not counts:
                why = f"the model under test has no layer that compresses {ratio} tokens"
                yield not_run(key, compression.figure(key).what, why, command=bench.command(key))
                continue
            worst = max(counts, key=lambda n: abs(_COMPRESSED_TOKENS / max(n, 1) - ratio))
            more: dict[str, Value] = {"tokens": _COMPRESSED_TOKENS, "entries_by_layer": counts}
            yield answer(
                bench,
                compression,
                key,
                _COMPRESSED_TOKENS / max(worst, 1),
                more=more,
                setting=setting,
                evidence=evidence,
            )
        (key,) = growth.keys
        if not bench.wants(key):
            return
        short = 512
        bench.say(f"decode steps behind {short:,} and {long:,} tokens")
        grown = context_cost.decode_growth(loaded, short, long, budget_s)
        times = grown.times
        more = {
            "bytes_growth": grown.bytes,
            "flops_growth": grown.flops,
            "context_growth": long / short,
            "noise": times.noise,
            "long_median_s": times.a.median,
            "short_median_s": times.b.median,
        }
        yield answer(
            bench,
            growth,
            key,
            times.ratio,
            more=more,
            setting=setting | {"short": short, "long": long},
            evidence=evidence,
            note="random rows stand in for the context, which costs what real ones cost; "
            f"the same step differs from itself by {times.noise:.0%}",
        )
