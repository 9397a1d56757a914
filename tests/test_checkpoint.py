"""Opening a checkpoint: nothing is copied, and every way a folder can be wrong is named before the first tensor."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig, QuantizationConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.errors import CheckpointError, ConfigError
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.tensors import expected_tensors
from v4sdk.weights import WeightSource

TINY = shrunk(
    V4_FLASH, (0, 4, 8), vocab_size=24, hidden_size=64, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=48, o_groups=2, o_lora_rank=40, sliding_window=8, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=96, num_hash_layers=1, hc_mult=2,
    max_position_embeddings=1024, rope_original_context=64, num_nextn_predict_layers=1,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
SHARD = "model-00003-of-00006.safetensors"


def draw(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randint(config.n_routed_experts, spec.shape, generator=g)
        if spec.dtypes[0] == "I64"
        else torch.randn(spec.shape, generator=g) * 0.1
        for spec in expected_tensors(unquantised(config))
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in the released layout, written once."""
    folder = tmp_path_factory.mktemp("pristine")
    write_checkpoint(folder, TINY, draw(TINY))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_every_tensor_reads_as_the_file_holds_it(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.config == TINY
        for shard in folder.glob("*.safetensors"):
            for name, x in load_file(shard).items():
                assert checkpoint[name].dtype == x.dtype
                assert torch.equal(checkpoint[name].view(torch.uint8), x.view(torch.uint8))
        assert checkpoint.nbytes == sum(spec.nbytes for spec in expected_tensors(TINY))
        assert len(checkpoint) == len(list(expected_tensors(TINY)))


def test_opening_maps_nothing_and_close_leaves_nothing_mapped(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert mapped(folder) == []
    x = checkpoint["layers.1.attn.wq_a.weight"]
    assert {line.split("/")[-1] for line in mapped(folder)} == {SHARD}
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint["norm.weight"]
    assert x.float().abs().sum() > 0
    del x
    gc.collect()
    assert mapped(folder) == []


def resident_pages(folder: Path) -> int:
    """Bytes of this process's mappings of `folder` that have been read in."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_only_tensors_that_are_used_are_read(tmp_path: Path) -> None:
    config = shrunk(TINY, (0,), moe_intermediate_size=4096, hidden_size=512)
    big = ("layers.0.ffn.experts.0.w1.weight", "layers.0.ffn.experts.2.w1.weight")
    write_checkpoint(tmp_path, config, draw(config))
    with Checkpoint(tmp_path) as checkpoint:
        tensors = [checkpoint[name] for name in checkpoint]
        before = resident_pages(tmp_path)
        used = sum(int(checkpoint[name].view(torch.uint8).max()) >= 0 for name in big)
        read = resident_pages(tmp_path) - before
    assert used == 2
    # the system maps up to 2 MiB of what it has cached around a touched page
    around = 2 << 20
    assert checkpoint.nbytes > 15 << 20
    assert before <= around * len(checkpoint.headers.shard_bytes)
    assert 1 << 20 <= read <= (2 << 20) + 2 * around
    del tensors


def run(checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    config = checkpoint.config
    with torch.no_grad():
        model = V4Model(Binder(config, WeightSource(checkpoint)), EXACT)
        cache = KVCache(config, "float32")
        return model.logits(model.forward(cache.batch([cache.allocate()], [ids], [0]), cache))


def test_all_folder_forms_of_the_same_values_give_the_same_logits(folder: Path, tmp_path: Path) -> None:
    ids = [3, 9, 1, 22, 7, 7, 0, 15, 4, 11]
    with Checkpoint(folder) as checkpoint:
        want = run(checkpoint, ids)
        values = FloatTensors(TINY, checkpoint)
        base = replace(TINY, quantization=QuantizationConfig((128, 128), "float32"), expert_dtype="fp8")
        forms: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
            "float32": (unquantised(TINY), {"float_dtype": "F32"}),
            "bf16, one file": (unquantised(TINY), {"float_dtype": "BF16", "sharded": False}),
            "fp4 experts, rest float": (replace(TINY, quantization=None), {}),
            "base": (base, {}),
        }
        for name, (config, options) in forms.items():
            write_checkpoint(tmp_path / name, config, values, **options)
            with Checkpoint(tmp_path / name) as other:
                assert other.config == config
                error = (run(other, ids) - want).norm() / want.norm()
                # FP4 x 2**k is exact in BF16 and FP8; hyper-connections are float32 in the original and BF16 rounds them
                assert error <= (1e-2 if name.startswith("bf16") else 1e-6), (name, error)


@pytest.mark.parametrize("extra", [(), (0,), (0, 0, 0)])
def test_compress_ratios_may_stop_at_the_backbone_or_list_draft_blocks(
    folder: Path, extra: tuple[int, ...]
) -> None:
    edit_json(folder / "config.json", lambda raw: raw.update(compress_ratios=[0, 4, 8, *extra]))
    Checkpoint(folder).close()


def test_absent_and_draft_blocks_are_listed(tmp_path: Path, folder: Path) -> None:
    assert Checkpoint(folder).binding.draft_blocks == ("mtp.0",)
    write_checkpoint(tmp_path / "b", TINY, {k: v for k, v in draw(TINY).items() if not k.startswith("mtp.")})
    edit_json(tmp_path / "b" / "config.json", lambda raw: raw.update(num_nextn_predict_layers=1))
    binding = Checkpoint(tmp_path / "b").binding
    assert (binding.draft_blocks, binding.absent_blocks) == ((), ("mtp.0",))


def test_dspark_stages_are_validated(tmp_path: Path) -> None:
    config = replace(
        TINY, dspark_block_size=5, dspark_markov_rank=8, dspark_target_layer_ids=(0, 1, 2), compress_ratios=(0, 4, 8, 0, 0, 0)
    )  # fmt: skip
    write_checkpoint(tmp_path, config, draw(config))
    assert len(list(tmp_path.glob("*.safetensors"))) == 8
    assert Checkpoint(tmp_path).binding.draft_blocks == ("mtp.0", "mtp.1", "mtp.2")
    rewrite(
        tmp_path / "model-00008-of-00008.safetensors",
        lambda t: t.update({"mtp.2.norm.weight": torch.zeros(3)}),
    )
    with pytest.raises(CheckpointError, match=r"mtp\.2\.norm\.weight"):
        Checkpoint(tmp_path)


def test_fingerprint_follows_configuration_and_weights(folder: Path, tmp_path: Path) -> None:
    first = Checkpoint(folder).fingerprint()
    assert Checkpoint(folder).fingerprint() == first
    write_checkpoint(tmp_path / "other", TINY, draw(TINY, seed=1))
    assert Checkpoint(tmp_path / "other").fingerprint() != first
    edit_json(folder / "config.json", lambda raw: raw.update(index_topk=3))
    assert Checkpoint(folder).fingerprint() != first


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def raw_header(path: Path, edit: Callable[[str], str]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = edit(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def break_truncated(f: Path) -> None:
    (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1000])


def break_appended(f: Path) -> None:
    (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x")


def break_missing_shard(f: Path) -> None:
    (f / SHARD).unlink()


def break_missing_shard_without_index(f: Path) -> None:
    (f / SHARD).unlink()
    (f / INDEX).unlink()


def break_long_header(f: Path) -> None:
    (f / SHARD).write_bytes((10**7).to_bytes(8, "little") + b"{}")


def break_not_safetensors(f: Path) -> None:
    (f / SHARD).write_bytes(b"PK\x03\x04" + bytes(100) + b"\xff" * 8)


def break_garbage_header(f: Path) -> None:
    (f / SHARD).write_bytes((5).to_bytes(8, "little") + b"{\xfehey")


def break_empty_shard(f: Path) -> None:
    (f / SHARD).write_bytes(b"")


def break_lfs_pointer(f: Path) -> None:
    (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def break_dtype(f: Path) -> None:
    rewrite(
        f / SHARD, lambda t: t.update({"layers.1.attn_norm.weight": t["layers.1.attn_norm.weight"].half()})
    )


def break_scale_dtype(f: Path) -> None:
    name = "layers.1.ffn.experts.0.w1.scale"
    rewrite(f / SHARD, lambda t: t.update({name: t[name].view(torch.uint8)}))


def break_shape(f: Path) -> None:
    name = "layers.1.attn.wq_a.weight"
    rewrite(
        f / SHARD,
        lambda t: t.update({name: t[name].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)}),
    )


def break_missing_tensor(f: Path) -> None:
    (f / INDEX).unlink()
    rewrite(f / SHARD, lambda t: t.pop("layers.1.attn.attn_sink"))


def break_missing_tensor_of_draft_block(f: Path) -> None:
    (f / INDEX).unlink()
    rewrite(f / "model-00006-of-00006.safetensors", lambda t: t.pop("mtp.0.enorm.weight"))


def break_unexpected(f: Path) -> None:
    (f / INDEX).unlink()
    rewrite(f / SHARD, lambda t: t.update({"layers.1.attn.extra": torch.zeros(1)}))


def break_not_in_index(f: Path) -> None:
    edit_json(f / INDEX, lambda raw: raw["weight_map"].pop("norm.weight"))


def break_index_of_other_shard(f: Path) -> None:
    edit_json(f / INDEX, lambda raw: raw["weight_map"].update({"norm.weight": SHARD}))


def break_index_absent_shard(f: Path) -> None:
    edit_json(
        f / INDEX, lambda raw: raw["weight_map"].update({"norm.weight": "model-00009-of-00009.safetensors"})
    )


def break_index_escape(f: Path) -> None:
    edit_json(f / INDEX, lambda raw: raw["weight_map"].update({"norm.weight": "../other.safetensors"}))


def break_index_json(f: Path) -> None:
    (f / INDEX).write_text("{")


def break_index_empty(f: Path) -> None:
    (f / INDEX).write_text('{"metadata": {}}')


def break_duplicate_across_shards(f: Path) -> None:
    (f / INDEX).unlink()
    rewrite(f / SHARD, lambda t: t.update({"norm.weight": torch.zeros(64, dtype=torch.bfloat16)}))


def break_duplicate_in_header(f: Path) -> None:
    raw_header(f / SHARD, lambda text: text.replace('"layers.1.hc_attn_base":', '"layers.1.hc_ffn_base":'))


def break_overlap(f: Path) -> None:
    def shift(text: str) -> str:
        raw = json.loads(text)
        for name in ("layers.1.attn_norm.weight", "layers.1.ffn_norm.weight"):
            raw[name]["data_offsets"] = raw["layers.1.ffn_norm.weight"]["data_offsets"]
        return json.dumps(raw)

    raw_header(f / SHARD, shift)


def break_span(f: Path) -> None:
    raw_header(f / SHARD, lambda text: text.replace('"shape":[64]', '"shape":[65]', 1))


def break_negative_offset(f: Path) -> None:
    raw_header(f / SHARD, lambda text: text.replace('"shape":[64]', '"shape":[-64]', 1))


def break_layers(f: Path) -> None:
    edit_json(f / "config.json", lambda raw: raw.update(num_hidden_layers=2, compress_ratios=[0, 4]))


def break_hidden_size(f: Path) -> None:
    edit_json(f / "config.json", lambda raw: raw.update(hidden_size=96))


def break_quantisation(f: Path) -> None:
    edit_json(f / "config.json", lambda raw: raw.pop("quantization_config"))


def break_expert_dtype(f: Path) -> None:
    edit_json(f / "config.json", lambda raw: raw.update(expert_dtype="fp8"))


def break_names(f: Path) -> None:
    (f / INDEX).unlink()
    rewrite(
        f / SHARD, lambda t: t.update({"model.layers.1.self_attn.sinks": t.pop("layers.1.attn.attn_sink")})
    )


def break_two_loose_files(f: Path) -> None:
    (f / INDEX).unlink()
    save_file({"x": torch.zeros(1)}, f / "extra.safetensors")


def break_no_shards(f: Path) -> None:
    for path in f.glob("model*"):
        path.unlink()


BROKEN = [
    (break_truncated, r"model-00003.*cut short"),
    (break_appended, r"model-00003.*appended"),
    (break_missing_shard, r"model-00003-of-00006.safetensors` is missing"),
    (break_missing_shard_without_index, r"model-00003-of-00006.safetensors` is missing"),
    (break_long_header, r"its header alone is 10,000,000"),
    (break_not_safetensors, r"not a safetensors file"),
    (break_garbage_header, r"not a safetensors file.*not JSON"),
    (break_empty_shard, r"not a safetensors file"),
    (break_lfs_pointer, r"Git LFS pointer"),
    (break_dtype, r"layers.1.attn_norm.weight.*is F16 \[64\], expected BF16 \[64\]"),
    (break_scale_dtype, r"w1.scale.*is U8.*expected F8_E8M0"),
    (break_shape, r"wq_a.weight.*is F8_E4M3 \[64, 48\], expected F8_E4M3 \[48, 64\]"),
    (break_missing_tensor, r"lacks tensor `layers.1.attn.attn_sink`"),
    (break_missing_tensor_of_draft_block, r"lacks tensor `mtp.0.enorm.weight`"),
    (break_unexpected, r"also holds tensor `layers.1.attn.extra`"),
    (break_not_in_index, r"holds `norm.weight`, which `model.safetensors.index.json` does not list"),
    (break_index_of_other_shard, r"puts `norm.weight` into `model-00003.*does not hold it"),
    (break_index_absent_shard, r"model-00009-of-00009.safetensors` is missing"),
    (break_index_escape, r"into `../other.safetensors`, expected the name of a file beside it"),
    (break_index_json, r"not a readable index"),
    (break_index_empty, r"no `weight_map`"),
    (break_duplicate_across_shards, r"`norm.weight` is in both"),
    (break_duplicate_in_header, r"`layers.1.hc_ffn_base` is listed twice"),
    (break_overlap, r"overlaps|leaves a gap"),
    (break_span, r"spans 128 bytes, expected 130"),
    (break_negative_offset, r"expected dtype, shape and data_offsets"),
    (break_layers, r"also holds \d+ tensors, the first `layers.2"),
    (break_hidden_size, r"`embed.weight`.*\[24, 64\], expected BF16 \[24, 96\]"),
    (break_quantisation, r"also holds|expected BF16 or F32"),
    (break_expert_dtype, r"experts.*is I8"),
    (break_names, r"`model.layers.1.self_attn.sinks` has a name of another library"),
    (break_two_loose_files, r"expected an index or one numbered set"),
    (break_no_shards, r"has no safetensors files: it holds `config.json`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"), BROKEN, ids=[d.__name__.removeprefix("break_") for d, _ in BROKEN]
)
def test_damage_is_named_before_any_tensor_is_mapped(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    assert mapped(folder) == []


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is empty"):
        Checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"config\.json` does not exist"):
        Checkpoint(tmp_path)


def test_unreadable_folder_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        Checkpoint(folder)
