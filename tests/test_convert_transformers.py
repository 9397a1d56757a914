"""A folder we write loads in an independent implementation, name for name and bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.tensors import expected_tensors

# sizes are whole tiles or less than one: the other reader derives tiles from the scale grid
SMALL = shrunk(
    V4_FLASH, (0, 4, 128, 4), vocab_size=64, hidden_size=256, num_attention_heads=4, head_dim=64, qk_rope_head_dim=32,
    q_lora_rank=128, o_groups=2, o_lora_rank=64, index_n_heads=4, index_head_dim=64, index_topk=16, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, rope_original_context=64,
)  # fmt: skip


def draw(config: ModelConfig) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        s.name: torch.randint(config.n_routed_experts, s.shape, generator=g)
        if s.dtypes[0] == "I64"
        else torch.randn(s.shape, generator=g) * 0.1
        for s in expected_tensors(unquantised(config))
    }


def test_released_folder_loads_in_transformers_bit_for_bit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers loads FP8 folders through accelerate")
    write_checkpoint(tmp_path, SMALL, draw(SMALL))
    quantised = transformers.FineGrainedFP8Config(dequantize=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    state: dict[str, Any] = model.state_dict()
    with Checkpoint(tmp_path) as checkpoint:
        ours = FloatTensors(SMALL, checkpoint)
        pairs = {
            "embed.weight": "model.embed_tokens.weight",
            "head.weight": "lm_head.weight",
            "layers.1.attn.wq_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
            "layers.1.attn.wo_b.weight": "model.layers.1.self_attn.o_b_proj.weight",
            "layers.2.ffn.shared_experts.w2.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
        }
        for name, other in pairs.items():
            assert torch.equal(ours[name].float(), state[other].float()), name
        for e in range(SMALL.n_routed_experts):
            p = f"layers.3.ffn.experts.{e}"
            both = torch.cat((ours[f"{p}.w1.weight"], ours[f"{p}.w3.weight"])).float()
            assert torch.equal(both, state["model.layers.3.mlp.experts.gate_up_proj"][e].float())
            down = state["model.layers.3.mlp.experts.down_proj"][e].float()
            assert torch.equal(ours[f"{p}.w2.weight"].float(), down)
