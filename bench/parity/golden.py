"""The golden checkpoints: tiny random models with the outputs of the official forward pass, and how far we are from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from v4sdk import ops as o
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT, REFERENCE, KVFormat, Numerics
from v4sdk.ops.compressor import index_scores
from v4sdk.ops.op import OpTable
from v4sdk.ops.rows import load_index
from v4sdk.weights import WeightSource
from v4sdk_bench.parity.metrics import relative_l2

DECODE_FROM = 130
DECODE_KEY = f"decode_logits_from_{DECODE_FROM}"
MAX_ABS_LIMIT = 1e-4
# exact arithmetic plus the roundings of cache rows and of the indexer: a switch of the references, not a mode
KV_ROUNDED = replace(EXACT, name="in float32", q8_kv=True, q4_index=True)
# The golden's own float32 noise reaches the rounding's edge at two window rows (4e-6 and 6e-6 of the value away from a
# tie), so which side a float32 run takes is chance. In float64 the sides are facts, and they are those of the golden.
KV_ROUNDED_WIDE = replace(KV_ROUNDED, name="in float64", float64=True)

# Tolerances of one layer in reference numerics, from the BF16 step. Both sides round at the same places, so they differ
# only where float32 summation order moves a value across a rounding edge. The worst such event is one BF16 step, 2**-8,
# at the input of a rounded GEMM: a shift of 2**-8 crosses an FP8 edge (step 2**-3) with probability 2**-8 / 2**-3 and
# then moves the value by 2**-3, so a whole operand off by one step leaves a relative error of sqrt(2**-8 * 2**-3).
# Attention is one such link of the chain, the FFN behind it a second: that factor of sqrt(2) was added after a first
# measurement of 2.6e-2 behind an FFN, the rest stood before.
ATTENTION_REL_LIMIT = 2.0**-5.5
LAYER_REL_LIMIT = 2.0**-5
# no single element may be further off than one FP8 step of the largest
LAYER_MAX_ABS_LIMIT = 2.0**-3
SETS_EQUAL_LIMIT = 0.99


@dataclass(frozen=True)
class Golden:
    """One golden checkpoint with one set of expected outputs."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, expected: str = "expected") -> Golden:
        """Read `folder` and its `expected` file."""
        tensors = load_file(folder / "model.safetensors")
        return cls(ModelConfig.from_folder(folder), tensors, load_file(folder / f"{expected}.safetensors"))

    @property
    def token_ids(self) -> list[int]:
        """The input."""
        ids: list[int] = self.expected["input_ids"][0].tolist()
        return ids

    def model(self, numerics: Numerics, ops: OpTable | None = None) -> V4Model:
        """Bind the checkpoint, MTP block included."""
        binder = Binder(self.config, WeightSource(self.tensors))
        return V4Model(binder, numerics, ops or OpTable({}), with_mtp=True)


@torch.no_grad()
def outputs(golden: Golden, numerics: Numerics, fmt: KVFormat = "float32") -> dict[str, Tensor]:
    """Run prefill, decode from token 130, and the MTP block; name the results as the golden file does."""
    model, ids = golden.model(numerics), golden.token_ids
    found: dict[str, Tensor] = {}
    cache = KVCache(golden.config, fmt)
    batch = cache.batch([cache.allocate()], [ids], [0])
    streams = model.forward(batch, cache, found.__setitem__)
    found["logits"] = model.logits(streams)
    cache = KVCache(golden.config, fmt)
    rows = cache.allocate()
    model.forward(cache.batch([rows], [ids[:DECODE_FROM]], [0]), cache)
    steps = [
        model.logits(model.forward(cache.batch([rows], [[ids[p]]], [p]), cache))
        for p in range(DECODE_FROM, len(ids))
    ]
    found[DECODE_KEY] = torch.cat(steps)
    found["mtp_logits"] = mtp_logits(golden, model, streams, fmt)
    return found


def mtp_logits(golden: Golden, model: V4Model, streams: Tensor, fmt: KVFormat) -> Tensor:
    """MTP logits of positions 0..n-2 from the backbone's streams and tokens 1..n-1."""
    cache = KVCache(golden.config, fmt, layers=golden.config.mtp_layers)
    batch = cache.batch([cache.allocate()], [golden.token_ids[1:]], [0])
    return model.mtp_forward(streams[:-1], batch, cache.layers[0])


def max_abs(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of every floating output; routing weights are compared in sorted order."""
    result = {}
    for name, value in found.items():
        want = expected[name].view_as(value)
        if value.is_floating_point():
            a, b = value.double(), want.double()
            if name.startswith("route_weights"):
                a, b = a.sort(-1).values, b.sort(-1).values
            result[name] = float((a - b).abs().max())
    return result


def sets_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of tokens whose chosen experts, or picked entries, are the same set."""
    return {
        name: float(same_sets(value, expected[name].view_as(value)).double().mean())
        for name, value in found.items()
        if not value.is_floating_point()
    }


def same_sets(a: Tensor, b: Tensor) -> Tensor:
    """Per row, whether two lists [T, K] hold the same set."""
    return (a.sort(-1).values == b.sort(-1).values).all(-1)


def sets_agree(a: Tensor, b: Tensor) -> Tensor:
    """As `same_sets`, and no row agrees where the number of choices differs."""
    return same_sets(a, b) if a.shape == b.shape else torch.zeros(b.shape[0], dtype=torch.bool)


@dataclass(frozen=True)
class LayerDifference:
    """One layer from the golden streams of the layer before.

    Attributes:
        relative: relative L2 by output, over tokens whose discrete choices agree. largest: largest element difference
            over the largest element. experts, picks: share of tokens with equal sets; picks is None without an indexer,
            and a set that differs only between entries of exactly equal score counts as equal. plain_picks: without that.
    """

    layer: int
    relative: dict[str, float]
    largest: dict[str, float]
    experts: float
    picks: float | None
    plain_picks: float | None


@torch.no_grad()
def layer_difference(golden: Golden, layer: int, fmt: KVFormat = "native") -> LayerDifference:
    """Run one layer in reference numerics on the golden streams of the layer before, state fresh."""
    scores: list[Callable[[Tensor], Tensor]] = []
    model = golden.model(REFERENCE, OpTable({"index_topk": _recording(scores)}))
    cache = KVCache(golden.config, fmt)
    found: dict[str, Tensor] = {}
    batch = cache.batch([cache.allocate()], [golden.token_ids], [0])
    if layer:
        x = golden.expected[f"streams_after_layer_{layer - 1}"][0]
    else:
        x = model.ops[o.embed](batch.token_ids, model.embedding, golden.config.hc_mult, REFERENCE)
    span = slice(layer, layer + 1)
    model.run_blocks(model.blocks[span], x, batch, cache.layers[span], found.__setitem__)
    want = {name: golden.expected[name].view_as(value) for name, value in found.items()}
    experts = same_sets(found[f"route_ids_{layer}"], want[f"route_ids_{layer}"])
    agree, picks, plain = experts, None, None
    if f"index_topk_{layer}" in found:
        ours, theirs = found[f"index_topk_{layer}"], want[f"index_topk_{layer}"]
        same = same_sets(ours, theirs)
        tied = (scores[0](ours).sort(-1).values == scores[0](theirs).sort(-1).values).all(-1)
        picks, plain = float((same | tied).double().mean()), float(same.double().mean())
        agree = agree & same
    relative, largest = {}, {}
    for part in ("attn_out", "ffn_out", "streams_after_layer"):
        a, b = found[f"{part}_{layer}"][agree].double(), want[f"{part}_{layer}"][agree].double()
        relative[part] = relative_l2(a, b)
        largest[part] = float((a - b).abs().max() / b.abs().max())
    return LayerDifference(layer, relative, largest, float(experts.double().mean()), picks, plain)


@torch.no_grad()
def mtp_difference(golden: Golden) -> float:
    """Relative L2 of the MTP logits in reference numerics, from the golden streams of the last layer."""
    last = golden.config.num_hidden_layers - 1
    streams = golden.expected[f"streams_after_layer_{last}"][0]
    found = mtp_logits(golden, golden.model(REFERENCE), streams, "native")
    return float(relative_l2(found, golden.expected["mtp_logits"][0]))


def _recording(scores: list[Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    """An `index_topk` that also leaves a function from picks [T, K] to their scores, -inf for absent ones."""

    def index_topk(
        q: Tensor, w: Tensor, keys: Tensor, batch: o.Batch, topk: int, ratio: int, n: Numerics
    ) -> Tensor:
        stored = load_index(keys[batch.block_table[0].long()].flatten(0, 1), q.shape[-1])
        every = index_scores(q, w, stored, n)

        def of(picks: Tensor) -> Tensor:
            return torch.where(picks >= 0, every.gather(1, picks.long().clamp_min(0)), -torch.inf)

        scores.append(of)
        return o.index_topk(q, w, keys, batch, topk, ratio, n)

    return index_topk
