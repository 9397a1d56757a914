"""The writer: packing is exact on the grid, files have the released layout, and nothing half-written appears."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from v4sdk.config import ModelConfig, QuantizationConfig
from v4sdk.config_file import config_dict
from v4sdk.convert import FloatTensors, released, round_weights, unquantised, write_checkpoint
from v4sdk.errors import CheckpointError, ShapeError
from v4sdk.headers import INDEX_NAME
from v4sdk.tensors import expected_tensors
from v4sdk.weight_formats import pack_fp4, pack_fp8, round_fp4, round_fp8
from v4sdk.weights import Weight

TINY = ModelConfig(
    vocab_size=24, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=48, o_groups=2, o_lora_rank=40, sliding_window=8, compress_ratios=(0, 4, 8, 0),
    compress_rope_theta=160000.0, rope_theta=10000.0, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=160, num_hash_layers=1,
    routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=2, hc_sinkhorn_iters=3, hc_eps=1e-6, rms_norm_eps=1e-6,
    max_position_embeddings=1024, rope_factor=16.0, rope_original_context=64, num_nextn_predict_layers=1,
)  # fmt: skip


def float_model(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Draw a float tensor for every name of an unquantised folder."""
    g = torch.Generator().manual_seed(seed)
    drawn = {}
    for spec in expected_tensors(unquantised(config)):
        if spec.dtypes[0] == "I64":
            drawn[spec.name] = torch.randint(config.n_routed_experts, spec.shape, generator=g)
        else:
            drawn[spec.name] = torch.randn(spec.shape, generator=g) * 0.1
    return drawn


def fp8_matrix(seed: int, rows: int, cols: int, exponents: tuple[int, int]) -> Tensor:
    """Draw values that lie on an FP8 grid with a power-of-two scale per 128 x 128 tile."""
    g = torch.Generator().manual_seed(seed)
    byte = torch.randint(0, 256, (rows, cols), generator=g, dtype=torch.uint8)
    byte[(byte & 127) == 127] = 0
    low, high = exponents
    exponent = torch.randint(low, high + 1, (-(-rows // 128), -(-cols // 128)), generator=g)
    scale = torch.ldexp(torch.ones(exponent.shape), exponent)
    return Weight(byte.view(torch.float8_e4m3fn), scale, "fp8", (128, 128)).dequantize()


SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(-100, 100))
def test_fp8_packing_returns_values_on_the_grid_exactly(
    seed: int, rows: int, cols: int, exponent: int
) -> None:
    x = fp8_matrix(seed, rows, cols, (exponent, exponent + 12))
    data, scale = pack_fp8(x)
    back = Weight(data, scale, "fp8", (128, 128)).dequantize()
    assert scale.shape == (-(-rows // 128), -(-cols // 128))
    assert torch.equal(back, x)
    assert torch.equal(round_fp8(x), x)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 8), st.integers(-100, 100))
def test_fp4_packing_returns_values_on_the_grid_exactly(
    seed: int, rows: int, groups: int, exponent: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, groups * 16), generator=g, dtype=torch.uint8).view(torch.int8)
    scale = torch.randint(127 + exponent, 127 + exponent + 12, (rows, groups), generator=g, dtype=torch.uint8)
    x = Weight(packed, scale, "fp4", (1, 32)).dequantize()
    assert torch.equal(Weight(*pack_fp4(x), "fp4", (1, 32)).dequantize(), x)
    assert torch.equal(round_fp4(x), x)


@settings(max_examples=30, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 5), st.floats(1e-20, 1e20))
def test_packing_twice_changes_nothing_and_errs_by_at_most_half_a_step(
    seed: int, rows: int, groups: int, size: float
) -> None:
    x = torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)) * size
    eight, four = round_fp8(x), round_fp4(x)
    assert torch.equal(round_fp8(eight), eight)
    assert torch.equal(round_fp4(four), four)
    tile = x.abs().amax()
    # half a mantissa step of the value, or half the smallest step of a tile whose top is at least 224
    assert bool(((eight - x).abs() <= x.abs() / 16 + tile * 2.0**-10 / 224).all())
    group = x.reshape(rows, groups, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(x.shape)
    assert bool(((four - x).abs() <= group / 3).all())


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(1e-30, 1e30))
def test_scale_is_the_smallest_power_of_two_that_fits(seed: int, size: float) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)) * size
    for (_, scale), largest in ((pack_fp8(x), 448.0), (pack_fp4(x), 6.0)):
        amax = x.abs().amax() if largest == 448.0 else x.reshape(40, 2, 32).abs().amax(-1)
        value = scale.float().squeeze() if largest == 448.0 else scale.float()
        assert bool((amax.double() <= value.double() * largest).all())
        assert bool((amax.double() > value.double() * largest / 2).all())


def test_boundary_magnitudes_keep_their_scale() -> None:
    for exponent in (-20, 0, 20):
        top = torch.full((1, 32), 448.0 * 2.0**exponent)
        assert pack_fp8(top)[1].float().item() == 2.0**exponent
        above = torch.nextafter(top, torch.tensor(float("inf")))
        assert pack_fp8(above)[1].float().item() == 2.0 ** (exponent + 1)
        assert pack_fp4(torch.full((1, 32), 6.0 * 2.0**exponent))[1].float().item() == 2.0**exponent
    assert pack_fp8(torch.zeros(3, 5))[1].float().item() == 1.0
    assert pack_fp4(torch.zeros(1, 32))[1].float().item() == 1.0


def test_rounding_passes_the_gradient_straight_through() -> None:
    for fake in (round_fp8, round_fp4):
        x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        g = torch.randn(33, 64, generator=torch.Generator().manual_seed(2))
        fake(x).backward(g)
        assert x.grad is not None
        assert torch.equal(x.grad, g)


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ShapeError, match="multiple of 32"):
        pack_fp4(torch.zeros(2, 33))
    with pytest.raises(ShapeError, match="float matrix"):
        pack_fp8(torch.zeros(2, 2, 2))


def read_all(folder: Path) -> dict[str, Tensor]:
    index = json.loads((folder / INDEX_NAME).read_text())
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        part = load_file(folder / shard)
        assert {index["weight_map"][name] for name in part} == {shard}
        tensors |= part
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def test_released_folder_has_the_official_files_and_reads_back_the_rounded_values(tmp_path: Path) -> None:
    config, model = released(TINY), float_model(TINY)
    write_checkpoint(tmp_path, config, model)
    names = [f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", *names, INDEX_NAME]
    assert ModelConfig.from_folder(tmp_path) == config
    tensors = read_all(tmp_path)
    specs = {spec.name: spec for spec in expected_tensors(config)}
    assert set(tensors) == set(specs)
    with safe_open(tmp_path / names[2], "pt") as shard:
        assert set(shard.keys()) == {s.name for s in specs.values() if s.shard == 3}
    rounded = round_weights(config, model)
    assert set(rounded) == set(model)
    for name, x in FloatTensors(config, tensors).items():
        if tensors[name].dtype == torch.bfloat16:
            assert torch.equal(x, model[name].to(torch.bfloat16)), name
        else:
            assert torch.equal(x, rounded[name]), name


def test_float_folder_of_a_quantised_one_has_its_values_and_packs_to_them_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "q", released(TINY), float_model(TINY))
    stored = read_all(tmp_path / "q")
    floats = FloatTensors(released(TINY), stored)
    write_checkpoint(tmp_path / "f", unquantised(TINY), floats, float_dtype="F32", sharded=False)
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["config.json", "model.safetensors"]
    single = load_file(tmp_path / "f" / "model.safetensors")
    assert {t.dtype for t in single.values()} == {torch.float32, torch.int64}
    write_checkpoint(tmp_path / "again", released(TINY), single)
    # not byte for byte: a maximum that was rounded down to a power of two below may get a smaller scale
    again = FloatTensors(released(TINY), read_all(tmp_path / "again"))
    for name, x in floats.items():
        assert torch.equal(x, single[name].to(x.dtype)), name
        assert torch.equal(x, again[name]), name


def test_stored_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", released(TINY), float_model(TINY))
    write_checkpoint(tmp_path / "b", released(TINY), read_all(tmp_path / "a"))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_base_layout_has_fp8_experts_and_float32_scales(tmp_path: Path) -> None:
    base = replace(TINY, quantization=QuantizationConfig((128, 128), "float32"), expert_dtype="fp8")
    model = float_model(TINY)
    write_checkpoint(tmp_path, base, model)
    tensors = read_all(tmp_path)
    assert {t.dtype for t in tensors.values()} == {
        torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn
    }  # fmt: skip
    name = "layers.1.ffn.experts.2.w2.weight"
    assert torch.equal(FloatTensors(base, tensors)[name], round_fp8(model[name]))


def test_fp4_experts_beside_unquantised_projections(tmp_path: Path) -> None:
    mixed = replace(TINY, quantization=None, expert_dtype="fp4")
    write_checkpoint(tmp_path, mixed, float_model(TINY))
    tensors = read_all(tmp_path)
    assert tensors["layers.0.ffn.experts.0.w1.weight"].dtype == torch.int8
    assert tensors["layers.0.attn.wq_a.weight"].dtype == torch.bfloat16
    assert ModelConfig.from_folder(tmp_path) == mixed


def test_absent_mtp_block_is_left_out_of_files_and_configuration(tmp_path: Path) -> None:
    model = {k: v for k, v in float_model(TINY).items() if not k.startswith("mtp.")}
    write_checkpoint(tmp_path, released(TINY), model)
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    assert ModelConfig.from_folder(tmp_path).num_mtp_blocks == 0


def test_incomplete_model_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    model = float_model(TINY)
    write_checkpoint(tmp_path, released(TINY), model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = float_model(TINY, seed=1)
    bad["layers.2.ffn.experts.1.w3.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"experts\.1\.w3\.weight` holds NaN"):
        write_checkpoint(tmp_path, released(TINY), bad)
    del bad["norm.weight"]
    with pytest.raises(CheckpointError, match=r"`norm\.weight` is missing"):
        write_checkpoint(tmp_path, released(TINY), bad)
    wrong = model | {"head.weight": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"head.weight.*\[24, 64\]"):
        write_checkpoint(tmp_path, released(TINY), wrong)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_rewriting_in_another_layout_removes_the_files_of_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, released(TINY), float_model(TINY))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(tmp_path, unquantised(TINY), float_model(TINY), sharded=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    "config", [TINY, released(TINY), unquantised(replace(TINY, rope_original_context=0, rope_factor=1.0))]
)
def test_configuration_survives_the_file(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config_dict(config)) == config
