"""The released shapes as configurations: what `config.json` of each model says, for planning and tests without the file."""

from __future__ import annotations

from dataclasses import replace

from v4sdk.config import ModelConfig, QuantizationConfig

V4_FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    compress_rope_theta=160000.0,
    rope_theta=10000.0,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    max_position_embeddings=1048576,
    rope_factor=16.0,
    rope_original_context=65536,
    num_nextn_predict_layers=1,
    expert_dtype="fp4",
    quantization=QuantizationConfig(),
)
V4_PRO = replace(
    V4_FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)
V4_FLASH_0731 = replace(
    V4_FLASH,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0, 0, 0),
    dspark_block_size=5,
    dspark_markov_rank=256,
    dspark_target_layer_ids=(40, 41, 42),
)
# predicted by analogy with 0731; its header set has not been seen
V4_PRO_0813 = replace(
    V4_PRO,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0, 0, 0),
    dspark_block_size=5,
    dspark_markov_rank=256,
    dspark_target_layer_ids=(58, 59, 60),
)
PRESETS = {
    "v4-flash": V4_FLASH,
    "v4-pro": V4_PRO,
    "v4-flash-0731": V4_FLASH_0731,
    "v4-pro-0813": V4_PRO_0813,
}


def shrunk(config: ModelConfig, compress_ratios: tuple[int, ...], **changes: int | float) -> ModelConfig:
    """Give `config` with other layers: one per entry of `compress_ratios`, without MTP blocks.

    Hash routing keeps at most the first layers that remain; `changes` replaces further fields.
    """
    layers = len(compress_ratios)
    hashed = min(config.num_hash_layers, layers)
    fewer = replace(
        config,
        num_hidden_layers=layers,
        compress_ratios=compress_ratios,
        num_hash_layers=hashed,
        num_nextn_predict_layers=0,
        dspark_block_size=None,
        dspark_markov_rank=None,
        dspark_target_layer_ids=(),
    )
    return replace(fewer, **changes)  # type: ignore[arg-type]
