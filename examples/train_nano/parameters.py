"""The trainable tensors of a V4 model: official names, shapes, first values, optimizer, and how each is stored when released."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.convert import round_weights

Stored = Literal["fp8", "fp4", "bf16", "f32"]


@dataclass(frozen=True)
class Spec:
    """One tensor: how it starts and how it ends.

    Attributes:
        std: standard deviation of the first values. mean: their mean.
        stored: encoding in the released layout. muon: a matrix that Muon updates; everything else is AdamW's.
    """

    name: str
    shape: tuple[int, ...]
    stored: Stored
    std: float = 0.0
    mean: float = 0.0
    muon: bool = False


def specs(c: ModelConfig) -> Iterator[Spec]:
    """Every trainable tensor of the backbone, in file order. Routing biases and hash tables are not trained by gradient."""
    d, m = c.hidden_size, c.hc_mult
    yield Spec("embed.weight", (c.vocab_size, d), "bf16", 0.3)
    for layer in c.layers:
        yield from _attention(c, layer)
        yield from _moe(c, layer.prefix)
        for which in ("attn", "ffn"):
            yield from _hyper(c, f"{layer.prefix}hc_{which}_")
            yield Spec(f"{layer.prefix}{which}_norm.weight", (d,), "bf16", mean=1.0)
    yield Spec("hc_head_fn", (m, m * d), "f32", 0.005)
    yield Spec("hc_head_base", (m,), "f32", 0.2, -1.0)
    yield Spec("hc_head_scale", (1,), "f32", mean=1.0)
    yield Spec("norm.weight", (d,), "bf16", mean=1.0)
    yield Spec("head.weight", (c.vocab_size, d), "bf16", 0.5 / math.sqrt(d))


def _matrix(name: str, out: int, width: int, stored: Stored, gain: float = 1.0, muon: bool = True) -> Spec:
    return Spec(f"{name}.weight", (out, width), stored, gain / math.sqrt(width), muon=muon)


def _attention(c: ModelConfig, layer: LayerSpec) -> Iterator[Spec]:
    at, d, heads, rank = f"{layer.prefix}attn.", c.hidden_size, c.num_attention_heads, c.q_lora_rank
    yield _matrix(f"{at}wq_a", rank, d, "fp8")
    yield Spec(f"{at}q_norm.weight", (rank,), "bf16", mean=1.0)
    yield _matrix(f"{at}wq_b", heads * c.head_dim, rank, "fp8")
    yield _matrix(f"{at}wkv", c.head_dim, d, "fp8")
    yield Spec(f"{at}kv_norm.weight", (c.head_dim,), "bf16", mean=1.0)
    yield Spec(f"{at}attn_sink", (heads,), "f32")
    yield _matrix(f"{at}wo_a", c.o_groups * c.o_lora_rank, heads // c.o_groups * c.head_dim, "fp8")
    yield _matrix(f"{at}wo_b", d, c.o_groups * c.o_lora_rank, "fp8", 0.5)
    if layer.ratio:
        yield from _compressor(f"{at}compressor.", d, c.head_dim, layer)
    if layer.kind == "csa":
        yield _matrix(f"{at}indexer.wq_b", c.index_n_heads * c.index_head_dim, rank, "fp8")
        yield _matrix(f"{at}indexer.weights_proj", c.index_n_heads, d, "bf16", muon=False)
        yield from _compressor(f"{at}indexer.compressor.", d, c.index_head_dim, layer)


def _compressor(at: str, d: int, width: int, layer: LayerSpec) -> Iterator[Spec]:
    w = width * (2 if layer.overlap else 1)
    yield _matrix(f"{at}wkv", w, d, "bf16")
    yield _matrix(f"{at}wgate", w, d, "bf16")
    yield Spec(f"{at}ape", (layer.ratio, w), "f32", 0.1)
    yield Spec(f"{at}norm.weight", (width,), "bf16", mean=1.0)


def _moe(c: ModelConfig, prefix: str) -> Iterator[Spec]:
    d, i = c.hidden_size, c.moe_intermediate_size
    yield Spec(f"{prefix}ffn.gate.weight", (c.n_routed_experts, d), "bf16", 1 / math.sqrt(d))
    # the experts of a layer are trained as one tall matrix each of w1, w3 and w2: few large updates instead of many small
    places: list[tuple[str, int, Stored]] = [
        ("experts", c.n_routed_experts, "fp4"),
        ("shared_experts", 1, "fp8"),
    ]
    for place, count, stored in places:
        yield _matrix(f"{prefix}ffn.{place}.w1", count * i, d, stored)
        yield _matrix(f"{prefix}ffn.{place}.w3", count * i, d, stored)
        yield _matrix(f"{prefix}ffn.{place}.w2", count * d, i, stored, 0.5)


def _hyper(c: ModelConfig, at: str) -> Iterator[Spec]:
    m = c.hc_mult
    yield Spec(f"{at}fn", ((2 + m) * m, m * c.hidden_size), "f32", 0.005)
    yield Spec(f"{at}base", ((2 + m) * m,), "f32", 0.3)
    yield Spec(f"{at}scale", (3,), "f32", mean=1.0)


class Parameters(nn.Module):
    """All tensors of a model by official name: trained ones as Parameters, routing biases and hash tables as buffers."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.specs = {spec.name: spec for spec in specs(config)}
        generator = torch.Generator().manual_seed(seed)
        self._trained = nn.ParameterDict()
        for spec in self.specs.values():
            value = torch.randn(spec.shape, generator=generator) * spec.std + spec.mean
            if spec.name.endswith("_base") and "head" not in spec.name:
                _near_identity(value, config.hc_mult)
            self._trained[_key(spec.name)] = nn.Parameter(value)
        for layer in config.layers:
            name = f"{layer.prefix}ffn.gate."
            if layer.hash_routing:
                self.register_buffer(_key(f"{name}tid2eid"), _hash_table(config, layer.index))
            else:
                self.register_buffer(_key(f"{name}bias"), torch.zeros(config.n_routed_experts))

    def named(self) -> dict[str, Tensor]:
        """Float tensors by official name."""
        return self._official({name: self._trained[_key(name)] for name in self.specs})

    def rounded(self) -> dict[str, Tensor]:
        """The same tensors as the released file will hold them; gradients pass straight through."""
        return {**self.named(), **round_weights(self.config, self.named())}

    def _official(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {name.replace("/", "."): b for name, b in self.named_buffers()}
        for name, value in trained.items():
            before, experts, which = name.partition(".experts.")
            if not experts:
                named[name] = value
                continue
            for e, one in enumerate(value.chunk(self.config.n_routed_experts)):
                named[f"{before}.experts.{e}.{which}"] = one
        return named

    def bias(self, layer: LayerSpec) -> Tensor | None:
        """The routing bias of a layer, None where routing is hashed."""
        return None if layer.hash_routing else self.get_buffer(_key(f"{layer.prefix}ffn.gate.bias"))

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Parameters for Muon, for AdamW, and for AdamW at the rate of embeddings."""
        found: Mapping[str, list[nn.Parameter]] = {"muon": [], "adam": [], "embed": []}
        for name, spec in self.specs.items():
            which = "muon" if spec.muon else "embed" if name in ("embed.weight", "head.weight") else "adam"
            found[which].append(self._trained[_key(name)])
        return found["muon"], found["adam"], found["embed"]


def _key(name: str) -> str:
    return name.replace(".", "/")


def _near_identity(base: Tensor, m: int) -> None:
    # streams start almost unmixed; the random part breaks their symmetry
    base[:m] -= 1.0
    base[2 * m :].view(m, m).diagonal().add_(3.0)


def _hash_table(c: ModelConfig, seed: int) -> Tensor:
    """K different experts for every token id, each expert equally often."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(c.vocab_size, generator=generator) % c.n_routed_experts
    step = torch.randint(1, c.n_routed_experts, (c.vocab_size,), generator=generator)
    ids = [(order + k * step) % c.n_routed_experts for k in range(c.num_experts_per_tok)]
    return torch.stack(ids, -1).long()
