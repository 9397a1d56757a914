"""Faults planted into the calls that adapters make, and the first level that catches each; prints one line per fault.

L0: the table of calls; L1: the live dispatcher; L2: the vendor's shape functions; L3: the record of what was called;
L4: the emulated kernel, which refuses the call or gives another number than the op's reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from ascend.inside.loaded import A2_A3, A5, ALL, FAMILY
from ascend.inside.parity_ops import (
    BF16_EXPERTS,
    CHUNK,
    FLASH_WIDE,
    MAKERS,
    REAL,
    OfOnePack,
    case,
    config_of,
    inputs,
)
from torch import Tensor

from v4sdk.ops import OPS
from v4sdk.testing.arguments import map_tensors
from v4sdk.testing.conformance import judge_case

contract = importlib.import_module("v4sdk_ascend.contract")
# the vendor's function starts the device to learn the chip's code, and the stand-in has none that starts
meta = importlib.import_module("torch_npu.op_plugin.meta._meta_registrations")
meta.get_soc_version = importlib.import_module("torch_npu")._C._npu_get_soc_version

Change = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
T, C, S = "cann_ops_transformer", "_C_ascend", "npu"
PACK = {T: "transformer", C: "vendorpack", S: "stock"}


def to(**values: Any) -> Change:
    """Pass other values by keyword; a function gets the one that was passed."""

    def change(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = {
            k: v(kwargs[k]) if callable(v) else v for k, v in values.items() if k in kwargs or not callable(v)
        }
        return args, {**kwargs, **new}

    return change


def without(*names: str) -> Change:
    """Leave arguments to their defaults."""
    return lambda args, kwargs: (args, {k: v for k, v in kwargs.items() if k not in names})


def renamed(old: str, new: str) -> Change:
    """Pass an argument by another name."""
    return lambda args, kwargs: (args, {new if k == old else k: v for k, v in kwargs.items()})


def at(place: int, value: Callable[[Any], Any]) -> Change:
    """Change an argument by position."""
    return lambda args, kwargs: ((*args[:place], value(args[place]), *args[place + 1 :]), kwargs)


def swapped(i: int, j: int) -> Change:
    """Exchange two arguments by position."""

    def change(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        order = list(args)
        order[i], order[j] = order[j], order[i]
        return tuple(order), kwargs

    return change


def rolled(scales: list[Tensor]) -> list[Tensor]:
    """The scales of each expert given to the next."""
    return [scales[0].roll(1, 0)]


@dataclass(frozen=True)
class Fault:
    """One fault in one call.

    Attributes:
        op, kind: whose cases show it. key: the call. what: in words. change: the fault. on: families. level: that catches it.
        geometry: sizes of the case.
    """

    op: str
    key: str
    what: str
    change: Change
    level: str
    on: tuple[str, ...] = ALL
    kind: str = ""
    geometry: inputs.Geometry = REAL


_FINALIZE, _GROUPED = f"{S}.npu_moe_finalize_routing", f"{S}.npu_grouped_matmul"
_MLA, _SHARED = f"{T}.sparse_flash_mla", f"{C}.npu_sparse_attn_sharedkv"
_LISTED, _GATE = f"{S}.npu_sparse_flash_attention", f"{C}.moe_gating_top_k_hash"
_SWIGLU, _DEQUANT = f"{S}.npu_clipped_swiglu", f"{S}.npu_dequant_swiglu_quant"

FAULTS = (
    Fault("rms_norm", f"{S}.npu_rms_norm", "epsilon of another model", at(2, lambda eps: 0.1), "L4"),
    Fault("rms_norm", f"{S}.npu_rms_norm", "a weight of another dtype", at(1, lambda w: w.half()), "L4"),
    Fault("q_project", f"{S}.npu_rotary_mul", "a renamed argument", renamed("rotary_mode", "mode"), "L0"),
    Fault("q_project", f"{S}.npu_rotary_mul", "halves turned instead of pairs", to(rotary_mode="half"), "L4"),
    Fault("q_project", f"{S}.npu_rotary_mul", "a number as the mode", to(rotary_mode=1), "L1"),
    Fault("grouped_out", f"{T}.inplace_partial_rotary_mul", "turned back the wrong way", at(2, torch.neg), "L4"),
    Fault("kv_project_store", f"{C}.inplace_partial_rotary_mul", "sine for cosine", swapped(1, 2), "L4"),
    Fault("hc_pre", f"{T}.mhc_pre_sinkhorn", "epsilons dropped", at(6, lambda e: 0.05), "L4", A2_A3),
    Fault("hc_pre", f"{C}.npu_hc_pre_v2", "base for scale", swapped(2, 3), "L4", geometry=FLASH_WIDE),
    Fault("hc_pre", f"{S}.npu_mhc_sinkhorn", "one round of twenty", to(num_iters=1), "L4", A5),
    Fault("hc_post", f"{T}.mhc_post", "transposed h_res", at(1, lambda h: h.mT.contiguous()), "L4", A2_A3),
    Fault("hc_post", f"{S}.npu_mhc_post", "transposed h_res", at(1, lambda h: h.mT.contiguous()), "L4", A5),
    Fault("hc_post", f"{C}.npu_hc_post", "streams for the output", swapped(0, 1), "L4", geometry=FLASH_WIDE),
    Fault("compress", f"{C}.compressor", "start one late", at(11, lambda s: s + 1), "L4", A2_A3, "csa"),
    Fault("compress", f"{C}.compressor", "cosine for sine", swapped(6, 7), "L4", A2_A3, "hca"),
    Fault("compress", f"{C}.compressor", "pages of the next sequence", at(8, lambda t: t.roll(1, 0)), "L4", A2_A3, "index"),
    Fault("index_topk", f"{S}.npu_lightning_indexer", "missing causal mask", to(actual_seq_lengths_key=lambda n: n + 8), "L4"),
    Fault("index_topk", f"{S}.npu_lightning_indexer", "weights of the next token", at(2, lambda w: w.roll(1, 0)), "L4"),
    Fault("sparse_attn", _MLA, "sink left out", without("sinks"), "L4", kind="swa"),
    Fault("sparse_attn", _MLA, "window off by one", to(ori_win_left=128), "L4", kind="swa"),
    Fault("sparse_attn", _MLA, "missing causal mask", to(cmp_mask_mode=0), "L4", kind="hca"),
    Fault("sparse_attn", _MLA, "tokens of an open block forgotten", to(cmp_residual_kv=torch.zeros_like), "L4", kind="csa"),
    Fault("sparse_attn", _MLA, "metadata of another step", to(metadata=lambda m: m + 1), "L4", kind="csa"),
    Fault("sparse_attn", _SHARED, "sink left out", without("sinks"), "L4", A2_A3, "csa"),
    Fault("sparse_attn", _SHARED, "its own default window", without("ori_win_left"), "L4", A2_A3, "swa"),
    Fault("sparse_attn", _SHARED, "pages of the next sequence", to(ori_block_table=lambda t: t.roll(1, 0)), "L4", A2_A3, "swa"),
    Fault("sparse_attn", _LISTED, "sink left out", to(query_rope=torch.zeros_like), "L4", A2_A3, "swa"),
    Fault("sparse_attn", _LISTED, "sink left out", without("sinks"), "L4", A5, "swa"),
    Fault("sparse_attn", _LISTED, "sinks where there are none", to(sinks=torch.zeros(64)), "L4", A2_A3, "swa"),
    Fault("sparse_attn", _LISTED, "window off by one", at(3, lambda s: torch.where(s > 0, s - 1, s)), "L4", kind="swa"),
    Fault("sparse_attn", _LISTED, "its own default mode", without("attention_mode"), "L4", kind="swa"),
    Fault("route", _GATE, "sigmoid for the root of softplus", to(norm_type=1), "L4", A2_A3),
    Fault("route", _GATE, "bias left out", without("bias"), "L4", A2_A3),
    Fault("route_hash", _GATE, "experts of the next token", to(input_ids=lambda i: i.roll(1)), "L4", A2_A3),
    Fault("linear", f"{S}.npu_quant_matmul", "matrix not transposed", at(1, lambda w: w.T), "L2"),
    Fault("linear", f"{S}.npu_quant_matmul", "scale of a row left out", without("pertoken_scale"), "L4", A2_A3),
    Fault("shared_expert", _SWIGLU, "defaults of another model", without("alpha", "limit", "bias"), "L4"),
    Fault("shared_expert", _SWIGLU, "interleaved halves", to(interleaved=True), "L4"),
    Fault("routed_experts", _DEQUANT, "defaults of another model", without("clamp_limit", "glu_alpha", "glu_bias"), "L4", A2_A3),
    Fault("routed_experts", _DEQUANT, "interleaved halves", to(swiglu_mode=1), "L4", A2_A3),
    Fault("routed_experts", _DEQUANT, "values for gates", to(activate_left=False), "L4", A2_A3),
    Fault("routed_experts", _DEQUANT, "swapped int8 scales", to(weight_scale=lambda s: s.roll(1, 0)), "L4", A2_A3),
    Fault("routed_experts", _GROUPED, "a MX scale of the next expert", to(antiquant_scale=rolled), "L4", A5),
    Fault("routed_experts", _GROUPED, "counts for running sums", to(group_list_type=0), "L4"),
    Fault("routed_experts", _FINALIZE, "places token by token", to(drop_pad_mode=2), "L4"),
    Fault("routed_experts", f"{S}.npu_moe_init_routing_v2", "places the other way round", to(row_idx_type=1), "L4"),
    Fault("routed_experts", _SWIGLU, "gates not clamped", to(limit=1e6), "L4", geometry=BF16_EXPERTS),
)  # fmt: skip


@dataclass
class Faulty(contract.Vendor):  # type: ignore[name-defined, misc]
    """Makes calls with a fault in those of one key, and asks the vendor's shape functions about them."""

    fault: Fault | None = None
    planted: int = 0
    refused: list[str] = field(default_factory=list)

    def call(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """As without a fault, but for one key."""
        if self.fault is not None and key == f"{self.fault.key}_metadata":
            # a wrong idea of the step is in both of its calls
            _, changed = self.fault.change(args, kwargs)
            kwargs = {k: changed[k] for k in kwargs if k in changed}
        if self.fault is None or key != self.fault.key:
            return super().call(key, *args, **kwargs)
        args, kwargs = self.fault.change(args, kwargs)
        self.planted += 1
        if key.startswith(f"{S}."):
            self.ask(key, args, kwargs)
        return super().call(key, *args, **kwargs)

    def ask(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The same call without values, of a function whose shapes the vendor states."""
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(key.replace(".", "::"), "Meta"):
            return
        meta = [map_tensors(x, lambda t: t.to("meta")) for x in (args, dict(kwargs))]
        try:
            super().call(key, *meta[0], **meta[1])
        except Exception as exc:  # what a vendor's shape function raises is its own affair
            self.refused.append(f"{type(exc).__name__}: {exc}")


def caught(fault: Fault, layout: inputs.Layout = CHUNK) -> tuple[str, str]:
    """The first level that catches a fault, and its words; "" if none does."""
    backend = OfOnePack(PACK[fault.key.split(".")[0]], "bf16")
    backend.vendor = vendor = Faulty(fault=fault)
    given = case(
        fault.op,
        fault.kind,
        MAKERS[fault.op][fault.kind or next(iter(MAKERS[fault.op]))],
        fault.geometry,
        layout,
    )
    judged = judge_case(OPS[fault.op], given, backend, config_of(fault.geometry))
    assert vendor.planted, "the call was not made"
    choice = next(c for c in backend.choices if c.op == fault.op)
    words = next((w.split("first use: ")[1] for w in choice.passed_over if "failed on first use" in w), "")
    if "its row of the contract names" in str(judged.detail):
        return "L0", str(judged.detail)
    if words.startswith(("RuntimeError: npu::", "TypeError: npu::")) or "Expected a value of type" in words:
        return "L1", words
    if vendor.refused:
        return "L2", vendor.refused[0]
    if words:
        return "L4", words
    return ("L4", str(judged.detail)) if judged.status == "failed" else ("", "")


@pytest.mark.parametrize(
    "fault",
    [f for f in FAULTS if FAMILY in f.on],
    ids=lambda f: f"{f.key.split('.')[1]}-{f.what.replace(' ', '_')}",
)
def test_a_fault_is_caught(fault: Fault) -> None:
    level, words = caught(fault)
    print(f"planted, {FAMILY}: {level or '--'} {fault.key}, {fault.what}: {words[:110]}")
    assert level == fault.level, words


def test_without_a_fault_nothing_is_caught() -> None:
    for fault in {(f.op, f.kind, f.key.split(".")[0]): f for f in FAULTS if FAMILY in f.on}.values():
        assert caught(replace(fault, change=lambda args, kwargs: (args, kwargs))) == ("", "")


def test_a_misspelt_row_is_caught_by_the_dispatcher() -> None:
    row = contract.contract()[f"{S}.npu_rotary_mul"]
    said = contract.lacks(replace(row, keyword=("rotary_modes",)), FAMILY)
    print(f"planted, {FAMILY}: L1 {row.key}, a misspelt row of the table: {said}")
    assert "no argument rotary_modes" in str(said)


def test_a_provider_that_leaves_its_work_to_the_reference_is_caught_by_the_record() -> None:
    backend = OfOnePack("stock", "bf16")
    norm = OPS["rms_norm"]
    lazy = next(p for p in backend.rows if p.op == norm.name)
    backend.rows = [replace(lazy, function=lambda to, *args, **kwargs: norm(*args, **kwargs))]
    judged = judge_case(norm, case(norm.name, "", inputs.rms_norm, REAL, CHUNK), backend, config_of(REAL))
    assert judged.status == "passed"
    assert not backend.made
    print(f"planted, {FAMILY}: L3 {lazy.calls[0]}, the reference in its place: never called")
