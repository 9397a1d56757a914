"""The tensors a checkpoint must hold, from its configuration alone: names, dtypes, shapes and the shard each one is in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.encodings import Encoding, IntegerLayout, QuantizationConfig
from v4sdk.errors import ConfigError

# bytes of one element, by the dtype names of the file format
ITEM_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F32": 4, "I64": 8}
FP4_BLOCK = 32


class TensorSpec(NamedTuple):
    """One tensor on disk.

    Attributes:
        name: full name. dtypes: those that may be found, the released one first. shape: as stored (4-bit numbers are packed).
        component: the part of the model it is counted under. block: `backbone` or `mtp.N`; a whole MTP block may be absent.
        shard: number in the released sharding: embedding, one layer each, head, one MTP block each.
        parameters: weights it stands for; a packed byte holds two, scales and tables count none.
        encoding: how to read it, of a matrix that may be quantised.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    component: str
    block: str
    shard: int
    parameters: int
    encoding: Encoding = "float"

    @property
    def nbytes(self) -> int:
        """Payload at the released dtype."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtypes[0]]


def dense_encoding(config: ModelConfig) -> Encoding:
    """How projections outside the routed experts are stored, unless `config.integers` names them."""
    return "fp8" if config.quantization else "float"


def expert_encoding(config: ModelConfig) -> Encoding:
    """How routed experts are stored; folders may keep FP4 experts beside unquantised projections."""
    return "fp4" if config.expert_dtype == "fp4" else "fp8" if config.expert_dtype == "fp8" else "float"


def expected_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Give every tensor of a checkpoint in shard order; MTP blocks last.

    Raises:
        ConfigError: if an inner dimension is not a multiple of what a 4-bit encoding packs or scales together.
    Source:
        architecture note, tables 3.1 and 3.3; totals equal the published indexes of Flash, Pro and Flash-0731
    """
    lister = _Lister(config)
    head = config.num_hidden_layers + 2
    yield lister.plain(
        "embed.weight", "BF16", (config.vocab_size, config.hidden_size), "embedding", "backbone", 1
    )
    for spec in config.layers:
        yield from lister.layer(spec, "backbone", spec.index + 2)
    yield lister.plain(
        "head.weight", "BF16", (config.vocab_size, config.hidden_size), "head", "backbone", head
    )
    yield from lister.collapse("", "backbone", head)
    for n, spec in enumerate(config.mtp_layers):
        block = f"mtp.{n}"
        yield from lister.layer(spec, block, head + 1 + n)
        yield from (
            lister.draft(n, block, head + 1 + n) if config.is_dspark else lister.mtp(block, head + 1 + n)
        )


class _Lister:
    """Shape rules of one configuration."""

    def __init__(self, config: ModelConfig) -> None:
        self.c = config
        self._tile = (config.quantization or QuantizationConfig()).block
        self._dense, self._experts = dense_encoding(config), expert_encoding(config)
        ue8m0 = config.quantization is None or config.quantization.scale_fmt == "ue8m0"
        # Base checkpoints keep float32 scales, and their config file is not known to say so: the header decides
        self._scales = ("F8_E8M0", "F32") if ue8m0 else ("F32", "F8_E8M0")

    def plain(
        self, name: str, dtype: str, shape: tuple[int, ...], component: str, block: str, shard: int
    ) -> TensorSpec:
        """Give a tensor without scale; unquantised folders may hold any float tensor as BF16 or F32."""
        dtypes: tuple[str, ...] = (dtype,)
        if self._dense == "float" and dtype != "I64":
            dtypes = (dtype, "F32" if dtype == "BF16" else "BF16")
        parameters = 0 if dtype == "I64" else math.prod(shape)
        return TensorSpec(name, dtypes, shape, component, block, shard, parameters)

    def matrix(
        self,
        name: str,
        out: int,
        inner: int,
        component: str,
        block: str,
        shard: int,
        encoding: Encoding | None = None,
    ) -> Iterator[TensorSpec]:
        """Give `name.weight` [out, inner] and, where it is quantised, `name.scale`."""
        encoding = encoding or self._dense
        if self.c.integers and self.c.integers.encoding(name) != "float":
            yield from self._integers(name, out, inner, component, block, shard, self.c.integers)
            return
        where = (component, block, shard)
        if encoding == "float":
            yield TensorSpec(f"{name}.weight", ("BF16", "F32"), (out, inner), *where, out * inner)
        elif encoding == "fp8":
            b0, b1 = self._tile
            yield TensorSpec(f"{name}.weight", ("F8_E4M3",), (out, inner), *where, out * inner, "fp8")
            yield TensorSpec(f"{name}.scale", self._scales, (-(-out // b0), -(-inner // b1)), *where, 0)
        else:
            if inner % FP4_BLOCK:
                raise ConfigError(
                    f"`{name}` has {inner} columns, expected a multiple of {FP4_BLOCK} for FP4",
                    hint="hidden_size and moe_intermediate_size must be multiples of 32 when expert_dtype is fp4",
                )
            yield TensorSpec(f"{name}.weight", ("I8",), (out, inner // 2), *where, out * inner, "fp4")
            yield TensorSpec(f"{name}.scale", ("F8_E8M0",), (out, inner // FP4_BLOCK), *where, 0)

    def _integers(
        self, name: str, out: int, inner: int, component: str, block: str, shard: int, layout: IntegerLayout
    ) -> Iterator[TensorSpec]:
        # packed int4 has a dtype of its own, so that a file says how it is read without its configuration
        encoding, where = layout.encoding(name), (component, block, shard)
        dtype, width = ("I8", inner) if encoding == "int8" else ("U8", inner // 2)
        group = layout.int4_group or 2
        if encoding == "int4" and inner % group:
            raise ConfigError(
                f"`{name}` has {inner} columns, expected a multiple of {group} for int4 of layout `{layout.name}`"
            )
        yield TensorSpec(f"{name}.weight", (dtype,), (out, width), *where, out * inner, encoding)
        yield TensorSpec(f"{name}.scale", ("F32",), (out, layout.scales(encoding, inner)), *where, 0)

    def layer(self, spec: LayerSpec, block: str, shard: int) -> Iterator[TensorSpec]:
        """Give one block: attention, stream mixing, norms, gate and experts."""
        c, p = self.c, spec.prefix
        d, width = c.hidden_size, c.hc_mult * c.hidden_size
        yield from self._attention(spec, block, shard)
        for sub in ("attn", "ffn"):
            yield self.plain(f"{p}{sub}_norm.weight", "BF16", (d,), "norms", block, shard)
            rows = (2 + c.hc_mult) * c.hc_mult
            for part, shape in (("fn", (rows, width)), ("base", (rows,)), ("scale", (3,))):
                yield self.plain(f"{p}hc_{sub}_{part}", "F32", shape, "stream mixing", block, shard)
        experts, inter = c.n_routed_experts, c.moe_intermediate_size
        yield self.plain(f"{p}ffn.gate.weight", "BF16", (experts, d), "router", block, shard)
        if spec.hash_routing:
            table = (c.vocab_size, c.num_experts_per_tok)
            yield self.plain(f"{p}ffn.gate.tid2eid", "I64", table, "router", block, shard)
        else:
            yield self.plain(f"{p}ffn.gate.bias", "F32", (experts,), "router", block, shard)
        shapes = (("w1", inter, d), ("w2", d, inter), ("w3", inter, d))
        for e in range(experts):
            for w, out, inner in shapes:
                name = f"{p}ffn.experts.{e}.{w}"
                yield from self.matrix(name, out, inner, "routed experts", block, shard, self._experts)
        for w, out, inner in shapes:
            yield from self.matrix(f"{p}ffn.shared_experts.{w}", out, inner, "shared expert", block, shard)

    def _attention(self, spec: LayerSpec, block: str, shard: int) -> Iterator[TensorSpec]:
        c, p, where = self.c, f"{spec.prefix}attn.", ("attention", block, shard)
        d, heads, q, groups = c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.o_groups * c.o_lora_rank
        yield from self.matrix(f"{p}wq_a", q, d, *where)
        yield self.plain(f"{p}q_norm.weight", "BF16", (q,), *where)
        yield from self.matrix(f"{p}wq_b", heads * c.head_dim, q, *where)
        yield from self.matrix(f"{p}wkv", c.head_dim, d, *where)
        yield self.plain(f"{p}kv_norm.weight", "BF16", (c.head_dim,), *where)
        yield self.plain(f"{p}attn_sink", "F32", (heads,), *where)
        yield from self.matrix(f"{p}wo_a", groups, heads * c.head_dim // c.o_groups, *where)
        yield from self.matrix(f"{p}wo_b", d, groups, *where)
        if spec.ratio:
            yield from self._compressor(f"{p}compressor.", spec, c.head_dim, "compressor", block, shard)
        if spec.kind == "csa":
            where = ("indexer", block, shard)
            yield from self.matrix(f"{p}indexer.wq_b", c.index_n_heads * c.index_head_dim, q, *where)
            yield self.plain(f"{p}indexer.weights_proj.weight", "BF16", (c.index_n_heads, d), *where)
            yield from self._compressor(f"{p}indexer.compressor.", spec, c.index_head_dim, *where)

    def _compressor(
        self, p: str, spec: LayerSpec, head_dim: int, component: str, block: str, shard: int
    ) -> Iterator[TensorSpec]:
        width = head_dim * (2 if spec.overlap else 1)
        where = (component, block, shard)
        yield self.plain(f"{p}ape", "F32", (spec.ratio, width), *where)
        yield self.plain(f"{p}wkv.weight", "BF16", (width, self.c.hidden_size), *where)
        yield self.plain(f"{p}wgate.weight", "BF16", (width, self.c.hidden_size), *where)
        yield self.plain(f"{p}norm.weight", "BF16", (head_dim,), *where)

    def collapse(self, p: str, block: str, shard: int) -> Iterator[TensorSpec]:
        """Give the final norm and the collapse of the streams in front of the output matrix."""
        c = self.c
        yield self.plain(f"{p}norm.weight", "BF16", (c.hidden_size,), "norms", block, shard)
        shapes = (("fn", (c.hc_mult, c.hc_mult * c.hidden_size)), ("base", (c.hc_mult,)), ("scale", (1,)))
        for part, shape in shapes:
            yield self.plain(f"{p}hc_head_{part}", "F32", shape, "stream mixing", block, shard)

    def mtp(self, block: str, shard: int) -> Iterator[TensorSpec]:
        """Give what the April MTP block has beside a layer."""
        d, p = self.c.hidden_size, f"{block}."
        for name in ("e_proj", "h_proj"):
            yield from self.matrix(f"{p}{name}", d, d, "draft input", block, shard)
        for name in ("enorm", "hnorm"):
            yield self.plain(f"{p}{name}.weight", "BF16", (d,), "norms", block, shard)
        yield from self.collapse(p, block, shard)

    def draft(self, stage: int, block: str, shard: int) -> Iterator[TensorSpec]:
        """Give what a DSpark stage has beside a layer; only the first and the last stage have anything."""
        c, p = self.c, f"{block}."
        if stage == 0:
            taps = len(c.dspark_target_layer_ids)
            yield self.plain(f"{p}main_norm.weight", "BF16", (c.hidden_size,), "norms", block, shard)
            yield from self.matrix(
                f"{p}main_proj", c.hidden_size, taps * c.hidden_size, "draft input", block, shard
            )
        if stage == c.num_mtp_blocks - 1:
            rank, where = c.dspark_markov_rank or 0, ("draft head", block, shard)
            yield from self.collapse(p, block, shard)
            for w in ("markov_w1", "markov_w2"):
                yield self.plain(f"{p}markov_head.{w}.weight", "BF16", (c.vocab_size, rank), *where)
            yield self.plain(f"{p}confidence_head.proj.weight", "BF16", (1, c.hidden_size + rank), *where)
