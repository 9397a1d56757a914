"""Every observable value of the forward pass against the official one, on the golden checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from v4sdk.numerics import EXACT, KVFormat, Numerics
from v4sdk_bench.parity.golden import (
    ATTENTION_REL_LIMIT,
    DECODE_KEY,
    KV_ROUNDED,
    KV_ROUNDED_WIDE,
    LAYER_MAX_ABS_LIMIT,
    LAYER_REL_LIMIT,
    MAX_ABS_LIMIT,
    SETS_EQUAL_LIMIT,
    Golden,
    LayerDifference,
    layer_difference,
    max_abs,
    mtp_difference,
    outputs,
    sets_equal,
)

PER_LAYER = ("attn_out", "ffn_out", "streams_after_layer", "route_weights")


def folder(name: str) -> Path:
    return Path(__file__).parent / "golden" / name


@cache
def golden(name: str, expected: str = "expected") -> Golden:
    return Golden.load(folder(name), expected)


@cache
def difference(layer: int) -> LayerDifference:
    return layer_difference(golden("tiny-quant"), layer)


@cache
def found_outputs(expected: str, numerics: Numerics) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = outputs(golden("tiny-fp32", expected), numerics)
    return found


def check_everything(expected: str, numerics: Numerics) -> None:
    want = golden("tiny-fp32", expected)
    found = found_outputs(expected, numerics)
    off = max_abs(found, want.expected)
    assert set(off) == {f"{part}_{i}" for part in PER_LAYER for i in range(5)} | {
        "logits",
        DECODE_KEY,
        "mtp_logits",
    }
    assert {name: value for name, value in off.items() if value > MAX_ABS_LIMIT} == {}
    sets = sets_equal(found, want.expected)
    assert set(sets) == {f"route_ids_{i}" for i in range(5)} | {"index_topk_1", "index_topk_3"}
    assert set(sets.values()) == {1.0}


def test_float32_equals_the_official_forward_pass_in_prefill_decode_and_mtp() -> None:
    check_everything("expected", EXACT)


def test_roundings_of_rows_and_indexer_equal_the_official_ones() -> None:
    check_everything("expected_kvquant", KV_ROUNDED_WIDE)


def test_roundings_in_float32_agree_until_the_first_tie() -> None:
    # the two rows near a tie are in layers 1 and 2; what comes before them has no excuse
    want = golden("tiny-fp32", "expected_kvquant")
    off = max_abs(found_outputs("expected_kvquant", KV_ROUNDED), want.expected)
    assert max(off[f"{part}_0"] for part in PER_LAYER) <= MAX_ABS_LIMIT
    # one step of one element of one row, at its largest, in a layer's output
    assert off["attn_out_1"] <= 1e-3
    assert off["attn_out_2"] <= 1e-3


def test_the_goldens_tell_rounded_rows_from_plain_ones() -> None:
    plain, rounded = golden("tiny-fp32"), golden("tiny-fp32", "expected_kvquant")
    assert max_abs(plain.expected, rounded.expected)["streams_after_layer_4"] > 100 * MAX_ABS_LIMIT


@pytest.mark.parametrize("layer", range(5))
def test_reference_layer_matches_the_official_one_within_the_bf16_step(layer: int) -> None:
    found = difference(layer)
    assert found.relative["attn_out"] <= ATTENTION_REL_LIMIT
    assert found.relative["ffn_out"] <= LAYER_REL_LIMIT
    assert found.relative["streams_after_layer"] <= LAYER_REL_LIMIT
    assert max(found.largest.values()) <= LAYER_MAX_ABS_LIMIT


def test_reference_layers_choose_the_official_experts_and_entries() -> None:
    found = [difference(layer) for layer in range(5)]
    assert sum(d.experts for d in found) / 5 >= SETS_EQUAL_LIMIT
    picks = [d.picks for d in found if d.picks is not None]
    assert len(picks) == 2
    assert sum(picks) / 2 >= SETS_EQUAL_LIMIT


def test_reference_mtp_matches_the_official_one_within_the_bf16_step() -> None:
    assert mtp_difference(golden("tiny-quant")) <= LAYER_REL_LIMIT


@pytest.mark.parametrize("fmt", ["bf16", "native"])
def test_rounded_rows_lose_nothing_in_narrow_formats_but_the_rotary_part(fmt: KVFormat) -> None:
    # in reference numerics every row is BF16 or on the FP8 grid already, so all formats store it exactly
    want = golden("tiny-quant")
    narrow, wide = layer_difference(want, 3, fmt), layer_difference(want, 3, "float32")
    assert narrow == wide


def test_two_threads_decide_no_rounding_differently() -> None:
    want = golden("tiny-fp32", "expected_kvquant")
    one = found_outputs("expected_kvquant", KV_ROUNDED_WIDE)
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        assert max(max_abs(outputs(want, KV_ROUNDED_WIDE), one).values()) <= 1e-9
    finally:
        torch.set_num_threads(before)
