"""The claims suite: every published claim of the ledger, computed from configurations or measured, beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from v4sdk.loading import bundled_folder
from v4sdk_bench.claims import amplification, arithmetic, lossless
from v4sdk_bench.claims.context import allocated, bounded, whole_model
from v4sdk_bench.claims.expert_parallel import STAGE as EXPERT_PARALLEL
from v4sdk_bench.claims.figures import COMPUTED, MODELS
from v4sdk_bench.claims.ledger import PREFIX, Claim, ledger
from v4sdk_bench.claims.rows import answer, untestable
from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.stage import Bench, Stage

# drawn matrices: this much identity, this much normal
_DIAGONALS, _SCALES = (1.0, 4.0, 8.0), (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
# of draws around the identity, for the unconstrained control
_CONTROL_SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0)
_CONTROL_SCALE = 0.3
# by the last word of a key
_CONFIGS = {"pro": "v4-pro", "flash": "v4-flash", "v32": "v3.2"}


def computed(bench: Bench) -> Iterator[Row]:
    """Every claim that follows from configurations."""
    for name, compute in COMPUTED.items():
        claim = ledger().claim(name)
        for key in claim.keys:
            if not bench.wants(key):
                continue
            part = key.rpartition("/")[2]
            found, more, note = compute(part)
            setting = {"config": _CONFIGS[part.rpartition("-")[2]]}
            yield answer(bench, claim, key, found, more=more, setting=setting, note=note)
    yield from _decode_reads(bench)


def _decode_reads(bench: Bench) -> Iterator[Row]:
    """What stands beside the published decode rates: bytes, not speed."""
    short, long = 4_096, 900_000
    for model, config in MODELS.items():
        key = f"{PREFIX}decode-reads/{model}"
        if not bench.wants(key):
            continue
        (weights, near), (_, far) = (arithmetic.v4_read_bytes(config, n) for n in (short, long))
        share = (weights + near) / (weights + far)
        yield Row(
            key,
            "bytes a decoded token reads, native rows: 4,096 over 900,000 tokens of context (share)",
            "info",
            values={
                "found": share,
                "weight_bytes": weights,
                "short_cache_bytes": near,
                "long_cache_bytes": far,
            },
            setting={"config": f"v4-{model}", "short": short, "long": long},
            command=bench.command(key),
            note="arithmetic, nothing was measured; no time and no launch is counted, so a rate falls more than this",
        )


def lossless_fp8(bench: Bench) -> Iterator[Row]:
    """FP4 weights as FP8: every code under every scale, random matrices, and the experts of the model under test."""
    claim = ledger().claim("fp4-fp8-lossless")
    # on the host, whatever is under test
    answered = partial(answer, bench, claim)
    codes, matrices, model = claim.keys
    if bench.wants(codes):
        tried = [lossless.exact_pairs(spread) for spread in range(lossless.EXACT_SPREAD + 1)]
        beyond = lossless.exact_pairs(lossless.EXACT_SPREAD + 1)[1]
        more = {
            "pairs": sum(t for t, _ in tried),
            "largest_exact_spread_log2": lossless.largest_exact_spread(),
            "differing_one_spread_further": beyond,
        }
        condition = f"condition: group scales of a tile span at most 2**{lossless.EXACT_SPREAD}"
        yield answered(
            codes,
            sum(d for _, d in tried),
            more=more,
            limits={">=differing_one_spread_further": 1},
            note=condition,
        )
    if bench.wants(matrices):
        done = lossless.random_matrices(bench.seed, 2 if bench.quick else 16)
        yield answered(
            matrices,
            done.differing,
            more={"values": done.values, "largest_spread_log2": done.spread},
            limits={"largest_spread_log2": lossless.EXACT_SPREAD},
            seed=bench.seed,
        )
    if bench.wants(model):
        yield _lossless_model(bench, claim, model)


def _lossless_model(bench: Bench, claim: Claim, key: str) -> Row:
    path = bench.model or bundled_folder()
    done, matrices, fingerprint = lossless.checkpoint(path, 200 if bench.quick else None)
    if not matrices:
        return not_run(
            key, claim.figure(key).what, "the model under test has no FP4 experts", command=bench.command(key)
        )
    more: dict[str, Value] = {"matrices": matrices, "values": done.values, "largest_spread_log2": done.spread}
    setting: dict[str, Value] = {"model": fingerprint}
    return answer(bench, claim, key, done.differing, more=more, setting=setting)


def amplified(bench: Bench) -> Iterator[Row]:
    """Deep stacks of stream mixes, with and without the constraint."""
    claim = ledger().claim("mhc-amplification")
    constrained, free, alike = claim.keys
    seeds = range(bench.seed, bench.seed + (4 if bench.quick else 16))
    answered = partial(answer, bench, claim, seed=bench.seed)
    setting: dict[str, Value] = {
        "sublayers": amplification.SUBLAYERS,
        "streams": amplification.STREAMS,
        "seeds": len(seeds),
        "sinkhorn_iterations": 20,
    }
    for key, shared in ((constrained, False), (alike, True)):
        if not bench.wants(key):
            continue
        bench.say(f"stacks of {amplification.SUBLAYERS} mixes, {'alike' if shared else 'independent'}")
        gains = {
            f"{d:g} I + {s:g} normal": amplification.measure(
                amplification.Draws(d, s, shared), seeds
            ).constrained
            for d in _DIAGONALS
            for s in _SCALES
        }
        largest = {name: float(g.max()) for name, g in gains.items()}
        more: dict[str, Value] = {
            "largest_by_draws": largest,
            "median_by_draws": {name: float(g.median()) for name, g in gains.items()},
            "draws_beyond_claimed": sum(g > claim.figure(key).claimed for g in largest.values()),
        }
        # rows of a mix sum to one, so no column of a product can exceed the number of streams
        limits = {"found": amplification.STREAMS * (1 + 1e-3)} if shared else {}
        yield answered(key, max(largest.values()), more=more, limits=limits, setting=setting)
    if bench.wants(free):
        yield _unconstrained(bench, claim, free, seeds, setting)


def _unconstrained(bench: Bench, claim: Claim, key: str, seeds: range, setting: Mapping[str, Value]) -> Row:
    gains = {s: amplification.measure(amplification.Draws(1.0, s), seeds) for s in _CONTROL_SCALES}
    medians = {s: float(g.unconstrained.median()) for s, g in gains.items()}
    claimed = claim.figure(key).claimed
    chosen = gains[_CONTROL_SCALE]
    more: dict[str, Value] = {
        "largest": float(chosen.unconstrained.max()),
        "constrained_same_draws": float(chosen.constrained.max()),
        "median_by_scale": {f"{s:g}": m for s, m in medians.items()},
        "first_scale_beyond_claimed": next((s for s, m in medians.items() if m >= claimed), None),
    }
    limits = {"constrained_same_draws": 1.6}
    return answer(
        bench, claim, key, medians[_CONTROL_SCALE], more=more, limits=limits, setting=setting, seed=bench.seed
    )


def balanced(bench: Bench) -> Iterator[Row]:
    """How near to doubly stochastic 20 iterations come."""
    claim = ledger().claim("sinkhorn-20")
    (key,) = claim.keys
    if not bench.wants(key):
        return
    by_scale: dict[str, Value] = {}
    for scale in (1.0, 2.0, 4.0, 8.0):
        h = amplification.Draws(0.0, scale, tokens=64).matrices(bench.seed)
        by_scale[f"{scale:g}"] = {
            str(n): max(amplification.imbalance(amplification.constrain(h, n))) for n in (5, 20, 100)
        }
    h = amplification.Draws(0.0, 1.0, tokens=64).matrices(bench.seed)
    columns, rows = amplification.imbalance(amplification.constrain(h))
    more: dict[str, Value] = {"columns": columns, "rows": rows, "by_scale_and_iterations": by_scale}
    # the last step normalises columns, so they are exact but for eps
    yield answer(
        bench,
        claim,
        key,
        max(columns, rows),
        more=more,
        limits={"columns": 1e-5},
        setting={"streams": 4, "iterations": 20, "scale": 1.0, "matrices": h[..., 0, 0].numel()},
        seed=bench.seed,
    )


def not_testable(bench: Bench) -> Iterator[Row]:
    """What would take other hardware or the released weights, and what exactly."""
    for claim in ledger().claims:
        if claim.status == "not testable here":
            yield from (row for row in untestable(bench, claim) if bench.wants(row.key))
    key = f"{PREFIX}single-device-expert-fusion"
    if bench.wants(key):
        what = "single-device expert fusion ratio: fused expert path over the same kernels unfused in a graph; no communication"
        yield not_run(
            key,
            what,
            f"backend `{bench.backend.name}` has no fused expert kernel to compare",
            command=bench.command(key),
        )


STAGES: tuple[Stage, ...] = (
    Stage("claims/arithmetic", computed, 3, 10),
    Stage("claims/not-testable", not_testable, 1, 1),
    Stage("claims/lossless", lossless_fp8, 2, 60),
    Stage("claims/stream-mixing", amplified, 6, 60),
    Stage("claims/sinkhorn", balanced, 1, 5),
    Stage("claims/bounded", bounded, 7, 20),
    Stage("claims/model", whole_model, 7, 60),
    Stage("claims/kv-allocated", allocated, 17, 120),
    EXPERT_PARALLEL,
)
