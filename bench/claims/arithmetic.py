"""What V4 and V3.2 must compute and keep per token, from their configurations alone.

V4's numbers come from the cost functions of the ops themselves, its parameters from the tensor list that checkpoints are
validated with: nothing is counted a second time here. V3.2 is counted from its published configuration.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.config_file import config_dict
from v4sdk.info import ModelInfo, describe, kv_info
from v4sdk.numerics import FAST, KVFormat, index_row_bytes, kv_row_bytes
from v4sdk.ops import cost
from v4sdk.ops.batch import Batch, make_batch
from v4sdk.ops.op import Cost
from v4sdk.weights import ExpertWeights, Weight

# what "1M" may mean: the round number of the statements, and the context limit of the configurations
MILLION, CONTEXT = 1_000_000, 1_048_576
_PAGE_TOKENS = 1024
_META = torch.device("meta")


@dataclass(frozen=True)
class V32Config:
    """DeepSeek-V3.2 as its `config_671B_v3.2.json` states it; the baseline of V4's claims.

    Attributes:
        dense_layers: first layers, with one wide FFN in place of experts.
    """

    vocab_size: int = 129_280
    hidden_size: int = 7168
    layers: int = 61
    dense_layers: int = 3
    dense_intermediate: int = 18_432
    moe_intermediate: int = 2048
    routed_experts: int = 256
    active_experts: int = 8
    shared_experts: int = 1
    heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048


V32 = V32Config()


@dataclass(frozen=True)
class Work:
    """FLOPs of one decoded token, 2 per multiply-add, by part; each part with the precision it runs in.

    Attributes:
        linear: products with weights, FP8 (FP4 weights have FP8's rate on released hardware). attention: scores and values,
            BF16. indexer: its scores, in `index_precision`.
    """

    linear: float
    attention: float
    indexer: float
    index_precision: str

    def total(self, weights: Mapping[str, float]) -> float:
        """FLOPs with every precision weighted, e.g. by how much slower than FP8 it runs."""
        return (
            weights["fp8"] * self.linear
            + weights["bf16"] * self.attention
            + weights[self.index_precision] * self.indexer
        )


# How operations of different precision are added up. The report counts "equivalent FP8 FLOPs" and does not say how; the first is
# what tensor cores do: BF16 takes twice the time of FP8, FP4 half.
FP8_EQUIVALENT = "FP8-equivalent: BF16 x2, FP4 x0.5"
CONVENTIONS: Mapping[str, Mapping[str, float]] = {
    FP8_EQUIVALENT: {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5},
    "BF16 x2, FP4 x1": {"bf16": 2.0, "fp8": 1.0, "fp4": 1.0},
    "BF16 x1, FP4 x0.5": {"bf16": 1.0, "fp8": 1.0, "fp4": 0.5},
    "every operation x1": {"bf16": 1.0, "fp8": 1.0, "fp4": 1.0},
}


@cache
def model_info(config: ModelConfig) -> ModelInfo:
    """What `v4sdk info` says of a configuration: parameters and bytes, from the tensor list of its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config_dict(config)), encoding="utf-8")
        return describe(path)


def v4_work(config: ModelConfig, num_tokens: int) -> Work:
    """FLOPs of decoding one token of V4 at a context of `num_tokens`, its own row included."""
    attention = sum(attention_cost(config, layer, num_tokens).flops for layer in config.layers)
    csa = [layer for layer in config.layers if layer.kind == "csa"]
    indexer = sum(indexer_cost(config, layer, num_tokens).flops for layer in csa)
    return Work(2.0 * model_info(config).active_parameters, attention, indexer, "fp4")


def v4_read_bytes(config: ModelConfig, num_tokens: int) -> tuple[int, int]:
    """(weight bytes, cache bytes) that decoding one token reads: active weights, window rows, picked entries, index keys."""
    info = model_info(config)
    parts = {k: v for k, v in info.component_bytes.items() if not k.startswith("draft")}
    experts = parts.pop("routed experts")
    weights = sum(v for k, v in parts.items() if k != "embedding")
    weights += experts * config.num_experts_per_tok // config.n_routed_experts
    rows = 0
    for layer in config.layers:
        # what attention reads, without the queries
        queries = config.num_attention_heads * config.head_dim * 2
        rows += attention_cost(config, layer, num_tokens).read_bytes - queries
        if layer.kind == "csa":
            index = config.index_n_heads * (config.index_head_dim * 2 + 4)
            rows += indexer_cost(config, layer, num_tokens).read_bytes - index
    return weights, rows


def attention_cost(config: ModelConfig, layer: LayerSpec, num_tokens: int) -> Cost:
    """Cost of the `sparse_attn` call of one decode step, by the op's own cost function."""
    row = kv_row_bytes(config.head_dim, config.qk_rope_head_dim, "native")
    q = _meta((1, config.num_attention_heads, config.head_dim), torch.bfloat16)
    window = _meta((2, config.sliding_window, row), torch.uint8)
    entries = picks = None
    if layer.ratio:
        entries = _meta((1, _PAGE_TOKENS // layer.ratio, row), torch.uint8)
    if layer.kind == "csa":
        visible = num_tokens // layer.ratio
        picks = torch.arange(config.index_topk, dtype=torch.int32)[None]
        picks = torch.where(picks < visible, picks, -1)
    return cost.sparse_attn(
        q, q[:, 0], window, entries, picks, _step(num_tokens), _meta((q.shape[1],), torch.float32), layer.ratio,
        config.qk_rope_head_dim, FAST,
    )  # fmt: skip


def indexer_cost(config: ModelConfig, layer: LayerSpec, num_tokens: int) -> Cost:
    """Cost of the `index_topk` call of one decode step."""
    q = _meta((1, config.index_n_heads, config.index_head_dim), torch.bfloat16)
    w = _meta((1, config.index_n_heads), torch.float32)
    row = index_row_bytes(config.index_head_dim, "native")
    keys = _meta((1, _PAGE_TOKENS // layer.ratio, row), torch.uint8)
    return cost.index_topk(q, w, keys, _step(num_tokens), config.index_topk, layer.ratio, FAST)


def v32_active_parameters(c: V32Config = V32) -> int:
    """Weights one token of V3.2 is multiplied with, indexer and output matrix included, embedding table left out."""
    d, qk = c.hidden_size, c.qk_nope_head_dim + c.qk_rope_head_dim
    attention = d * c.q_lora_rank + c.q_lora_rank * c.heads * qk + d * (c.kv_lora_rank + c.qk_rope_head_dim)
    # absorbed into queries and outputs while decoding: the same number of multiply-adds
    attention += c.kv_lora_rank * c.heads * (c.qk_nope_head_dim + c.v_head_dim) + c.heads * c.v_head_dim * d
    indexer = c.q_lora_rank * c.index_heads * c.index_head_dim + d * (c.index_head_dim + c.index_heads)
    experts = 3 * d * c.moe_intermediate * (c.active_experts + c.shared_experts) + c.routed_experts * d
    dense = c.dense_layers * 3 * d * c.dense_intermediate
    return c.layers * (attention + indexer) + dense + (c.layers - c.dense_layers) * experts + c.vocab_size * d


def v32_work(num_tokens: int, c: V32Config = V32) -> Work:
    """FLOPs of decoding one token of V3.2: sparse attention over the picked latents, indexer over every token."""
    picked = min(c.index_topk, num_tokens)
    # a score over latent and rotary part, a value over the latent
    attention = c.layers * picked * c.heads * 2 * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    # as V4's: the dot product of every head, and its weight
    indexer = c.layers * num_tokens * c.index_heads * 2 * (c.index_head_dim + 1)
    return Work(2.0 * v32_active_parameters(c), attention, indexer, "fp8")


def flops_share(config: ModelConfig, num_tokens: int, convention: str = FP8_EQUIVALENT) -> float:
    """V4's FLOPs of one decoded token as a share of V3.2's."""
    weights = CONVENTIONS[convention]
    return v4_work(config, num_tokens).total(weights) / v32_work(num_tokens).total(weights)


def v32_kv_bytes_per_token(fmt: KVFormat = "native", c: V32Config = V32) -> int:
    """Bytes of cache per token of V3.2, all layers.

    `native`: FP8 latent with four float32 scales and a BF16 rotary part (656), FP8 index key with a float32 scale (132).
    """
    width = c.kv_lora_rank + c.qk_rope_head_dim + c.index_head_dim
    if fmt != "native":
        return c.layers * width * (4 if fmt == "float32" else 2)
    latent = c.kv_lora_rank + c.kv_lora_rank // 128 * 4 + 2 * c.qk_rope_head_dim
    return c.layers * (latent + c.index_head_dim + 4)


def kv_growth(config: ModelConfig, fmt: KVFormat = "native") -> float:
    """Bytes of cache per token of V4, averaged over compressed blocks; windows and open blocks do not grow."""
    return kv_info(config, fmt).growing_bytes_per_token


def kv_growth_fp8_index(config: ModelConfig) -> float:
    """The same with index keys in FP8 and one float32 scale, as some engines store them."""
    csa = [layer for layer in config.layers if layer.kind == "csa"]
    wider = config.index_head_dim + 4 - index_row_bytes(config.index_head_dim, "native")
    return kv_growth(config) + sum(wider / layer.ratio for layer in csa)


def gqa_bytes_per_token(config: ModelConfig, kv_heads: int = 8, head_dim: int = 128) -> int:
    """Bytes of cache per token of grouped-query attention in BF16 with as many layers: keys and values."""
    return config.num_hidden_layers * 2 * kv_heads * head_dim * 2


def window_bytes(config: ModelConfig) -> int:
    """Bytes of the native window rows of one sequence, all layers."""
    row = kv_row_bytes(config.head_dim, config.qk_rope_head_dim, "native")
    return config.num_hidden_layers * config.sliding_window * row


def window_share(config: ModelConfig) -> float:
    """Window rows of every token, if all were kept, over the compressed entries (without index keys)."""
    entries = sum(1 / layer.ratio for layer in config.layers if layer.ratio)
    return config.num_hidden_layers / entries


def flops_per_exchanged_byte(config: ModelConfig) -> float:
    """FLOPs of one (token, expert) pair over the bytes it sends: the hidden row in FP8 out, in BF16 back."""
    d, inter = config.hidden_size, config.moe_intermediate_size
    w1, w2 = Weight(_meta((inter, d), torch.bfloat16)), Weight(_meta((d, inter), torch.bfloat16))
    one = torch.zeros(1, 1, dtype=torch.int32)
    experts = ExpertWeights((w1,), (w2,), (w1,))
    spent = cost.routed_experts(
        _meta((1, d), torch.bfloat16), one, one.float(), experts, config.swiglu_limit, FAST
    )
    return spent.flops / (3 * d)


def _step(num_tokens: int) -> Batch:
    # only positions and bounds are read by the cost functions
    position = torch.tensor([num_tokens - 1], dtype=torch.int32)
    bounds, slot = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return make_batch(torch.zeros(1, dtype=torch.long), position, bounds, slot, slot[:, None], _PAGE_TOKENS)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)
