"""Single layers of V4-Flash and V4-Pro with drawn weights in the released formats: `python -m v4sdk_bench.speed.real_shapes`.

The layer's context is made up (`synthetic_kv`). A decode step needs a handful of its hundreds of experts: those that the step
chooses are drawn, the others share the bytes of one. Every byte that is read is there for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.backend import Backend, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import CacheRows, KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.ops.batch import Batch
from v4sdk.ops.inputs import Draw
from v4sdk.ops.op import Cost, OpTable
from v4sdk.presets import V4_FLASH, V4_PRO, shrunk
from v4sdk.tensors import TensorSpec, expected_tensors
from v4sdk.weights import WeightSource
from v4sdk_bench.parity.golden import sets_agree
from v4sdk_bench.parity.metrics import relative_l2
from v4sdk_bench.speed.ceilings import free_bytes
from v4sdk_bench.speed.op_counts import counted
from v4sdk_bench.speed.synthetic_kv import fill
from v4sdk_bench.stage import BenchError

MODELS: Mapping[str, ModelConfig] = {"flash": V4_FLASH, "pro": V4_PRO}
RATIOS = {"swa": 0, "csa": 4, "hca": 128}
CONTEXT = 8192
PREFILL = 128
# the embedding and the head are no part of a layer, and their gigabytes are not drawn
_VOCABULARY = 256
# besides the weights: de-quantised tiles, activations, a second set of experts while they are laid out
_ROOM = 1.5
# the accepted distance of a layer's output to the references: as of one layer to the official forward pass
OUTPUT_LIMIT = 3.1e-2
# the least share of tokens that both send to the same experts; elsewhere, how far down the references' list a choice may be
ALIKE_LEAST = 0.9
_NEXT_BEST = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerCase:
    """One layer and one step: `model` flash or pro, `kind` swa, csa or hca, `tokens` 1 for decoding, more for prefill."""

    model: str
    kind: str
    tokens: int = 1

    @property
    def key(self) -> str:
        """Of its row."""
        step = "decode" if self.tokens == 1 else f"prefill/{self.tokens}"
        return f"model/{self.model}/layer/{self.kind}/{step}"

    @property
    def config(self) -> ModelConfig:
        """The model cut to this layer; learned routing, as in nearly all layers."""
        return shrunk(MODELS[self.model], (RATIOS[self.kind],), num_hash_layers=0, vocab_size=_VOCABULARY)


@dataclass
class Layer:
    """A layer that is ready to run.

    Attributes:
        step: runs it once, always over the same tokens and context. cost: of the step, by the ops' own rules.
        experts: how many the step chooses; each has bytes of its own. weight_bytes: as stored, of those.
        relative_l2: distance of the output to that of the references, which are sent to the experts that the backend chose: of
            two with nearly the same score either may be chosen, and then the outputs are of different experts.
        routed_alike: share of tokens whose experts the references choose too. finite: all of the output is numbers.
    """

    case: LayerCase
    step: Callable[[], Tensor]
    cost: Cost
    experts: int
    weight_bytes: int
    relative_l2: float
    routed_alike: float
    finite: bool


def layer(case: LayerCase, backend: Backend, say: Say = lambda text: None, seed: int = 0) -> Layer:
    """Draw a layer, lay it out for a backend and check its output.

    Raises:
        BenchError: if memory does not hold what the step reads, or the backend routes elsewhere than the references.
    """
    config, label = case.config, f"{case.model}-{case.kind}-{seed}"
    with torch.inference_mode():
        x = _streams(config, case, seed)
        say(f"{case.key}: drawing the dense matrices")
        tensors = draw_layer(config, label)
        say(f"{case.key}: finding the experts that the step chooses")
        host = KVCache(config, "native")
        routes = _routes(V4Model(Binder(config, WeightSource(tensors)), FAST), x, *_context(host, case, seed))
        routed = _experts(routes)
        _check_memory(config, backend, len(routed))
        say(f"{case.key}: drawing {len(routed)} experts")
        draw_experts(tensors, config, label, routed)
        ours = _bound(config, tensors, backend)
        x = x.to(backend.device)
        batch, cache = _context(KVCache(config, "native", backend.device), case, seed)
        slot = CacheRows(int(batch.slots[0]))
        fixed = cache.snapshot_fixed(slot)
        chosen = _routes(ours, x, batch, cache)
        cache.restore_fixed(slot, fixed)
        if strangers := _experts(chosen) - routed:
            _stray(backend, sorted(strangers))

        def step() -> Tensor:
            with torch.inference_mode():
                if case.tokens > 1:
                    # reading a prompt looks back at ring rows that it then overwrites; a decode step repeats itself exactly
                    cache.restore_fixed(slot, fixed)
                out = ours.run_blocks(ours.blocks, x, batch, cache.layers)
                backend.synchronize()
                return out

        say(f"{case.key}: comparing with the references")
        with counted(ours, costs=True) as table:
            out = step()
        plain = V4Model(_binder(config, tensors, backend), FAST, _routing_to(chosen, backend))
        batch_too, cache_too = _context(KVCache(config, "native", backend.device), case, seed)
        expected = plain.run_blocks(plain.blocks, x, batch_too, cache_too.layers)
        apart, alike = relative_l2(out, expected), float(sets_agree(chosen, routes).float().mean())
        stored = {t.data_ptr(): t.nbytes for t in tensors.values()}
        return Layer(
            case,
            step,
            table.cost,
            len(routed),
            sum(stored.values()),
            apart,
            alike,
            bool(torch.isfinite(out).all()),
        )


def draw_layer(config: ModelConfig, label: str) -> dict[str, Tensor]:
    """Every tensor of a one-layer model; all its experts are the same bytes."""
    draw, found = Draw(label, torch.device("cpu")), dict[str, Tensor]()
    specs = {spec.name: spec for spec in expected_tensors(config)}
    for name in specs:
        if _expert(name):
            found[name] = found[_of_expert(name, 0)]
        elif name not in found:
            found |= _drawn(name, specs, draw)
    return found


def draw_experts(
    tensors: dict[str, Tensor], config: ModelConfig, label: str, experts: frozenset[int]
) -> None:
    """Give each of `experts` bytes of its own."""
    specs = {spec.name: spec for spec in expected_tensors(config)}
    mine = [name for name in specs if _expert(name) == 0]
    for index in sorted(experts - {0}):
        draw = Draw(f"{label}-{index}", torch.device("cpu"))
        for name in mine:
            if name.endswith(".weight"):
                tensors |= {_of_expert(n, index): t for n, t in _drawn(name, specs, draw).items()}


def _drawn(name: str, specs: Mapping[str, TensorSpec], draw: Draw) -> dict[str, Tensor]:
    spec = specs[name]
    stem = name.removesuffix(".scale").removesuffix(".weight")
    if f"{stem}.scale" in specs:
        rows, columns = specs[f"{stem}.weight"].shape
        packed = specs[f"{stem}.weight"].dtypes[0] == "I8"
        weight = draw.weight("fp4" if packed else "fp8", rows, 2 * columns if packed else columns)
        assert weight.scale is not None
        return {f"{stem}.weight": weight.data, f"{stem}.scale": weight.scale}
    if name.endswith("norm.weight"):
        return {name: draw.gain(*spec.shape)}
    dtype = torch.bfloat16 if spec.dtypes[0] == "BF16" else torch.float32
    # unit gain; what has one dimension is a bias or a sink
    scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 and name != "embed.weight" else 0.1
    return {name: draw.normal(*spec.shape, dtype=dtype, scale=scale)}


def _expert(name: str) -> int | None:
    _, found, rest = name.partition(".ffn.experts.")
    return int(rest.partition(".")[0]) if found else None


def _of_expert(name: str, index: int) -> str:
    head, middle, rest = name.partition(".ffn.experts.")
    return f"{head}{middle}{index}.{rest.partition('.')[2]}"


def _streams(config: ModelConfig, case: LayerCase, seed: int) -> Tensor:
    draw = Draw(f"streams-{case.model}-{case.tokens}-{seed}", torch.device("cpu"))
    return draw.normal(case.tokens, config.hc_mult, config.hidden_size, dtype=torch.bfloat16)


def _context(cache: KVCache, case: LayerCase, seed: int) -> tuple[Batch, KVCache]:
    """The last tokens of a context of `CONTEXT`, whose rows are made up; the same on every device."""
    rows = cache.allocate()
    fill(cache, rows, CONTEXT, seed)
    return cache.batch([rows], [[0] * case.tokens], [CONTEXT - case.tokens]), cache


def _routes(model: V4Model, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
    """The experts that each token chooses, [T, K]. The step ends there, so any bytes do for theirs; what it wrote stays."""
    seen: list[Tensor] = []

    def observe(name: str, value: Tensor) -> None:
        if name.startswith("route_ids"):
            seen.append(value)
            raise _Enough

    with contextlib.suppress(_Enough):
        model.run_blocks(model.blocks, x, batch, cache.layers, observe)
    return seen[0].cpu()


def _experts(routes: Tensor) -> frozenset[int]:
    return frozenset(torch.unique(routes).tolist())


def _routing_to(chosen: Tensor, backend: Backend) -> OpTable:
    """The references, sent to the experts [T, K] that a backend chose; each must be among the next best of theirs."""

    def route(
        u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        best = o.route(u, gate, bias, min(num_experts_per_tok + _NEXT_BEST, gate.shape[0]), scale)[0]
        given = chosen.to(u.device)
        far = ~(given[:, :, None] == best[:, None, :]).any(dim=2)
        if bool(far.any()):
            _stray(backend, sorted(set(given[far].tolist())))
        table, rows = given.long(), torch.arange(len(given), device=u.device)
        return o.route_hash(u, gate, table, rows, scale)

    return OpTable({o.route.name: route})


def _stray(backend: Backend, experts: list[int]) -> NoReturn:
    raise BenchError(
        f"{backend.name} routes to experts {experts}, which the references do not choose",
        hint=f"v4sdk conformance --backend {backend.name} --op route",
    )


class _Enough(Exception):
    """The router has spoken."""


def _check_memory(config: ModelConfig, backend: Backend, chosen: int) -> None:
    one = sum(s.nbytes for s in expected_tensors(config) if _expert(s.name) == 0)
    dense = sum(s.nbytes for s in expected_tensors(config) if _expert(s.name) is None)
    # a device other than the host keeps a stack of all of them, whatever was drawn
    kept = chosen if backend.device.type == "cpu" else config.n_routed_experts
    free, needed = free_bytes(backend), int(_ROOM * (dense + kept * one))
    if free is not None and needed > free:
        raise BenchError(
            f"the layer needs {needed:,} bytes, {free:,} are free",
            hint="close what uses memory, or take a larger machine",
        )


def _binder(config: ModelConfig, tensors: Mapping[str, Tensor], backend: Backend) -> Binder:
    block = config.quantization.block if config.quantization else (128, 128)
    return Binder(
        config, WeightSource(tensors, block), backend.prepare_weight, backend.prepare_experts, backend.place
    )  # fmt: skip


def _bound(config: ModelConfig, tensors: Mapping[str, Tensor], backend: Backend) -> V4Model:
    table = bind(backend, config, EngineConfig(FAST, "native", backend.capability())).table
    return V4Model(_binder(config, tensors, backend), FAST, table)


def cases(quick: bool) -> Iterator[LayerCase]:
    """Quick: a decode step of the layer with an indexer. Else every kind of both models, decoding and reading 128 tokens."""
    if quick:
        yield LayerCase("flash", "csa")
        return
    # the dear ones last, should the time run out
    for tokens in (1, PREFILL):
        for model in MODELS:
            for kind in RATIOS:
                yield LayerCase(model, kind, tokens)


def main() -> int:
    """Time layers and print a line for each."""
    from v4sdk import plugins
    from v4sdk.errors import V4Error
    from v4sdk_bench.speed.timing import sample

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="flash")
    parser.add_argument("--kind", choices=sorted(RATIOS), default="csa")
    parser.add_argument("--tokens", type=int, default=1, help="1 decodes, more reads a prompt (default: 1)")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    try:
        found = layer(
            LayerCase(args.model, args.kind, args.tokens), plugins.select(args.backend),
            lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
    except V4Error as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    times = sample(found.step, 5.0, least=3)
    print(
        f"{found.case.key}: {times.median:.3f} s ({times.low:.3f} to {times.high:.3f}), {found.cost.bytes / 1e6:.0f} MB, "
        f"{found.cost.flops / 1e9:.2f} GFLOP, {found.cost.bytes / times.median / 1e9:.2f} GB/s; to the references "
        f"{found.relative_l2:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
