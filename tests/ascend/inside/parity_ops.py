"""Every provider of every pack, through the vendor's dispatcher and the emulated kernels, against the op it serves.

A pack is chosen by leaving the others out. A provider that hands its work to the reference unnoticed would pass any comparison,
so the calls are recorded: each key of its row must be used by one of its cases.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ascend.inside.loaded import FAMILY

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import FAST, KVFormat
from v4sdk.ops import OPS, inputs
from v4sdk.ops.op import Case
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.testing.conformance import judge_case
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import ExpertWeights, Weight

os.environ["V4SDK_ASCEND_EMULATE"] = "1"
ops = importlib.import_module("v4sdk_ascend.ops")
backend = importlib.import_module("v4sdk_ascend.backend")

# heads, window and top-k as released, the rest small; the hidden size is the least that the compressors' documents know
REAL = inputs.Geometry("real", 1024, 64, 512, 64, 128, 64, 8, 4, 8, 2, 128, 320, 64, 128, 512, 128)
FLASH_WIDE = replace(REAL, name="wide", hidden=4096)
BF16_EXPERTS = replace(REAL, name="bf16", dense="float", routed="float")
# past 2,048 tokens there are more compressed entries at ratio 4 than are picked
DECODE = inputs.Layout("decode", (2300, 127, 9), (1, 1, 1))
CHUNK = inputs.Layout("chunk", (2100, 3, 122), (9, 1, 11))
PREFILL = inputs.Layout("prefill", (0, 0), (30, 7))
LAYOUTS = (DECODE, CHUNK, PREFILL)
SMALL = (inputs.TINY, inputs.ODD)
MAKERS: dict[str, dict[str, inputs.Make]] = {
    "rms_norm": {"": inputs.rms_norm},
    "linear": {"stored": lambda *how: {**inputs.linear(*how), "weight": stored(*how)}},
    "hc_pre": {"": inputs.hc_pre},
    "hc_post": {"": inputs.hc_post},
    "q_project": {"": inputs.q_project},
    "kv_project_store": {"": inputs.kv_project_store},
    "index_query": {"": inputs.index_query},
    "grouped_out": {"": inputs.grouped_out},
    "index_topk": {"": inputs.index_topk},
    "route": {"": inputs.route},
    "route_hash": {"": inputs.route_hash},
    "shared_expert": {"": inputs.shared_expert},
    "routed_experts": {"uneven": lambda *how: uneven(inputs.routed_experts(True)(*how))},
    "compress": {
        "csa": inputs.compress(4, False), "index": inputs.compress(4, True), "hca": inputs.compress(128, False),
    },
    "sparse_attn": {kind: inputs.sparse_attn(kind) for kind in ("swa", "csa", "hca")},
}  # fmt: skip


def stored(draw: inputs.Draw, g: inputs.Geometry, n: Any, layout: inputs.Layout) -> Weight:
    """A matrix as a folder for this family has it: int8 with a scale per row, or MXFP8; BF16 where the sizes say so."""
    weight = draw.weight(g.dense, g.q_rank, g.hidden)
    if g.dense == "float":
        return weight
    if FAMILY != "950":
        return Weight(*pack_int8(weight.dequantize()), "int8", (1, g.hidden))
    return replace(
        draw.weight("fp8", g.q_rank, g.hidden),
        scale=draw.integers(3, g.q_rank, g.hidden // 32).to(torch.uint8) + 112,
        block=(1, 32),
    )


def uneven(given: dict[str, Any]) -> dict[str, Any]:
    """The same with every matrix's rows smaller by 1, 2 or 4, another for the next expert: scales that can be told apart."""

    def smaller(weight: Weight) -> Weight:
        experts, rows = weight.data.shape[:2]
        halvings = (torch.arange(experts)[:, None] + torch.arange(rows)) % 3
        if weight.scale is None:
            return replace(
                weight, data=weight.data * torch.exp2(-halvings[..., None].float()).to(weight.data.dtype)
            )
        return replace(weight, scale=weight.scale - halvings[..., None].to(torch.uint8))

    w1, w2, w3 = (smaller(w) for w in given["experts"].packed)
    stacks = ExpertWeights(packed=(w1, w2, w3))
    each = [stacks.expert(e) for e in range(len(w1.data))]
    first, second, third = (tuple(one[i] for one in each) for i in range(3))
    return given | {"experts": ExpertWeights(first, second, third, stacks.packed)}


def config_of(g: inputs.Geometry) -> ModelConfig:
    """A model of these sizes, which is what providers are asked about."""
    return shrunk(
        V4_FLASH, (0, 4, 128), hidden_size=g.hidden, num_attention_heads=g.heads, head_dim=g.head_dim,
        qk_rope_head_dim=g.rope_dim, q_lora_rank=g.q_rank, o_lora_rank=g.o_rank, o_groups=g.groups, hc_mult=g.streams,
        n_routed_experts=g.experts, num_experts_per_tok=g.chosen, moe_intermediate_size=g.intermediate, vocab_size=g.vocab,
        index_n_heads=g.index_heads, index_head_dim=g.index_dim, index_topk=g.topk, sliding_window=g.window,
    )  # fmt: skip


class OfOnePack(backend.AscendBackend):  # type: ignore[name-defined, misc]
    """The emulated backend with the providers of one pack alone; everything else runs its parts."""

    def __init__(self, pack: str, kv_format: KVFormat) -> None:
        super().__init__()
        self.open()
        self.kept = kv_format
        self.rows = [p for p in ops.PROVIDERS if p.pack == pack]
        self.made: set[str] = set()
        self.vendor.observers.append(lambda key, args, kwargs: self.made.add(key))

    @property
    def kv_formats(self) -> tuple[KVFormat, ...]:
        """The one that is looked at."""
        return (self.kept,)

    def kernels(self) -> Any:
        """The table of this pack."""
        rows, self.choices = ops.choose(self.vendor, FAMILY, self.rows)
        return rows


PACKS = ("transformer", "vendorpack", "stock")
FORMATS: tuple[KVFormat, ...] = ("bf16", "native") if FAMILY == "950" else ("bf16",)
LISTED = [p for p in ops.PROVIDERS if p.pack in PACKS and FAMILY in p.chips and p.op in MAKERS]
SERVING, DECLINING = ([p for p in LISTED if p.is_declined is declines] for declines in (False, True))


def geometries(one: Any, kv_format: KVFormat) -> Iterator[inputs.Geometry]:
    """The sizes that a provider does not decline."""
    for g in (REAL, *SMALL):
        if one.unless(config_of(g), EngineConfig(FAST, kv_format), FAMILY) is None:
            yield g
    if one.op in ("hc_pre", "hc_post") and one.pack == "vendorpack":
        yield FLASH_WIDE
    if one.op in ("linear", "routed_experts", "shared_expert", "grouped_out"):
        yield BF16_EXPERTS


def case(op: str, kind: str, make: inputs.Make, g: inputs.Geometry, layout: inputs.Layout) -> Case:
    label = "-".join(filter(None, (op, kind, g.name, layout.name)))
    return Case(label, lambda device: make(inputs.Draw(label, device), g, FAST, layout), g.name)


@pytest.mark.parametrize("one", SERVING, ids=lambda p: f"{p.op}-{p.pack}")
def test_a_provider_gives_what_its_op_gives(one: Any) -> None:
    made: set[str] = set()
    for kv_format in FORMATS:
        of = OfOnePack(one.pack, kv_format)
        for g in geometries(one, kv_format):
            for layout in LAYOUTS if g not in SMALL else inputs.SMALL_LAYOUTS:
                for kind, make in MAKERS[one.op].items():
                    check(one, of, case(one.op, kind, make, g, layout), config_of(g))
        made |= of.made
    assert set(one.calls) <= made, f"never called: {sorted(set(one.calls) - made)}"


@pytest.mark.parametrize("one", DECLINING, ids=lambda p: f"{p.op}-{p.pack}")
def test_a_provider_without_an_adapter_declines_the_released_model(one: Any) -> None:
    assert one.unless(V4_FLASH, EngineConfig(FAST, "bf16"), FAMILY)
    assert not any(True for kv_format in FORMATS for _ in geometries(one, kv_format))


def check(one: Any, of: OfOnePack, given: Case, config: ModelConfig) -> None:
    judged = judge_case(OPS[one.op], given, of, config)
    choice = next(c for c in of.choices if c.op == one.op)
    assert not [w for w in choice.passed_over if "failed on first use" in w], choice.passed_over
    assert choice.by == one.pack
    assert judged.how == "kernel"
    assert judged.status == "passed", f"{judged.label}: {judged.detail}"


def test_what_is_compared_is_every_op_that_has_a_provider() -> None:
    assert {p.op for p in ops.PROVIDERS} <= set(MAKERS) | {"hc_post_pre"}
