"""The content of a checkpoint's `config.json`, from a ModelConfig."""

from __future__ import annotations

from typing import Any

from v4sdk.config import ARCHITECTURE, ModelConfig

_COPIED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_groups "
    "o_lora_rank sliding_window compress_rope_theta rope_theta index_n_heads index_head_dim index_topk "
    "n_routed_experts num_experts_per_tok moe_intermediate_size num_hash_layers routed_scaling_factor swiglu_limit "
    "hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps max_position_embeddings num_nextn_predict_layers bos_token_id "
    "eos_token_id"
).split()
_CONSTANT_FIELDS: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def config_dict(config: ModelConfig, num_mtp: int | None = None) -> dict[str, Any]:
    """Give the content of `config.json`, with the fields that are constant in the V4 family.

    Args:
        num_mtp: MTP blocks the folder really holds; the configured number by default.
    """
    raw: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "deepseek_v4", **_CONSTANT_FIELDS}
    for name in _COPIED_FIELDS:
        raw[name] = getattr(config, name)
    raw["compress_ratios"] = list(config.compress_ratios)
    raw["rope_scaling"] = None
    if config.rope_original_context:
        raw["rope_scaling"] = {
            "type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_context,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
        }
    if config.is_dspark:
        raw["dspark_block_size"] = config.dspark_block_size
        raw["dspark_markov_rank"] = config.dspark_markov_rank
        raw["dspark_target_layer_ids"] = list(config.dspark_target_layer_ids)
    elif num_mtp is not None:
        raw["num_nextn_predict_layers"] = num_mtp
    if config.expert_dtype:
        raw["expert_dtype"] = config.expert_dtype
    if config.integers:
        raw["quantization_config"] = config.integers.raw()
    if config.quantization:
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": config.quantization.scale_fmt,
            "weight_block_size": list(config.quantization.block),
        }
    return raw
