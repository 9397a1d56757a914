"""`info` tells the published numbers from headers or a bare configuration, and what a folder lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from v4sdk.config import ModelConfig
from v4sdk.config_file import config_dict
from v4sdk.convert import unquantised, write_checkpoint
from v4sdk.errors import CheckpointError, ConfigError
from v4sdk.info import describe
from v4sdk.presets import PRESETS, V4_FLASH, shrunk
from v4sdk.tensors import expected_tensors

TINY = shrunk(
    V4_FLASH, (0, 4, 8), vocab_size=24, hidden_size=64, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=48, o_groups=2, o_lora_rank=40, sliding_window=8, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=96, num_hash_layers=1, hc_mult=2,
    num_nextn_predict_layers=1,
)  # fmt: skip
# preset, total and active parameters, payload bytes, tensors, gigabytes of native KV at 1M
PUBLISHED = [
    ("v4-flash", "284.33B total, 13.27B active", "159,609,485,896 in 69,187 tensors, 46 shards", "3.70 GB at 1M"),
    ("v4-pro", "1,573.0B total, 48.85B active", "864,704,792,696 in 145,116 tensors, 64 shards", "5.30 GB at 1M"),
    ("v4-flash-0731", "284.33B total, 13.27B active", "166,878,536,440 in 72,317 tensors, 48 shards", "3.70 GB at 1M"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "parameters", "total", "kv"), PUBLISHED)
def test_a_bare_configuration_gives_the_published_numbers(
    tmp_path: Path, preset: str, parameters: str, total: str, kv: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict(PRESETS[preset])))
    text = "\n".join(describe(path).render())
    assert parameters in text
    assert total in text
    assert kv in text
    assert "from the configuration" in text


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("DeepSeek-V4-Flash.config.json", 0),
        ("DeepSeek-V4-Pro.config.json", 1),
        ("DeepSeek-V4-Flash-0731.config.reconstructed.json", 2),
    ],
)
def test_the_official_files_give_the_same(shared: Path, file: str, row: int) -> None:
    text = "\n".join(describe(shared / "data" / "configs" / file).render())
    assert all(words in text for words in PUBLISHED[row][1:])


def test_bytes_per_token_and_kinds_of_flash(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict(V4_FLASH)))
    info = describe(path)
    assert info.kv["native"].growing_bytes_per_token == 3514.25
    assert info.kv["bf16"].growing_bytes_per_token == 6880
    assert round(info.kv["native"].at[8192] / 1e6) == 44
    assert round(info.kv["native"].at[131072] / 1e6) == 476
    assert info.layer_kinds == {"swa": 2, "csa": 21, "hca": 20, "hash": 3}
    assert sum(info.component_bytes.values()) == info.payload_bytes
    assert info.component_bytes["draft block mtp.0"] == 3_593_787_756
    assert info.unused == ("mtp.0 (multi-token prediction, announced by config.json, not run)",)
    assert json.loads(json.dumps(info.to_json()))["parameters"] == info.parameters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    model = {
        s.name: torch.zeros(s.shape, dtype=torch.int64)
        if s.dtypes[0] == "I64"
        else torch.randn(s.shape, generator=g)
        for s in expected_tensors(unquantised(TINY))
    }
    write_checkpoint(tmp_path / "tiny", TINY, model)
    return tmp_path / "tiny"


def test_a_folder_is_described_by_its_headers(folder: Path) -> None:
    info = describe(folder)
    assert (info.name, info.source, info.shards) == ("tiny", "headers", 6)
    assert info.payload_bytes == sum(s.nbytes for s in expected_tensors(TINY))
    assert info.encodings == {"projections": "FP8 E4M3", "routed experts": "FP4 E2M1", "scales": "UE8M0"}
    assert info.unused == ("mtp.0 (multi-token prediction, not run)",)
    assert [line.split(" ")[0] for line in info.missing] == [
        "prompt",
        "tokenizer.json",
        "generation_config.json",
    ]
    assert info.dialect is None


def test_companion_files_are_found(folder: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "v4sdk.json").write_text('{"dialect": "v4-april"}')
    info = describe(folder)
    assert info.missing == ()
    assert info.dialect is not None
    assert info.dialect.startswith("v4-april")
    (folder / "v4sdk.json").write_text('{"dialect": "v4-may"}')
    assert describe(folder).missing[0].startswith("prompt dialect (unknown prompt dialect `v4-may`")


def test_a_folder_without_shards_is_described_by_its_configuration(folder: Path) -> None:
    want = describe(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    info = describe(folder)
    assert info.source == "configuration"
    assert info.missing[0].startswith("prompt dialect")
    assert any(line.startswith("weights") for line in info.missing)
    assert (info.payload_bytes, info.tensors, info.shards) == (want.payload_bytes, want.tensors, want.shards)


def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00006.safetensors` is missing"):
        describe(folder)
    with pytest.raises(ConfigError, match="does not exist"):
        describe(tmp_path / "nowhere")


def test_v41_is_recognised_and_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["DeepseekV41ForCausalLM"]}')
    with pytest.raises(ConfigError, match=r"V4\.1.*recognised"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_size", float("inf"), "`hidden_size` is inf, expected a finite int"),
        ("hidden_size", 4096.0, "`hidden_size` is 4096.0, expected a finite int"),
        ("rms_norm_eps", float("nan"), "`rms_norm_eps` is nan, expected a finite float"),
        ("compress_ratios", 4, "`compress_ratios` is 4, expected a JSON array"),
        ("architectures", 5, "`architectures` is 5, expected a JSON array"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "beta_fast": 0}, "`rope_beta_fast` is 0"),
        ("compress_rope_theta", 1.0, "`compress_rope_theta` is 1.0, expected more than 1"),
        ("rope_scaling", "yarn", "`rope_scaling` is 'yarn', expected a JSON object"),
        ("quantization_config", [1], "expected a JSON object"),
    ],
)
def test_values_of_another_kind_are_named(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(config_dict(TINY) | {name: value})
    assert words in caught.value.message
