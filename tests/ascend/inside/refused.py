"""What the vendor's documents do not list is refused by the emulated kernels, in words; without the fault it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ascend.inside.loaded import A2_A3, A5, ALL, BF16, F16, F32, FAMILY, emulators
from ascend.inside.right_calls import (
    compressor,
    dispatch,
    finalize,
    fp4_grouped,
    gate,
    grouped,
    indexer,
    init_routing,
    int8_indexer,
    listed,
    mla,
    norm,
    partial_rotary,
    product,
    rotary,
    shared_kv,
    stock_pre,
    swiglu_quant,
    transformer_pre,
    vendorpack_pre,
)

# a call, what is wrong with it, the words of the refusal, the families that refuse it
FAULTS: list[tuple[Callable[..., Any], dict[str, Any], str, tuple[str, ...]]] = [
    (norm, {"gamma": F32}, "gamma is torch.float32, input torch.bfloat16", ALL),
    (rotary, {"table": F32}, "r1 and r2 are torch.float32", ALL),
    (rotary, {"dim": 896}, "below 896", ALL),
    (rotary, {"mode": "pairs"}, "half and interleave", ALL),
    (rotary, {"lead": (250, 2)}, "less than 1000", A2_A3),
    (partial_rotary, {"pack": "T", "mode": "half"}, "documented is interleave", ALL),
    (partial_rotary, {"pack": "C", "width": 32}, "the slice is 64 wide", ALL),
    (partial_rotary, {"pack": "T", "rows": 3}, "r1 is .3, 1, 1, 64. for x", ALL),
    (stock_pre, {}, "npu_mhc_pre is documented for 950", A2_A3),
    (transformer_pre, {}, "mhc_pre_sinkhorn is documented for 910B, 910C", A5),
    (transformer_pre, {"width": 64}, "multiples of 128", A2_A3),
    (transformer_pre, {"rounds": 19}, "documented is 20", A2_A3),
    (transformer_pre, {"n": 6}, "documented are 4", A2_A3),
    (vendorpack_pre, {"width": 1024}, "the hidden size is 1024", ALL),
    (vendorpack_pre, {"rounds": 3}, "documented is 20", ALL),
    (mla, {"left": 128}, "documented is 127, 0", ALL),
    (mla, {"mask": 3}, "ori_mask_mode is 3", ALL),
    (mla, {"heads": 96}, "powers of two to 128", ALL),
    (mla, {"heads": 1}, "one query head", A5),
    (mla, {"metadata": False}, "metadata", ALL),
    (mla, {"made_for": 10}, "made for another", ALL),
    (mla, {"ratio": 8}, "4 picked and 128 whole", A2_A3),
    (mla, {"topk": 256}, "512 or 1024", A2_A3),
    (mla, {"residual": False}, "cmp_residual_kv is required", ALL),
    (mla, {"far": False, "topk": 0}, "cmp_ratio is 4 without cmp_kv", ALL),
    (mla, {"kv": F16}, "ori_kv is torch.float16", ALL),
    (shared_kv, {"window": {}}, "the window is 128", A2_A3),
    (shared_kv, {"heads": 32}, "documented are 64", A2_A3),
    (shared_kv, {"topk": 1024}, "top-k of 512", A2_A3),
    (shared_kv, {"ratio": 8}, "documented are 4 and 128", A2_A3),
    (shared_kv, {}, "documented for 910B, 910C", A5),
    (listed, {"sinks": torch.zeros(64)}, "sinks are supported on 950 only", A2_A3),
    (listed, {"mode": 0}, "documented is 2", ALL),
    (listed, {"rope": False}, "needs query_rope", ALL),
    (listed, {"seen": (0, -1, 1)}, "a valid index follows an invalid one", ALL),
    (listed, {"seen": (0, 4, -1)}, "past the rows", ALL),
    (listed, {"heads": 48}, "powers of two", A2_A3),
    (indexer, {"dim": 64}, "documented is one head of 128", ALL),
    (indexer, {"heads": 12}, "12 heads are not documented", A5),
    (indexer, {"count": 2049}, "1 to 2048", ALL),
    (indexer, {"page": 8}, "multiples of 16", ALL),
    (indexer, {"table": torch.int64}, "block table of key is torch.int64", ALL),
    (int8_indexer, {"pack": "T", "scales": F32}, "documented are float16", ALL),
    (int8_indexer, {"pack": "C", "scales": F32}, "documented are float16", A2_A3),
    (int8_indexer, {"pack": "T", "weight": 300.0}, "past float16", ALL),
    (int8_indexer, {"pack": "C", "weight": 300.0}, "past float16", A2_A3),
    (int8_indexer, {"pack": "T", "heads": 32}, "documented are 64", A2_A3),
    (int8_indexer, {"pack": "T", "q_mode": 1}, "is for 950", A2_A3),
    (int8_indexer, {"pack": "C"}, "documented for 910B, 910C", A5),
    (compressor, {"hidden": 1280}, "multiples of 512", A2_A3),
    (compressor, {"dim": 256}, "documented are 128 and 512", A2_A3),
    (compressor, {"ratio": 8}, "ratio 8", A2_A3),
    (compressor, {"pages": (1, 1)}, "share a row of the state", A2_A3),
    (compressor, {"pages": (1,)}, "no column for position 4", A2_A3),
    (compressor, {"mode": 1}, "documented is 2", A2_A3),
    (compressor, {"state": BF16}, "state_cache is bfloat16", A2_A3),
    (compressor, {}, "documented for 910B, 910C", A5),
    (gate, {"k": 5}, "at most the experts", A2_A3),
    (gate, {"ids": False}, "go together", A2_A3),
    (gate, {"renorm": 1}, "renorm 1", A2_A3),
    (gate, {}, "documented for 910B, 910C", A5),
    (dispatch, {}, "documented for 910B, 910C", A5),
    (dispatch, {"ids": (1, 1)}, "chosen twice", A2_A3),
    (dispatch, {"ranks": 2}, "no group of 2", A2_A3),
    (dispatch, {"width": 8224}, "7168", ("910B",)),
    (dispatch, {"width": 992}, "1024 to 8192", ("910C",)),
    (grouped, {"scale": F32}, "scale torch.float32 with output torch.bfloat16 is not in the table", ALL),
    (grouped, {"counts": (1, 1)}, "sums to 2 for 3 rows", ALL),
    (grouped, {"split": 0}, "split_item 0", ALL),
    (fp4_grouped, {}, "MX scales are for 950", A2_A3),
    (fp4_grouped, {"wide": True}, "antiquant_scale", A5),
    (swiglu_quant, {}, "documented for 910B, 910C", A5),
    (swiglu_quant, {"half": 32}, "multiples of 64", A2_A3),
    (swiglu_quant, {"mode": 4}, "swiglu_mode is 4", A2_A3),
    (swiglu_quant, {"limit": 0.0}, "positive", A2_A3),
    (swiglu_quant, {"scale": False}, "need weight_scale", A2_A3),
    (product, {"scale": BF16, "out": F16}, "not in the table", ALL),
    (product, {"x": BF16}, "x1 is bfloat16", ALL),
    (finalize, {"mode": 1}, "drop_pad_mode 1", ALL),
    (finalize, {"scales": BF16}, "differ in dtype", ALL),
    (init_routing, {"number": 2}, "out of range", ALL),
    (init_routing, {"mode": 0}, "quant_mode 0", ALL),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "fault", "words"),
    [
        pytest.param(call, fault, words, id=f"{call.__name__}-{words}")
        for call, fault, words, on in FAULTS
        if FAMILY in on
    ],
)
def test_it_is_refused_in_words(call: Callable[..., Any], fault: dict[str, Any], words: str) -> None:
    with pytest.raises(emulators.Refused, match=words):
        call(**fault)


def only_where(call: Callable[..., Any]) -> set[str]:
    """The families that refuse a call without a fault."""
    return {family for row, fault, _, on in FAULTS if row is call and not fault for family in on}


def without_faults() -> Iterator[Any]:
    """Every call without a fault that is documented for this family, once for each pack that has it."""
    for call in dict.fromkeys(row[0] for row in FAULTS):
        if FAMILY in only_where(call):
            continue
        packs = ("T", "C") if call in (partial_rotary, int8_indexer) else ("",)
        if call is int8_indexer and FAMILY == "950":
            packs = ("T",)
        for pack in packs:
            yield pytest.param(call, {"pack": pack} if pack else {}, id=f"{call.__name__}-{pack}".strip("-"))


@pytest.mark.parametrize(("call", "given"), list(without_faults()))
def test_without_a_fault_it_is_not_refused(call: Callable[..., Any], given: dict[str, str]) -> None:
    call(**given)


def test_without_a_chip_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4SDK_ASCEND_STUB_SOC", "Ascend310")
    with pytest.raises(emulators.Refused, match="expected the name of a chip"):
        norm()
