"""What each provider computes over emulated vendor calls, against the reference of its op; the vendor's wheel is not needed.

The emulators come from the vendor's documents, so this holds the adapters' layouts and arguments against both sides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from v4sdk.backend import EngineConfig
from v4sdk.numerics import FAST
from v4sdk.ops import OPS, inputs
from v4sdk.ops.op import REFERENCES, Tolerance
from v4sdk.ops.rows import load_index, load_kv
from v4sdk.presets import V4_FLASH
from v4sdk.testing.compare import compare
from v4sdk.weights import ExpertWeights, Weight, stack

contract = importlib.import_module("v4sdk_ascend.contract")
layout = importlib.import_module("v4sdk_ascend.providers.layout")
ops = importlib.import_module("v4sdk_ascend.ops")
providers = importlib.import_module("v4sdk_ascend.providers")

CPU = torch.device("cpu")
# the dispatcher gives dtypes to int arguments as their numbers
NUMBERS = {
    torch.int8: 1,
    torch.int32: 3,
    torch.float16: 5,
    torch.float32: 6,
    torch.bfloat16: 15,
    torch.float8_e4m3fn: 24,
}
# FP8 rows and codes: a value at a boundary between two steps may fall on the other one
STEPS = 0.03
Calls = tuple[Any, set[str]]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, socs: Mapping[str, str]) -> Callable[[str], Calls]:
    """What a provider on a family works through, its calls reaching the emulators as plain functions; and the keys it called."""
    listed = importlib.import_module("v4sdk_ascend.testing.emulators").EMULATORS
    soc = importlib.import_module("v4sdk_ascend.testing.stub").SOC

    def calls(family: str) -> Calls:
        monkeypatch.setenv(soc, socs[family])
        made: set[str] = set()

        class Direct(contract.Vendor):  # type: ignore[name-defined, misc]
            def call(self, key: str, *args: Any, **kwargs: Any) -> Any:
                row = contract.contract()[key]
                assert set(kwargs) <= set(row.arguments(family)[len(args) :])
                made.add(key)
                numbers = {n: NUMBERS[v] if isinstance(v, torch.dtype) else v for n, v in kwargs.items()}
                return listed[row.namespace, row.name](*args, **numbers)

        return providers.Calls(Direct(), REFERENCES, family), made

    return calls


def serving(op: str) -> list[Any]:
    """Every provider of an op that is ever taken, with a family."""
    found = []
    for one in ops.PROVIDERS:
        declined = any(contract.contract()[key].use == "declined" for key in one.calls)
        if one.op == op and one.calls and not declined:
            found += [pytest.param(one, family, id=f"{one.pack}-{family}") for family in sorted(one.chips)]
    return found


def arguments(op: str, label: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a case twice, since some are written to; cache rows as BF16."""
    case = next(c for c in OPS[op].inputs() if c.label == label)
    return _bf16_rows(case.make(CPU)), _bf16_rows(case.make(CPU))


def _bf16_rows(made: dict[str, Any]) -> dict[str, Any]:
    for name in ("window", "entries", "keys"):
        rows = made.get(name)
        if rows is not None and rows.dtype == torch.uint8:
            load = (
                load_index(rows, 128)
                if name == "keys" or made.get("is_index")
                else load_kv(rows, rows.shape[-1] - 72, 64)
            )
            # rows that nobody wrote hold any bits
            made[name] = load.nan_to_num(0.0, 0.0, 0.0).to(torch.bfloat16)
    return made


def agree(op: str, got: Any, want: Any, limit: Tolerance | None = None) -> None:
    """Result by result, within the op's own tolerance."""
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, e in pairs:
        tolerance = limit or OPS[op].kept_roundings.get(e.dtype) or OPS[op].tolerances[e.dtype]
        found = compare(a, e, tolerance)
        assert found.ok, (found.max_abs, found.worst, found.problem)


@pytest.mark.parametrize("label", ["tiny-prefill-fast", "tiny-decode-reference", "wide-chunk-fast"])
@pytest.mark.parametrize(
    "op", ["rms_norm", "hc_pre", "hc_post", "q_project", "index_query", "grouped_out", "shared_expert"]
)
def test_projections_streams_and_norms(op: str, label: str, emulated: Callable[[str], Calls]) -> None:
    tried = [p.values for p in serving(op) if not (p.values[0].pack == "vendorpack" and op.startswith("hc_"))]
    assert tried
    for one, family in tried:
        to, made = emulated(family)
        a, b = arguments(op, label)
        agree(op, one.function(to, **a), OPS[op](**b))
        assert made == set(one.calls)


STREAMS = [p for op in ("hc_pre", "hc_post") for p in serving(op) if p.values[0].pack == "vendorpack"]


@pytest.mark.parametrize(("one", "family"), STREAMS)
def test_streams_of_4096_by_the_pack_that_knows_no_other(
    one: Any, family: str, emulated: Callable[[str], Calls]
) -> None:
    make = inputs.hc_pre if one.op == "hc_pre" else inputs.hc_post
    a = make(inputs.Draw("wide", CPU), inputs.FLASH, FAST, inputs.CHUNK)
    to, made = emulated(family)
    agree(one.op, one.function(to, **a), OPS[one.op](**a))
    assert made == set(one.calls)


@pytest.mark.parametrize(("one", "family"), serving("kv_project_store"))
def test_new_rows_and_the_ring_they_go_to(one: Any, family: str, emulated: Callable[[str], Calls]) -> None:
    to, made = emulated(family)
    for label in ("tiny-chunk-fast", "tiny-decode-fast"):
        a, b = arguments("kv_project_store", label)
        agree("kv_project_store", one.function(to, **a), OPS["kv_project_store"](**b))
        agree("kv_project_store", a["window"], b["window"])
    assert made == set(one.calls)


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
@pytest.mark.parametrize("steps", [inputs.DECODE, inputs.CHUNK], ids=lambda s: s.name)
@pytest.mark.parametrize(("one", "family"), serving("sparse_attn"))
def test_attention(one: Any, family: str, steps: Any, kind: str, emulated: Callable[[str], Calls]) -> None:
    made = inputs.sparse_attn(kind)(inputs.Draw(f"{kind}-{steps.name}", CPU), inputs.FLASH, FAST, steps)
    # a ring is full of rows; those that a sequence has not reached yet must not be seen
    a = _bf16_rows(made)
    to, called = emulated(family)
    agree("sparse_attn", one.function(to, **a), OPS["sparse_attn"](**a))
    assert called == set(one.calls)


def test_attention_over_native_rows_by_torch_npu(emulated: Callable[[str], Calls]) -> None:
    one = next(p.values[0] for p in serving("sparse_attn") if p.id == "stock-950")
    a = inputs.sparse_attn("hca")(inputs.Draw("native", CPU), inputs.FLASH, FAST, inputs.DECODE)
    assert a["window"].dtype == torch.uint8
    agree("sparse_attn", one.function(emulated("950")[0], **a), OPS["sparse_attn"](**a))


@pytest.mark.parametrize("kind", ["csa", "index", "hca"])
@pytest.mark.parametrize("steps", [inputs.PREFILL, inputs.CHUNK, inputs.DECODE], ids=lambda s: s.name)
@pytest.mark.parametrize(("one", "family"), serving("compress"))
def test_compression(one: Any, family: str, steps: Any, kind: str, emulated: Callable[[str], Calls]) -> None:
    def make() -> dict[str, Any]:
        ratio = 128 if kind == "hca" else 4
        draw = inputs.Draw(f"{kind}-{steps.name}", CPU)
        return _bf16_rows(inputs.compress(ratio, kind == "index")(draw, inputs.FLASH, FAST, steps))

    a, b = make(), make()
    to, called = emulated(family)
    one.function(to, **a)
    OPS["compress"](**b)
    # the last slot is scratch
    agree(
        "compress", a["state"][:-1], b["state"][:-1], Tolerance(2e-4, 2e-4, "float32 sums of 4096 products")
    )
    # the pages of a test end in scratch, which takes what completes no block
    written, wanted = a["entries"][:-1].float(), b["entries"][:-1].float()
    assert float((written != wanted).float().mean()) <= STEPS
    assert bool((written != make()["entries"][:-1].float()).any()) == bool(
        (wanted != make()["entries"][:-1].float()).any()
    )
    assert called == set(one.calls)


@pytest.mark.parametrize("steps", [inputs.LONG_DECODE, inputs.CHUNK], ids=lambda s: s.name)
@pytest.mark.parametrize(("one", "family"), serving("index_topk"))
def test_picks(one: Any, family: str, steps: Any, emulated: Callable[[str], Calls]) -> None:
    a = _bf16_rows(inputs.index_topk(inputs.Draw(steps.name, CPU), inputs.FLASH, FAST, steps))
    # head weights in BF16 on both sides: what is compared is which entries were scored, not the rounding
    a["w"] = a["w"].to(torch.bfloat16).float()
    to, called = emulated(family)
    got, want = one.function(to, **a), OPS["index_topk"](**a)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    shared = [
        len(set(g.tolist()) & set(w.tolist())) / len(set(w.tolist())) for g, w in zip(got, want, strict=True)
    ]
    assert sum(shared) / len(shared) > 0.998
    absent = torch.where(got < 0, torch.iinfo(torch.int32).max, got)
    assert bool((absent[:, 1:] >= absent[:, :-1]).all())
    assert torch.equal((got >= 0).sum(-1), (want >= 0).sum(-1))
    assert called == set(one.calls)


@pytest.mark.parametrize("op", ["route", "route_hash"])
def test_routing(op: str, emulated: Callable[[str], Calls]) -> None:
    for one, family in (p.values for p in serving(op)):
        to, called = emulated(family)
        for label in ("tiny-prefill-fast", "wide-chunk-fast"):
            a, b = arguments(op, label)
            (ids, weights), (want_ids, want_weights) = one.function(to, **a), OPS[op](**b)
            assert torch.equal(ids, want_ids)
            torch.testing.assert_close(weights, want_weights, atol=2e-5, rtol=2e-5)
        assert called == set(one.calls)


def matrix(encoding: str, rows: int, columns: int, draw: Any) -> Weight:
    if encoding != "int8":
        weight: Weight = draw.weight(encoding, rows, columns)
        return weight
    values = draw.normal(rows, columns, scale=columns**-0.5)
    scale = values.abs().amax(1, keepdim=True) / 127
    return Weight((values / scale).round().to(torch.int8), scale, "int8", (1, columns))


# relative to the whole result: inputs rounded to int8 or FP8 before each product, or BF16 results of each
EXPERTS = [("float", "910B", 1e-2), ("float", "950", 1e-2), ("int8", "910C", 3e-2), ("fp4", "950", 9e-2)]


@pytest.mark.parametrize(("encoding", "family", "limit"), EXPERTS)
def test_routed_experts(encoding: str, family: str, limit: float, emulated: Callable[[str], Calls]) -> None:
    one = next(p.values[0] for p in serving("routed_experts") if p.values[1] == family)
    draw = inputs.Draw("experts", CPU)
    shapes = ((128, 256), (256, 128), (128, 256))
    experts = ExpertWeights(*(tuple(matrix(encoding, *s, draw) for _ in range(8)) for s in shapes))
    u, weights = draw.normal(9, 256, dtype=torch.bfloat16), draw.normal(9, 3).abs() + 0.1
    # the last two tokens ask for one expert twice, or all for the same
    ids = torch.tensor(
        [*[[(3 * t + k) % 8 for k in range(3)] for t in range(7)], [5, 1, 5], [2, 2, 2]], dtype=torch.int32
    )
    want = OPS["routed_experts"](u, ids, weights, experts, 1.0, FAST)
    to, called = emulated(family)
    plain = ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))
    for packed in (layout.experts(experts, CPU), plain):
        got = one.function(to, u, ids, weights, packed, 1.0, FAST)
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < limit
    named = {"npu.npu_moe_init_routing_v2", "npu.npu_grouped_matmul", "npu.npu_moe_finalize_routing"}
    gated = {
        "int8": {"npu.npu_dequant_swiglu_quant"},
        "fp4": {"npu.npu_clipped_swiglu", "npu.npu_dynamic_mx_quant"},
    }
    assert called == named | gated.get(encoding, {"npu.npu_clipped_swiglu"})


@pytest.mark.parametrize(("encoding", "family", "limit"), [("int8", "910B", 2e-2), ("fp8", "950", 5e-2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(
    encoding: str, family: str, limit: float, dtype: torch.dtype, emulated: Callable[[str], Calls]
) -> None:
    one = next(p.values[0] for p in serving("linear") if p.values[1] == family)
    draw = inputs.Draw("linear", CPU)
    weight = matrix(encoding, 384, 256, draw)
    laid_out = layout.mx_scales(weight)
    assert torch.equal(laid_out.dequantize(), weight.dequantize())
    x = draw.normal(5, 256, dtype=torch.bfloat16)
    to, called = emulated(family)
    got, want = one.function(to, x, laid_out, FAST, dtype), OPS["linear"](x, weight, FAST, dtype)
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < limit
    assert called == set(one.calls)
    # in the reference's numerics the inputs of FP8 products are rounded as the reference does, so no call is made
    if encoding == "fp8":
        called.clear()
        one.function(to, x, laid_out, replace(FAST, q8_gemm_input=True), dtype)
        assert not called


@pytest.mark.parametrize(("name", "declined"), [("W8A8", False), ("W4A8", True)])
def test_int4_experts_are_left_to_the_reference_and_said_so(name: str, declined: bool) -> None:
    integers = getattr(importlib.import_module("v4sdk_ascend.policy"), name)
    config = replace(V4_FLASH, quantization=None, expert_dtype=None, integers=integers)
    one = next(p.values[0] for p in serving("routed_experts") if p.values[1] == "910B")
    said = one.unless(config, EngineConfig(FAST, "bf16"), "910B")
    assert (said is not None and "int4" in said) is declined
