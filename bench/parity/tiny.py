"""Freshly drawn tiny models of every layer kind, loud enough that a wrong state or a wrong table shows in the logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import Numerics
from v4sdk.tensors import expected_tensors
from v4sdk.weights import WeightSource

# one layer of each kind, hash routing in the first two, a window of the released length, an indexer that must choose
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=24,
    sliding_window=128,
    compress_ratios=(0, 4, 128, 4),
    compress_rope_theta=160000.0,
    rope_theta=10000.0,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=2,
    routed_scaling_factor=1.5,
    swiglu_limit=1.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    rope_factor=16.0,
    rope_original_context=64,
)
VARIANTS = {
    "every layer kind": TINY,
    # as in V4-Pro: no sliding-only layer, so hash routing meets both compressors
    "pro order": replace(
        TINY, compress_ratios=(128, 128, 4, 128), num_hash_layers=3, routed_scaling_factor=2.5
    ),
    "short window": replace(TINY, sliding_window=16, compress_ratios=(0, 0, 4, 128), num_hash_layers=1),
    "two streams, learned routing": replace(
        TINY, hc_mult=2, num_hash_layers=0, swiglu_limit=10.0, o_groups=1
    ),
}


def draw(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Draw every tensor of an unquantised checkpoint in float32; tables of expert ids without repeats."""
    random = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...], is_table: bool) -> Tensor:
        if is_table:
            scores = torch.rand(shape[0], config.n_routed_experts, generator=random)
            return scores.argsort(-1)[:, : shape[1]].contiguous()
        x = torch.randn(shape, generator=random)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * x
        if name.endswith("gate.bias"):
            return 0.2 * x
        if name == "embed.weight" or len(shape) == 1:
            return x
        # unit gain, a little more for gates and scores so that choices are far from ties
        gain: float = (1.5 if "gate" in name or "hc_" in name else 1.0) * shape[-1] ** -0.5
        return x * gain

    return {s.name: one(s.name, s.shape, s.dtypes[0] == "I64") for s in expected_tensors(config)}


def tiny_model(config: ModelConfig, seed: int, numerics: Numerics) -> V4Model:
    """A freshly drawn model on the references."""
    return V4Model(Binder(config, WeightSource(draw(config, seed))), numerics)
