"""Routing, experts and their exchange: emulated kernels against numbers worked out by hand."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from ascend.inside.loaded import A2_A3, BF16, KEYS, C, S, by_hand, close, emulators, i32

# --- routing and experts


@by_hand("_C_ascend.moe_gating_top_k_hash", on=A2_A3)
def test_gate_takes_the_root_of_softplus_and_the_bias_only_chooses() -> None:
    # softplus(ln(e**s - 1)) = s: scores 2, 1, 3
    x = torch.tensor([[math.log(math.exp(s) - 1) for s in (4.0, 1.0, 9.0)]])
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, norm_type=2, routed_scaling_factor=1.5)
    assert ids.tolist() == [[2, 0]]
    close(y, [[0.9, 0.6]], atol=1e-5)
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, bias=torch.tensor([0.0, 9.0, 0.0]), norm_type=2)
    assert ids.tolist() == [[1, 2]]
    close(y, [[0.25, 0.75]], atol=1e-5)
    table = i32([0, 0], [1, 0])
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, input_ids=torch.tensor([1]), tid2eid=table, norm_type=2)
    assert ids.tolist() == [[1, 0]]
    close(y, [[1 / 3, 2 / 3]], atol=1e-5)


@by_hand("npu.npu_moe_init_routing_v2")
def test_rows_are_sorted_by_expert() -> None:
    x = torch.tensor([[1.0, -2.0], [4.0, 0.5]], dtype=BF16)
    how = {"active_num": 4, "expert_num": 3, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    how |= {"active_expert_range": [0, 3]}
    rows_, places, counts, _ = S.npu_moe_init_routing_v2(
        x, i32([1, 0], [0, 2]), **how, quant_mode=-1, row_idx_type=0
    )
    close(rows_, [[1, -2], [4, 0.5], [1, -2], [4, 0.5]])
    assert places.tolist() == [2, 0, 1, 3]
    assert counts.tolist() == [2, 1, 1]
    codes, places, _, scale = S.npu_moe_init_routing_v2(
        x, i32([1, 0], [0, 2]), **how, quant_mode=1, row_idx_type=1
    )
    # 1 / (2 / 127) = 63.5 to the even 64; 0.5 / (4 / 127) = 15.875
    assert codes.tolist() == [[64, -127], [127, 16], [64, -127], [127, 16]]
    assert places.tolist() == [1, 2, 0, 3]
    close(scale, [2 / 127, 4 / 127, 2 / 127, 4 / 127])


@by_hand("npu.npu_grouped_matmul")
def test_each_group_has_its_own_matrix() -> None:
    how = {"split_item": 3, "group_type": 0, "group_list_type": 1}
    x = torch.tensor([[1, 2], [3, 4], [5, 6]])
    w = torch.tensor([[[1, 0], [0, 1]], [[2, 0], [0, -1]]])
    counts = torch.tensor([1, 2])
    y = S.npu_grouped_matmul([x.to(BF16)], [w.to(BF16)], group_list=counts, **how)[0]
    close(y, [[1, 2], [6, -4], [10, -6]])
    ints = ([x.to(torch.int8)], [w.to(torch.int8)])
    sums = S.npu_grouped_matmul(*ints, group_list=counts, **how, output_dtype=torch.int32)[0]
    assert sums.tolist() == [[1, 2], [6, -4], [10, -6]]
    scales = {
        "scale": [torch.tensor([[1, 2], [0.5, 4]], dtype=BF16)],
        "per_token_scale": [torch.tensor([1.0, 10.0, 100.0])],
    }
    y = S.npu_grouped_matmul(*ints, group_list=counts, **how, **scales, output_dtype=BF16)[0]
    close(y, [[1, 4], [30, -160], [500, -2400]])
    # the same by running sums
    y = S.npu_grouped_matmul(
        [x.to(BF16)], [w.to(BF16)], group_list=counts.cumsum(0), **{**how, "group_list_type": 0}
    )[0]
    close(y, [[1, 2], [6, -4], [10, -6]])


@pytest.mark.families("950")
def test_fp8_rows_times_fp4_matrices() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 63] = 2.0, 1.0
    w = torch.zeros(1, 2, 32, dtype=torch.uint8)
    # FP4 codes: 3 is 1.5 in channel 0 of output 0; 15 is -6 in channel 63, the high nibble, of output 1
    w[0, 0, 0], w[0, 1, 31] = 0x03, 0xF0
    blocks = torch.full((1, 2, 1, 2), 127, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 130
    token = torch.tensor([[[128, 127]]], dtype=torch.uint8)
    y = S.npu_grouped_matmul(
        [x.to(torch.float8_e4m3fn)], [w.transpose(1, 2)], group_list=torch.tensor([1]), split_item=3, group_type=0,
        group_list_type=1, output_dtype=BF16, antiquant_scale=[blocks], per_token_scale=[token], weight_dtype=296,
        per_token_scale_dtype=293,
    )[0]  # fmt: skip
    # 2 * 2 (row scale) * 1.5 * 8 (column scale); 1 * -6
    close(y, [[48.0, -6.0]])


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@by_hand("npu.npu_clipped_swiglu")
def test_gates_are_clamped_above_and_values_on_both_sides() -> None:
    x = torch.tensor([[12.0, -12.0, 3.0, -20.0]])
    how = {"alpha": 1.0, "limit": 10.0, "bias": 0.0}
    close(S.npu_clipped_swiglu(x, **how, interleaved=False), [[silu(10) * 3, silu(-12) * -10]])
    close(S.npu_clipped_swiglu(x, **how, interleaved=True), [[silu(10) * -10, silu(3) * -10]])
    # the defaults are another model's: alpha 1.702, limit 7, bias 1
    close(S.npu_clipped_swiglu(x, interleaved=False)[:, :1], [[7 / (1 + math.exp(-1.702 * 7)) * 4]])


@by_hand("npu.npu_dequant_swiglu_quant", on=A2_A3)
def test_sums_are_scaled_gated_and_rounded_again() -> None:
    x = torch.tensor([[4, -2, 1, 8]], dtype=torch.int32)
    scales = {"weight_scale": torch.tensor([[0.5, 1.0, 2.0, 1.0]]), "activation_scale": torch.tensor([[0.5]])}
    how = {"activate_left": True, "quant_mode": 1, "clamp_limit": 3.0, "glu_alpha": 1.0, "glu_bias": 0.0}
    y, scale = S.npu_dequant_swiglu_quant(x, **scales, **how, swiglu_mode=2)
    # gates 4 * 0.5 * 0.5 = 1 and -1, values 1 and 4, clamped to 3
    want = (silu(1) * 1, silu(-1) * 3)
    close(scale, [abs(want[1]) / 127])
    assert y.tolist() == [[round(want[0] / (abs(want[1]) / 127)), -127]]
    # even channels as gates: 1 and 1, values -1 and 3
    y, scale = S.npu_dequant_swiglu_quant(x, **scales, **how, swiglu_mode=1)
    close(scale, [silu(1) * 3 / 127])
    assert y.tolist() == [[-42, 127]]


@by_hand("npu.npu_moe_finalize_routing")
def test_rows_come_back_to_their_tokens() -> None:
    found = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    places = i32(2, 0, 1, 3)
    by_token = S.npu_moe_finalize_routing(found, None, None, None, scales, places, None, drop_pad_mode=2)
    close(by_token, [[100 + 2 * 1], [3 * 10 + 4 * 1000]])
    by_choice = S.npu_moe_finalize_routing(found, None, None, None, scales, places, None, drop_pad_mode=0)
    close(by_choice, [[100 + 2 * 10], [3 * 1 + 4 * 1000]])


# --- exchange


@by_hand("npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2", on=A2_A3)
def test_a_group_of_one_sends_to_itself() -> None:
    x = torch.zeros(2, 1024, dtype=BF16)
    x[0, 0], x[1, 0] = 1.0, 2.0
    ids = i32([2, 0], [0, 1])
    group = ("ep", 1, 0, 4)
    found = S.npu_moe_distribute_dispatch_v2(x, ids, *group, shared_expert_num=0)
    # expert 0 has both tokens, 1 the second, 2 the first
    close(found[0][:4, 0], [1, 2, 2, 1])
    assert found[3].tolist() == [2, 1, 1, 0]
    # expert e multiplies by e + 1
    done = found[0].clone()
    done[:4] *= torch.tensor([[1.0], [1.0], [2.0], [3.0]])
    weights = torch.tensor([[10.0, 1.0], [1.0, 100.0]])
    out = S.npu_moe_distribute_combine_v2(done, ids, found[2], found[4], weights, *group, shared_expert_num=0)
    close(out[:, 0], [10 * 3 + 1, 2 + 100 * 4])


# --- the list itself


def test_every_row_of_the_contract_has_an_emulator_and_the_other_way_round() -> None:
    assert set(KEYS) == set(importlib.import_module("v4sdk_ascend.contract").contract())


def test_every_emulator_has_a_vector_worked_out_by_hand() -> None:
    # mega_moe needs two processes, which another test starts
    files = [f.read_text(encoding="utf-8") for f in Path(__file__).parent.glob("emulated_*.py")]
    marks = " ".join(mark for text in files for mark in re.findall(r"@by_hand\((.*?)\)\n", text, re.S))
    assert set(re.findall(r'"(\w+\.\w+)"', marks)) | {"cann_ops_transformer.npu_mega_moe"} == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_an_emulator_takes_what_its_schema_has(key: str) -> None:
    library, name = key.split(".")
    schema = getattr(getattr(torch.ops, library), name).default._schema
    taken = inspect.signature(inspect.unwrap(emulators.EMULATORS[library, name])).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        assert [a.name for a in schema.arguments] == list(taken)
