"""The V4 network, written once, in terms of ops. Knows names and order; knows no device and no storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from v4sdk import ops as o
from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.kv_cache import KVCache, LayerCache
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.op import REFERENCES, OpTable
from v4sdk.ops.precision import activation_dtype
from v4sdk.ops.rope import inv_freq
from v4sdk.weights import ExpertWeights, Weight, WeightSource

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class HyperWeights:
    """Mixing parameters of one sub-layer and the norm of its input."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(frozen=True)
class CompressorWeights:
    """Parameters of one compressor, of attention entries or of index keys."""

    wkv: Weight
    wgate: Weight
    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class IndexerWeights:
    """The lightning indexer of a CSA layer."""

    wq_b: Weight
    weights_proj: Weight
    compressor: CompressorWeights


@dataclass(frozen=True)
class AttentionWeights:
    """Projections, norms and sinks of one attention sub-layer."""

    wq_a: Weight
    q_norm: Tensor
    wq_b: Weight
    wkv: Weight
    kv_norm: Tensor
    sink: Tensor
    wo_a: Weight
    wo_b: Weight
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


@dataclass(frozen=True)
class MoEWeights:
    """Gate and experts of one sub-layer; `bias` for learned routing, `tid2eid` for hashed."""

    gate: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None
    experts: ExpertWeights
    shared: tuple[Weight, Weight, Weight]


@dataclass(frozen=True)
class Block:
    """One layer: its schedule entry and its weights."""

    spec: LayerSpec
    hc_attn: HyperWeights
    hc_ffn: HyperWeights
    attn: AttentionWeights
    ffn: MoEWeights


@dataclass(frozen=True)
class HeadWeights:
    """Stream collapse and final norm in front of the shared output matrix."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(frozen=True)
class MTPWeights:
    """Input side of the April MTP block."""

    e_proj: Weight
    h_proj: Weight
    enorm: Tensor
    hnorm: Tensor
    block: Block
    head: HeadWeights


class Binder:
    """Turns named tensors into blocks. `prepare` may replace a weight once, at load (packing, moving, widening)."""

    def __init__(
        self, config: ModelConfig, source: WeightSource,
        prepare: Callable[[str, Weight], Weight] = lambda role, weight: weight,
        prepare_experts: Callable[[str, ExpertWeights], ExpertWeights] = lambda role, experts: experts,
        place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:  # fmt: skip
        self.config, self._source = config, source
        self._prepare, self._prepare_experts, self._place = prepare, prepare_experts, place

    def tensor(self, name: str) -> Tensor:
        """A plain tensor on the device."""
        return self._place(self._source.tensor(name))

    def weight(self, name: str) -> Weight:
        """A prepared matrix."""
        return self._prepare(name, self._source.weight(name))

    def block(self, spec: LayerSpec) -> Block:
        """All weights of one layer."""
        p = spec.prefix
        return Block(
            spec, self._hyper(p, "attn"), self._hyper(p, "ffn"), self._attention(spec), self._moe(spec)
        )

    def head(self, prefix: str = "") -> HeadWeights:
        """Collapse and norm at `prefix` (empty for the backbone, `mtp.0.` for the MTP block)."""
        fn, base, scale = (self.tensor(f"{prefix}hc_head_{part}") for part in ("fn", "base", "scale"))
        return HeadWeights(fn, base, scale, self.tensor(f"{prefix}norm.weight"))

    def mtp(self, spec: LayerSpec) -> MTPWeights:
        """The April MTP block."""
        p = spec.prefix
        return MTPWeights(
            self.weight(f"{p}e_proj"), self.weight(f"{p}h_proj"), self.tensor(f"{p}enorm.weight"),
            self.tensor(f"{p}hnorm.weight"), self.block(spec), self.head(p),
        )  # fmt: skip

    def _hyper(self, prefix: str, which: str) -> HyperWeights:
        fn, base, scale = (self.tensor(f"{prefix}hc_{which}_{part}") for part in ("fn", "base", "scale"))
        return HyperWeights(fn, base, scale, self.tensor(f"{prefix}{which}_norm.weight"))

    def _compressor(self, prefix: str) -> CompressorWeights:
        return CompressorWeights(
            self.weight(f"{prefix}wkv"), self.weight(f"{prefix}wgate"), self.tensor(f"{prefix}ape"),
            self.tensor(f"{prefix}norm.weight"),
        )  # fmt: skip

    def _attention(self, spec: LayerSpec) -> AttentionWeights:
        p = f"{spec.prefix}attn."
        indexer = None
        if spec.kind == "csa":
            at = f"{p}indexer."
            indexer = IndexerWeights(
                self.weight(f"{at}wq_b"),
                self.weight(f"{at}weights_proj"),
                self._compressor(f"{at}compressor."),
            )
        return AttentionWeights(
            self.weight(f"{p}wq_a"), self.tensor(f"{p}q_norm.weight"), self.weight(f"{p}wq_b"), self.weight(f"{p}wkv"),
            self.tensor(f"{p}kv_norm.weight"), self.tensor(f"{p}attn_sink"), self.weight(f"{p}wo_a"),
            self.weight(f"{p}wo_b"), self._compressor(f"{p}compressor.") if spec.ratio else None, indexer,
        )  # fmt: skip

    def _moe(self, spec: LayerSpec) -> MoEWeights:
        p = f"{spec.prefix}ffn"
        bias = None if spec.hash_routing else self.tensor(f"{p}.gate.bias")
        table = self.tensor(f"{p}.gate.tid2eid") if spec.hash_routing else None
        shared = (self.weight(f"{p}.shared_experts.{w}") for w in ("w1", "w2", "w3"))
        w1, w2, w3 = shared
        experts = self._prepare_experts(f"{p}.experts", self._source.experts(p, self.config.n_routed_experts))
        return MoEWeights(self.tensor(f"{p}.gate.weight"), bias, table, experts, (w1, w2, w3))


class V4Model:
    """The backbone, its head, and the April MTP block where the checkpoint has one.

    Args:
        binder: where weights come from. numerics: which roundings run. ops: functions by op; references by default.
        with_mtp: also bind `mtp.0`.
    """

    def __init__(
        self, binder: Binder, numerics: Numerics, ops: OpTable = REFERENCES, with_mtp: bool = False
    ) -> None:
        config = binder.config
        self.config, self.numerics, self.ops = config, numerics, ops
        self.embedding = binder.tensor("embed.weight")
        self.blocks = [binder.block(spec) for spec in config.layers]
        self.head_weights = binder.head()
        self.output = binder.weight("head")
        self.mtp = binder.mtp(config.mtp_layers[0]) if with_mtp and config.mtp_layers else None
        self._inv = {
            spec.rope: inv_freq(spec.rope, config.qk_rope_head_dim, self.embedding.device)
            for spec in (*config.layers, *config.mtp_layers)
        }

    def forward(
        self,
        batch: Batch,
        cache: KVCache,
        observe: Observer | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run the backbone over one packed step and advance the caches.

        Shapes:
            -> streams after the last layer [T, M, N] in the activation dtype
        """
        x = self.ops[o.embed](batch.token_ids, self.embedding, self.config.hc_mult, self.numerics)
        return self.run_blocks(self.blocks, x, batch, cache.layers, observe, on_layer)

    def logits(self, streams: Tensor, head: HeadWeights | None = None) -> Tensor:
        """Collapse streams and score the vocabulary: [T, M, N] -> [T, V] float32."""
        h, c = head or self.head_weights, self.config
        collapsed = self.ops[o.hc_head](streams, h.fn, h.base, h.scale, c.rms_norm_eps, c.hc_eps)
        normed = self.ops[o.rms_norm](collapsed, h.norm, c.rms_norm_eps, collapsed.dtype)
        return self.ops[o.logits](normed, self.output)

    def mtp_forward(self, streams: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Predict one token further from the backbone's streams and the *next* token ids (April MTP block).

        Shapes:
            streams [T, M, N] before the head collapse; batch.token_ids [T] the next ids -> logits [T, V] float32
        Source:
            official model.py, MTPBlock
        """
        if self.mtp is None:
            raise ValueError("this model was bound without its MTP block")
        m, c, n = self.mtp, self.config, self.numerics
        act = activation_dtype(n)
        e = self.ops[o.embed](batch.token_ids, self.embedding, 1, n)[:, 0]
        e = self.ops[o.linear](self.ops[o.rms_norm](e, m.enorm, c.rms_norm_eps, act), m.e_proj, n, act)
        hx = self.ops[o.rms_norm](streams, m.hnorm, c.rms_norm_eps, act)
        h = self.ops[o.linear](hx.flatten(0, 1), m.h_proj, n, act).view_as(streams)
        x = self.run_blocks([m.block], e[:, None] + h, batch, [cache])
        return self.logits(x, m.head)

    def run_blocks(
        self, blocks: list[Block], x: Tensor, batch: Batch, caches: list[LayerCache], observe: Observer | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run consecutive blocks on streams [T, M, N]; `observe(name, tensor)` sees intermediate values."""
        ops, c = self.ops, self.config
        tables = {spec: ops[o.rope_table](batch.positions, inv) for spec, inv in self._inv.items()}
        hyper = blocks[0].hc_attn
        settings = (c.hc_sinkhorn_iters, c.rms_norm_eps, c.hc_eps)
        u, post, comb = ops[o.hc_pre](x, hyper.fn, hyper.base, hyper.scale, *settings)
        u = ops[o.rms_norm](u, hyper.norm, c.rms_norm_eps, u.dtype)
        for at, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            if on_layer:
                on_layer(block.spec.index)
            i, hyper = block.spec.index, block.hc_ffn
            y = self._attention(block, u, batch, cache, tables[block.spec.rope], observe)
            x, u, post, comb = ops[o.hc_post_pre](
                y, x, post, comb, hyper.fn, hyper.base, hyper.scale, hyper.norm, *settings
            )
            if observe:
                observe(f"attn_out_{i}", y)
            y = self._moe(block, u, batch, observe)
            if at + 1 < len(blocks):
                hyper = blocks[at + 1].hc_attn
                x, u, post, comb = ops[o.hc_post_pre](
                    y, x, post, comb, hyper.fn, hyper.base, hyper.scale, hyper.norm, *settings
                )
            else:
                x = ops[o.hc_post](y, x, post, comb)
            if observe:
                observe(f"ffn_out_{i}", y)
                observe(f"streams_after_layer_{i}", x)
        return x

    def _attention(
        self,
        block: Block,
        u: Tensor,
        batch: Batch,
        cache: LayerCache,
        table: Tensor,
        observe: Observer | None,
    ) -> Tensor:
        ops, c, n, w, spec = self.ops, self.config, self.numerics, block.attn, block.spec
        eps = c.rms_norm_eps
        q, qr = ops[o.q_project](u, w.wq_a, w.q_norm, w.wq_b, table, c.num_attention_heads, eps, n)
        kv = ops[o.kv_project_store](u, w.wkv, w.kv_norm, table, batch, cache.window, eps, n)
        picks = None
        if w.compressor is not None and cache.entries is not None and cache.state is not None:
            k = w.compressor
            ops[o.compress](u, k.wkv, k.wgate, k.ape, k.norm, self._inv[spec.rope], batch, cache.state, cache.entries,
                            spec.ratio, False, eps, n)  # fmt: skip
        if w.indexer is not None and cache.index_keys is not None and cache.index_state is not None:
            k = w.indexer.compressor
            ops[o.compress](u, k.wkv, k.wgate, k.ape, k.norm, self._inv[spec.rope], batch, cache.index_state,
                            cache.index_keys, spec.ratio, True, eps, n)  # fmt: skip
            qi, head_weights = ops[o.index_query](
                u, qr, w.indexer.wq_b, w.indexer.weights_proj, table, c.index_n_heads, n
            )
            picks = ops[o.index_topk](qi, head_weights, cache.index_keys, batch, c.index_topk, spec.ratio, n)
            if observe:
                observe(f"index_topk_{spec.index}", picks)
        out = ops[o.sparse_attn](
            q, kv, cache.window, cache.entries, picks, batch, w.sink, spec.ratio, c.qk_rope_head_dim, n
        )
        return ops[o.grouped_out](out, w.wo_a, w.wo_b, table, c.o_groups, n)

    def _moe(self, block: Block, u: Tensor, batch: Batch, observe: Observer | None) -> Tensor:
        ops, c, w = self.ops, self.config, block.ffn
        if w.tid2eid is not None:
            ids, weights = ops[o.route_hash](u, w.gate, w.tid2eid, batch.token_ids, c.routed_scaling_factor)
        elif w.bias is not None:
            ids, weights = ops[o.route](u, w.gate, w.bias, c.num_experts_per_tok, c.routed_scaling_factor)
        else:
            raise ValueError(f"layer {block.spec.index} has neither a routing bias nor a hash table")
        if observe:
            observe(f"route_ids_{block.spec.index}", ids)
            observe(f"route_weights_{block.spec.index}", weights)
        routed = ops[o.routed_experts](u, ids, weights, w.experts, c.swiglu_limit, self.numerics)
        return ops[o.shared_expert](u, routed, *w.shared, c.swiglu_limit, self.numerics)
