"""Layer by layer: what a backend makes of the same input streams, so that one layer's error does not hide in the next one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.kv_cache import KVCache
from v4sdk.model import V4Model
from v4sdk.numerics import KVFormat
from v4sdk.ops.batch import Batch
from v4sdk_bench.parity.golden import ATTENTION_REL_LIMIT, LAYER_REL_LIMIT, sets_agree
from v4sdk_bench.parity.metrics import FLOAT32_RELATIVE, cosine_min, relative_l2

PARTS = ("attn_out", "ffn_out", "streams")
# token ids, text by text
Texts = Sequence[Sequence[int]]
_NAN = float("nan")


@dataclass(frozen=True)
class LayerAgreement:
    """One output of one layer against the reference's.

    Attributes:
        layer: its index. kind: `swa`, `csa` or `hca`, with `hash` where routing is by table. part: of `PARTS`.
        max_abs, relative_l2, cosine_min: over tokens whose choices agree; NaN if none do.
        choices: share of tokens whose experts and picked entries are the same sets.
    """

    layer: int
    kind: str
    part: str
    max_abs: float
    relative_l2: float
    cosine_min: float
    choices: float


def relative_limit(part: str, numerics: str) -> float:
    """Largest relative L2 of a layer in a numerics option.

    `exact` leaves float32 sums alone in another order. The other two round at the same places on both sides, and the golden
    of the official forward pass has derived what a value that falls on the other side of a rounding may do.
    """
    if numerics == "exact":
        return float(FLOAT32_RELATIVE)
    return float(ATTENTION_REL_LIMIT if part == "attn_out" else LAYER_REL_LIMIT)


@torch.inference_mode()
def reference_streams(model: V4Model, fmt: KVFormat, texts: Texts) -> list[Tensor]:
    """Streams [T, M, N] in front of every layer, T being the tokens of all texts."""
    seen: dict[str, Tensor] = {}
    cache, batch = _fresh(model, fmt, texts)
    first = model.ops[o.embed](batch.token_ids, model.embedding, model.config.hc_mult, model.numerics)
    model.forward(batch, cache, seen.__setitem__)
    later = [seen[f"streams_after_layer_{i}"] for i in range(model.config.num_hidden_layers - 1)]
    return [first, *later]


@torch.inference_mode()
def one_layer(model: V4Model, fmt: KVFormat, layer: int, x: Tensor, texts: Texts) -> dict[str, Tensor]:
    """Run one layer from a fresh state on given streams; outputs and choices by their short names, in main memory."""
    cache, batch = _fresh(model, fmt, texts)
    seen: dict[str, Tensor] = {}
    span = slice(layer, layer + 1)
    model.run_blocks(
        model.blocks[span], x.to(model.embedding.device), batch, cache.layers[span], seen.__setitem__
    )
    short = {name.removesuffix(f"_{layer}"): value.cpu() for name, value in seen.items()}
    short["streams"] = short.pop("streams_after_layer")
    return short


def _fresh(model: V4Model, fmt: KVFormat, texts: Texts) -> tuple[KVCache, Batch]:
    cache = KVCache(model.config, fmt, model.embedding.device)
    rows = [cache.allocate() for _ in texts]
    return cache, cache.batch(rows, [list(ids) for ids in texts], [0] * len(texts))


def compare_layers(
    reference: V4Model,
    other: V4Model,
    fmt: KVFormat,
    texts: Texts,
    inputs: Sequence[Tensor] | None = None,
) -> Iterator[LayerAgreement]:
    """Compare every layer of two models of one checkpoint and one numerics option.

    Args:
        texts: read side by side, each by itself. inputs: streams in front of every layer; the reference's own by default.
    """
    streams = inputs if inputs is not None else reference_streams(reference, fmt, texts)
    for layer, x in enumerate(streams):
        want, got = (one_layer(model, fmt, layer, x, texts) for model in (reference, other))
        agree = torch.ones(len(x), dtype=torch.bool)
        for name in ("route_ids", "index_topk"):
            if name in want:
                agree &= sets_agree(got[name], want[name])
        spec = reference.config.layers[layer]
        kind = f"{spec.kind}, hash" if spec.hash_routing else spec.kind
        for part in PARTS:
            a, b, share = got[part][agree], want[part][agree], float(agree.double().mean())
            if not a.numel():
                yield LayerAgreement(layer, kind, part, _NAN, _NAN, _NAN, share)
                continue
            far = float((a.double() - b.double()).abs().max())
            yield LayerAgreement(layer, kind, part, far, relative_l2(a, b), cosine_min(a, b), share)
