"""The one model as a graph: `exact` numerics, one sequence from an empty state, token ids in and logits out.

Nothing here defines a layer: the graph is what `V4Model` does when it runs. `trace` gives a graph that also shows what lies
between the layers, and `cut` takes from it the part that a file is to hold.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.convert import FloatTensors, unquantised
from v4sdk.kv_cache import KVCache, LayerCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT
from v4sdk.ops.batch import Batch
from v4sdk.ops.op import REFERENCES, OpTable
from v4sdk.tensors import expected_tensors
from v4sdk.weights import ExpertWeights, Weight, WeightSource
from v4sdk_bench.export.graph_ops import GRAPH_OPS

if TYPE_CHECKING:
    import onnx_ir as ir

# the length of the example that a graph of any length is traced with
_EXAMPLE_TOKENS = 160
_TOKENS = "tokens"


def layer_label(spec: LayerSpec) -> str:
    """What a block is called: `swa-hash`, `csa`, `hca`, ..."""
    return f"{spec.kind}-hash" if spec.hash_routing else spec.kind


def layers_of_each_kind(config: ModelConfig) -> tuple[int, ...]:
    """The first layer of every kind of attention and routing that the model has, in order."""
    first: dict[str, int] = {}
    for spec in config.layers:
        first.setdefault(layer_label(spec), spec.index)
    return tuple(sorted(first.values()))


def boundary_tokens(config: ModelConfig) -> int:
    """Tokens that cross every boundary at which something new is computed: window, first entries, the limit of top-k."""
    csa = [spec.ratio for spec in config.layers if spec.kind == "csa"]
    limit = config.index_topk * min(csa) if csa else 0
    return max(config.sliding_window, limit, *(spec.ratio for spec in config.layers)) + 32


def chain(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The configuration of some layers one after the other, without quantisation and draft blocks."""
    specs = config.layers
    return replace(
        unquantised(config),
        num_hidden_layers=len(layers),
        compress_ratios=tuple(specs[i].ratio for i in layers),
        # hashed layers come first in every model, and so among some of its layers
        num_hash_layers=sum(specs[i].hash_routing for i in layers),
        num_nextn_predict_layers=0,
        dspark_block_size=None,
        dspark_markov_rank=None,
        dspark_target_layer_ids=(),
    )


@dataclass(frozen=True)
class Source:
    """The layers to export, and their weights in float32.

    Attributes:
        name, fingerprint: of the checkpoint. config: unquantised, of these layers alone.
        layers: where each of them stands in the checkpoint. tensors: by official name, layers counted anew from 0.
    """

    name: str
    fingerprint: str
    config: ModelConfig
    layers: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(
        cls, name: str, fingerprint: str, config: ModelConfig, tensors: Mapping[str, Tensor],
        layers: Sequence[int] | None = None,
    ) -> Source:  # fmt: skip
        """Widen weights to float32: exact, since FP8 and FP4 times a power of two are float32 values.

        Args:
            tensors: of the whole checkpoint. layers: those to keep, ascending; all by default.
        """
        kept = tuple(range(config.num_hidden_layers)) if layers is None else tuple(layers)
        small, floats = chain(config, kept), FloatTensors(config, tensors)
        found = {}
        for spec in expected_tensors(small):
            tensor = floats[_original(spec.name, kept)]
            found[spec.name] = tensor.float() if tensor.is_floating_point() else tensor.long()
        return cls(name, fingerprint, small, kept, found)

    def model(self, ops: OpTable = REFERENCES) -> V4Model:
        """These layers as a model in `exact` numerics."""
        return V4Model(Binder(self.config, WeightSource(self.tensors)), EXACT, ops)


def _original(name: str, layers: Sequence[int]) -> str:
    if not name.startswith("layers."):
        return name
    _, index, rest = name.split(".", 2)
    return f"layers.{layers[int(index)]}.{rest}"


def shown(config: ModelConfig) -> list[str]:
    """Names of what a traced graph shows.

    `streams_i` [T, M, N] is in front of layer i and, for i the number of layers, behind the last; `index_topk_i` [T, K] and
    `route_ids_i` [T, K] are what layer i chose; `logits` [T, V].
    """
    names = ["streams_0"]
    for spec in config.layers:
        names += [*choices(spec), f"streams_{spec.index + 1}"]
    return [*names, "logits"]


def choices(spec: LayerSpec) -> list[str]:
    """Names of what one layer chooses."""
    routes = f"route_ids_{spec.index}"
    return [f"index_topk_{spec.index}", routes] if spec.kind == "csa" else [routes]


def observed(model: V4Model, batch: Batch, caches: list[LayerCache]) -> dict[str, Tensor]:
    """Run a whole prompt and keep what a graph shows, by name."""
    found: dict[str, Tensor] = {}

    def observe(name: str, tensor: Tensor) -> None:
        kind, _, layer = name.rpartition("_")
        if kind in ("index_topk", "route_ids"):
            found[name] = tensor
        elif kind == "streams_after_layer":
            found[f"streams_{int(layer) + 1}"] = tensor

    x = model.ops[o.embed](batch.token_ids, model.embedding, model.config.hc_mult, model.numerics)
    found["streams_0"] = x
    found["logits"] = model.logits(model.run_blocks(model.blocks, x, batch, caches, observe))
    return found


@dataclass(frozen=True)
class Traced:
    """A graph that shows the streams between all layers, and every choice.

    Attributes:
        tokens: the length it was made for; None for any. graph: from `token_ids` [T] int64 to everything that is `shown`.
    """

    source: Source
    tokens: int | None
    graph: ir.Model


def trace(
    source: Source, tokens: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Traced:
    """Trace a model's prefill.

    Args:
        tokens: fixed length of the prompt, at least 2, which is faster to trace; None leaves it open.
    """
    module = _Prefill(source)
    example = torch.zeros(tokens or _EXAMPLE_TOKENS, dtype=torch.long)
    anything: Any = torch.export.Dim.DYNAMIC
    shapes = None if tokens else ({0: anything},)
    with torch.no_grad(), _quiet():
        say("tracing the model")
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        say("translating it to ONNX")
        # the exporter's own optimiser takes minutes for what runtimes do on loading
        translated = torch.onnx.export(
            program, dynamo=True, input_names=["token_ids"], output_names=shown(source.config), optimize=False,
            verbose=False, custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )  # fmt: skip
    if translated is None:
        raise RuntimeError("the exporter gave no graph")
    graph = translated.model
    _clean(graph, module.names)
    return Traced(source, tokens, graph)


def cut(traced: Traced, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Take the part between named values out of a traced graph; weights are shared, not copied.

    Of `token_ids` some parts need no more than how many they are; those take it from the streams and do without.
    """
    import onnx_ir as ir

    part = ir.convenience.extract(traced.graph.graph, list(inputs), list(outputs))
    part.name = "v4"
    first, *streams = part.inputs
    if streams:
        for user, at in list(first.uses()):
            if user.op_type == "Shape":
                user.replace_input_with(at, streams[0])
                # ids have one dimension, which is the first of the streams
                user.attributes["end"] = ir.AttrInt64("end", 1)
        if not first.uses():
            part.inputs.remove(first)
    return ir.Model(part, ir_version=traced.graph.ir_version)


def reweighted(traced: Traced, source: Source) -> Traced:
    """The same graph with other weights of the same shapes; the given graph has them too from then on."""
    import onnx_ir as ir

    initializers = traced.graph.graph.initializers
    for name, tensor in _stack_experts(source.config, source.tensors):
        initializers[name].const_value = ir.tensor(tensor, name=name)
    return replace(traced, source=source)


class _Prefill(torch.nn.Module):
    """What is traced: ids [T] to everything that is `shown`, in that order."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.config = source.config
        # one page serves every ratio
        self._page_tokens = math.lcm(128, *(spec.ratio for spec in self.config.layers if spec.ratio))
        self._rows = KVCache(self.config, "float32", page_tokens=self._page_tokens).layers
        # an attribute's name has no dots
        self.names = {}
        for name, tensor in _stack_experts(self.config, source.tensors):
            self.names[name.replace(".", "__")] = name
            self.register_buffer(name.replace(".", "__"), tensor)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        # bound here, so that the model holds what the tracer puts into the buffers' place
        tensors = {name: getattr(self, attribute) for attribute, name in self.names.items()}
        model = V4Model(Binder(self.config, _Stacked(tensors)), EXACT, GRAPH_OPS)
        found = observed(model, *self._empty_state(token_ids))
        return tuple(found[name] for name in shown(self.config))

    def _empty_state(self, token_ids: Tensor) -> tuple[Batch, list[LayerCache]]:
        """One sequence at position 0, and just enough pages in order: all from the number of ids alone."""
        num_tokens = token_ids.shape[0]
        # never one page: the tracer takes a size of 1 for a constant
        num_pages = num_tokens // self._page_tokens + 2
        batch = Batch(
            token_ids, torch.arange(num_tokens, dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32) * num_tokens, torch.zeros(1, dtype=torch.int32),
            torch.arange(num_pages, dtype=torch.int32)[None], torch.zeros(num_tokens, dtype=torch.long), self._page_tokens,
        )  # fmt: skip
        caches = [
            LayerCache(
                **{name: torch.zeros(2, *t.shape[1:]) for name, t in rows.fixed().items()},
                **{name: torch.zeros(num_pages + 1, *t.shape[1:]) for name, t in rows.paged().items()},
            )
            for rows in self._rows
        ]
        return batch, caches


class _Stacked(WeightSource):
    """Reads the experts of a layer from one stack per matrix."""

    def experts(self, prefix: str, count: int) -> ExpertWeights:
        """Routed experts `prefix.experts.w1|w2|w3`: [E, out, in]."""
        w1, w2, w3 = (Weight(self.tensor(f"{prefix}.experts.{w}.weight")) for w in ("w1", "w2", "w3"))
        return ExpertWeights(packed=(w1, w2, w3))


def _stack_experts(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in tensors.items() if ".experts." not in name)
    for spec in config.layers:
        at = f"{spec.prefix}ffn.experts"
        for w in ("w1", "w2", "w3"):
            each = [tensors[f"{at}.{e}.{w}.weight"] for e in range(config.n_routed_experts)]
            yield f"{at}.{w}.weight", torch.stack(each)


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort(stable=True)` as TopK, which the format defines to give ties to the lower index."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
    # runtimes sort floats and wide integers only
    wide = x if x.dtype.is_floating_point() else op.Cast(x, to=ir.DataType.INT64)
    values, indices = op.TopK(wide, size, axis=dim, largest=int(descending), sorted=1)
    return (values if wide is x else op.Cast(values, to=x.dtype)), indices


def _clean(model: ir.Model, names: Mapping[str, str]) -> None:
    """Official names for weights, one name for the length, and nothing about the machine it was traced on."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    model.metadata_props.clear()
    for attribute, name in names.items():
        if attribute in graph.initializers:
            graph.initializers[attribute].name = name
    known = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in known:
                # sizes between are for the runtime to infer; the tracer's have its own symbols in them
                value.shape = None
    for value in known:
        if value.shape is not None:
            value.shape = ir.Shape([_TOKENS if not isinstance(size, int) else size for size in value.shape])


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says about itself: a package it does not need, and its own use of an old class."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(before)
