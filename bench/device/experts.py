"""Routed experts in two launches (F) beside the same work done in other ways, on one device.

F/B1 is a "single-device expert fusion ratio (no expert parallelism, no communication)". It is not the figure that the V4 report
gives for expert parallelism, and not comparable with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.backend import EngineConfig, bind
from v4sdk.numerics import FAST
from v4sdk.ops.inputs import FLASH, PRO, TINY, Geometry
from v4sdk.ops.op import Cost
from v4sdk.presets import V4_FLASH, V4_PRO
from v4sdk.weights import ExpertWeights, Weight
from v4sdk_bench.device.drawn import experts as draw_experts
from v4sdk_bench.device.drawn import random_on
from v4sdk_bench.device.replayed import Subject, against, evidence_of, is_timed, row
from v4sdk_bench.parity.metrics import relative_l2
from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.speed.ceilings import free_bytes
from v4sdk_bench.speed.timing import Call
from v4sdk_bench.stage import OUT_OF_TIME, Bench

TOKENS = (1, 8, 64, 512, 4096)
_TOY_TOKENS = (1, 8)
LIMIT = V4_FLASH.swiglu_limit
# rows that are compared with the references; a prompt's other rows run the same code
_CHECKED_ROWS = 8
_RELATIVE_L2 = 0.02
# the naive way de-quantises every chosen expert on every call
_NAIVE_TOKENS = 64
_BUDGET_S = {True: 0.2, False: 1.0}
_SETS_OF_IDS = 8
RATIO = "single-device expert fusion ratio (no expert parallelism, no communication)"


@dataclass
class Layer:
    """One layer's experts on the device and what runs them."""

    geometry: Geometry
    weights: ExpertWeights
    function: Any
    has_kernel: bool

    @property
    def stacks(self) -> tuple[Weight, Weight, Weight]:
        """w1, w2, w3."""
        assert self.weights.packed is not None
        return self.weights.packed

    @property
    def bytes_each(self) -> int:
        """Of one expert as stored."""
        return sum(w.nbytes for w in self.stacks) // self.geometry.experts

    def cost(self, ids: Sequence[Tensor]) -> Cost:
        """By the op's rule, each chosen expert once; the mean of calls whose mean time it is held against."""
        g, (t, k) = self.geometry, ids[0].shape
        flops = 2 * t * k * 3 * g.hidden * g.intermediate
        read = t * g.hidden * 2 + round(distinct(ids) * self.bytes_each)
        return Cost(read, t * g.hidden * 4, flops)


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/experts/<model>/<routing>/<tokens>` and below them `/unfused`, `/bf16`, `/naive`."""
    red = bench.wrong("device/conformance/routed_experts")
    for g, config in ((FLASH, V4_FLASH), (PRO, V4_PRO)) if is_timed(bench) else ((TINY, V4_FLASH),):
        key = f"device/experts/{g.name}"
        if not bench.wants(key):
            continue
        if red is not None or bench.left() < 30:
            why = f"no time: {red.key} failed" if red else OUT_OF_TIME
            yield not_run(key, f"routed experts, {g.name}", why, command=bench.command(key))
            continue
        bench.say(f"experts: drawing {g.experts} of {g.name}")
        random = random_on(bench.backend.device, f"{g.name}-{bench.seed}")
        weights = bench.backend.prepare_experts("experts", ExpertWeights(packed=draw_experts(g, random)))
        engine = EngineConfig(FAST, "native", bench.backend.capability())
        binding = bind(bench.backend, config, engine)
        bare = any(row.op == o.routed_experts.name for row in binding.without_kernel)
        layer = Layer(g, weights, binding.table[o.routed_experts], not bare)
        for tokens in TOKENS if is_timed(bench) else _TOY_TOKENS:
            for routing in ("random", "distinct", "shared") if tokens == 8 else ("random",):
                if bench.left() < 20:
                    where = f"{key}/{routing}/{tokens}"
                    yield not_run(
                        where,
                        f"routed experts, {g.name}",
                        OUT_OF_TIME,
                        command=bench.command(where),
                    )
                    continue
                bench.say(f"experts: {g.name}, {tokens} tokens, {routing} routing")
                yield from _of(bench, layer, tokens, routing, random)


def distinct(ids: Sequence[Tensor]) -> float:
    """How many different experts a call chooses, the mean of several calls."""
    return sum(int(torch.unique(one).numel()) for one in ids) / len(ids)


def routes(g: Geometry, tokens: int, routing: str, random: torch.Generator) -> Tensor:
    """Which experts each token chooses [T, K] int32: drawn, as many different ones as there are, or the same for all."""
    device = random.device
    if routing == "random":
        return (
            torch.rand(tokens, g.experts, generator=random, device=device)
            .topk(g.chosen)
            .indices.to(torch.int32)
        )
    first = torch.arange(tokens, device=device)[:, None] * (g.chosen if routing == "distinct" else 0)
    start = torch.randint(0, g.experts, (1,), generator=random, device=device)
    return ((first + start + torch.arange(g.chosen, device=device)) % g.experts).to(torch.int32)


def _of(bench: Bench, layer: Layer, tokens: int, routing: str, random: torch.Generator) -> Iterator[Row]:
    g, device = layer.geometry, bench.backend.device
    u = torch.randn(tokens, g.hidden, generator=random, device=device).bfloat16()
    weights = torch.rand(tokens, g.chosen, generator=random, device=device)
    # other experts on every call: those of the call before may still lie in the cache
    ids = [routes(g, tokens, routing, random) for _ in range(_SETS_OF_IDS if is_timed(bench) else 1)]
    key = f"device/experts/{g.name}/{routing}/{tokens}"
    setting: dict[str, Value] = {
        "model": g.name, "tokens": tokens, "routing": routing, "distinct_experts": distinct(ids),
        "experts": g.experts,
    }  # fmt: skip
    what = f"routed experts of {g.name}, {tokens} tokens, {routing} routing"
    fused = [_call(layer.function, u, one, weights, layer.weights) for one in ids]
    checked = _checked(layer, u, ids[0], weights)
    limits = {"relative_l2": _RELATIVE_L2}
    subject = Subject(
        key, f"{what}: F, two launches", layer.cost(ids), "bfloat16", setting, checked, limits,
        evidence_of(bench, layer.has_kernel),
    )  # fmt: skip
    found = row(bench, subject, fused, _BUDGET_S[bench.quick])
    yield found
    if found.state != "failed":
        yield from _others(bench, layer, subject, what, (u, ids, weights), fused)


def _others(
    bench: Bench, layer: Layer, subject: Subject, what: str, given: tuple[Tensor, list[Tensor], Tensor], fused: list[Call]
) -> Iterator[Row]:  # fmt: skip
    u, ids, weights = given
    for name, words, function, stored in (
        ("unfused", "B1, the same kernels one by one", *_unfused(bench, layer)),
        ("bf16", "B2, the same kernels on experts de-quantised before", *_widened(bench, layer, subject)),
        ("naive", "B3, naive torch: every chosen expert de-quantised on every call", *_naive(layer, ids)),
    ):
        key = f"{subject.key}/{name}"
        if isinstance(function, str):
            yield not_run(key, f"{what}: {words}", function, command=bench.command(key))
            continue
        other = replace(layer, weights=stored, function=function)
        mine = [_call(function, u, one, weights, stored) for one in ids]
        one = Subject(
            key, f"{what}: {words}", other.cost(ids), "bfloat16", subject.setting, _checked(other, u, ids[0], weights, layer),
            subject.limits, evidence_of(bench, layer.has_kernel and name != "naive"),
        )  # fmt: skip
        found = row(bench, one, mine, _BUDGET_S[bench.quick])
        if found.state != "failed" and is_timed(bench):
            told = against(mine, fused, bench.backend, _BUDGET_S[bench.quick])
            found = replace(
                found,
                values={**found.values, **told},
                note=f"a: this, b: F; {RATIO}" if name == "unfused" else "a: this, b: F",
            )
        yield found


def _call(function: Any, u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights) -> Call:
    return lambda: function(u, ids, weights, experts, LIMIT, FAST)


def _checked(
    layer: Layer, u: Tensor, ids: Tensor, weights: Tensor, stored: Layer | None = None
) -> dict[str, Value]:
    """The first rows beside the references on the stored values."""
    n = min(_CHECKED_ROWS, len(u))
    got = layer.function(u, ids, weights, layer.weights, LIMIT, FAST)[:n]
    want = o.routed_experts(u[:n], ids[:n], weights[:n], (stored or layer).weights, LIMIT, FAST)
    return {"relative_l2": relative_l2(got, want), "rows_checked": n}


def _unfused(bench: Bench, layer: Layer) -> tuple[Any, ExpertWeights]:
    found = bench.backend.variants("routed_experts").get("unfused")
    return (found or f"backend `{bench.backend.name}` has no unfused form of its kernels"), layer.weights


def _widened(bench: Bench, layer: Layer, subject: Subject) -> tuple[Any, ExpertWeights]:
    wide = 2 * sum(w.data.shape[0] * w.out_features * w.in_features for w in layer.stacks)
    free = free_bytes(bench.backend)
    if free is not None and wide * 1.2 > free:
        return f"experts in BF16 take {wide:,} bytes, {free:,} are free", layer.weights
    stacks = tuple(
        Weight(torch.stack([_one(w, e).dequantize().bfloat16() for e in range(layer.geometry.experts)]))
        for w in layer.stacks
    )
    return layer.function, ExpertWeights(packed=(stacks[0], stacks[1], stacks[2]))


def _one(stack: Weight, index: int) -> Weight:
    scale = None if stack.scale is None else stack.scale[index]
    return replace(stack, data=stack.data[index], scale=scale)


def _naive(layer: Layer, ids: list[Tensor]) -> tuple[Any, ExpertWeights]:
    if len(ids[0]) > _NAIVE_TOKENS:
        return (
            f"more than {_NAIVE_TOKENS} tokens de-quantise nearly every expert on every call",
            layer.weights,
        )
    # read once, before anything is timed: a host read inside would be counted as the device's time
    places = {
        id(one): [(e, *torch.nonzero(one == e, as_tuple=True)) for e in torch.unique(one).tolist()]
        for one in ids
    }

    def run(
        u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Any
    ) -> Tensor:
        y = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
        for e, token, choice in places[id(ids)]:
            w1, w2, w3 = (_one(w, e).dequantize().bfloat16() for w in layer.stacks)
            rows = u[token]
            g, v = (rows @ w1.T).float().clamp(max=limit), (rows @ w3.T).float().clamp(-limit, limit)
            a = torch.nn.functional.silu(g) * v * weights[token, choice][:, None]
            y.index_add_(0, token, (a.bfloat16() @ w2.T).float())
        return y

    return run, layer.weights
