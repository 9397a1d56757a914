"""The choice among providers: order, reasons, what happens when one fails; and the table of them."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk.backend import Backend, EngineConfig, Kernel, bind
from v4sdk.numerics import EXACT, FAST, REFERENCE
from v4sdk.ops import OPS
from v4sdk.presets import V4_FLASH, V4_PRO
from v4sdk.testing.arguments import clone
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import Weight

ops = importlib.import_module("v4sdk_ascend.ops")
chip = importlib.import_module("v4sdk_ascend.chip")
contract = importlib.import_module("v4sdk_ascend.contract")
providers = importlib.import_module("v4sdk_ascend.providers")
compressor = importlib.import_module("v4sdk_ascend.providers.compressor")
BF16_ROWS = EngineConfig(FAST, "bf16")


def row(pack: str, function: Callable[..., Any], **more: Any) -> Any:
    """A provider of `rms_norm` that needs no call."""
    return providers.Provider("rms_norm", pack, (), providers.EVERYWHERE, function, **more)


def norm(to: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.ones(())


def broken(to: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    raise RuntimeError("EZ9999: inner\nerror")


def chosen(*rows: Any, engine: EngineConfig = BF16_ROWS) -> tuple[Any, Any, str | None]:
    kernels, choices = ops.choose(contract.Vendor(), "910B", rows)
    return kernels[0].function, choices[0], kernels[0].unless(V4_FLASH, engine)


ARGUMENTS = (torch.zeros(2, 4), torch.ones(4), 1e-6, torch.float32)


def test_the_first_provider_that_serves_is_taken_and_the_others_have_reasons() -> None:
    late = row("stock", norm, unless=lambda config, engine, family: "too many heads")
    elsewhere = replace(row("transformer", norm), chips=frozenset({"950"}))
    unknown = replace(row("vendorpack", norm), calls=("_C_ascend.npu_hc_post",))
    function, choice, why = chosen(
        elsewhere, unknown, late, replace(row("kernels", broken), function=OPS["rms_norm"])
    )
    assert why is None
    assert choice.by == "kernels"
    assert choice.passed_over == [
        "transformer: is for 950",
        "vendorpack: _C_ascend.npu_hc_post is not registered here",
        "stock: too many heads",
    ]
    assert torch.equal(function(*ARGUMENTS), torch.zeros(2, 4))


def test_nobody_is_a_reason_too() -> None:
    _, choice, why = chosen(
        row("stock", norm, unless=providers.rounded), engine=EngineConfig(EXACT, "float32")
    )
    assert why == "stock: numerics `exact` keeps activations that are wider than BF16"
    assert choice.by == "parts"


def test_a_provider_that_fails_on_first_use_gives_way_once(caplog: pytest.LogCaptureFixture) -> None:
    function, choice, _ = chosen(row("transformer", broken), row("stock", norm))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(function(*ARGUMENTS), torch.ones(()))
        assert torch.equal(function(*ARGUMENTS), torch.ones(()))
    assert [r.getMessage() for r in caplog.records] == [
        "rms_norm: transformer failed on first use, stock serves it from now on: RuntimeError: EZ9999: inner error"
    ]
    assert choice.by == "stock"
    assert choice.passed_over == ["transformer: failed on first use: RuntimeError: EZ9999: inner error"]


def test_without_another_provider_the_reference_runs() -> None:
    function, choice, _ = chosen(row("stock", broken))
    assert torch.equal(function(*ARGUMENTS), torch.zeros(2, 4))
    assert choice.by == "parts"


def test_a_provider_that_has_served_may_fail() -> None:
    calls = []

    def once(to: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("device lost")
        return x

    function, _, _ = chosen(row("transformer", once), row("stock", norm))
    function(*ARGUMENTS)
    with pytest.raises(RuntimeError, match="device lost"):
        function(*ARGUMENTS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        contract.ContractBroken("npu.npu_rms_norm is passed 4 positional"),
    ],
    ids=["memory", "memory-in-words", "contract"],
)
def test_what_no_other_provider_can_do_better_is_raised(error: Exception) -> None:
    def full(to: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        raise error

    function, choice, _ = chosen(row("transformer", full), row("stock", norm))
    with pytest.raises(type(error), match=str(error)):
        function(*ARGUMENTS)
    assert choice.by == "transformer"


def test_a_call_that_the_contract_does_not_name_is_a_fault_of_ours() -> None:
    vendor = contract.Vendor()
    with pytest.raises(contract.ContractBroken, match="npu.npu_nothing is called"):
        vendor.call("npu.npu_nothing")
    with pytest.raises(contract.ContractBroken, match="misspelt; its row of the contract names"):
        vendor.call("npu.npu_rms_norm", misspelt=1)


def test_a_decode_step_is_a_first_use_of_its_own() -> None:
    case = next(c for c in OPS["sparse_attn"].inputs() if c.label.startswith("swa-tiny-decode"))
    prompt = next(c for c in OPS["sparse_attn"].inputs() if c.label.startswith("swa-tiny-prefill"))

    def prompts_only(to: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["batch"].is_decode:
            raise RuntimeError("no graph")
        return kwargs["q"]

    one = providers.Provider("sparse_attn", "transformer", (), providers.EVERYWHERE, prompts_only)
    kernels, choices = ops.choose(contract.Vendor(), "910B", [one])
    assert kernels[0].unless(V4_FLASH, BF16_ROWS) is None
    kernels[0].function(**prompt.make(torch.device("cpu")))
    kernels[0].function(**case.make(torch.device("cpu")))
    assert choices[0].by == "parts"


def test_entries_are_a_first_use_of_their_own() -> None:
    def windows_only(to: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["entries"] is not None:
            raise RuntimeError("no entries")
        return kwargs["q"]

    one = providers.Provider("sparse_attn", "transformer", (), providers.EVERYWHERE, windows_only)
    kernels, choices = ops.choose(contract.Vendor(), "910B", [one])
    assert kernels[0].unless(V4_FLASH, BF16_ROWS) is None
    for kind, by in (("swa", "transformer"), ("csa", "parts")):
        case = next(c for c in OPS["sparse_attn"].inputs() if c.label.startswith(f"{kind}-tiny-decode"))
        kernels[0].function(**case.make(torch.device("cpu")))
        assert choices[0].by == by


def test_a_matrix_of_another_encoding_is_a_first_use_of_its_own() -> None:
    def floats_only(to: Any, x: Tensor, weight: Weight, numerics: Any, dtype: torch.dtype) -> Tensor:
        if weight.encoding != "float":
            raise RuntimeError("no kernel for these dtypes")
        return x

    one = providers.Provider("linear", "stock", (), providers.EVERYWHERE, floats_only)
    kernels, choices = ops.choose(contract.Vendor(), "910B", [one])
    assert kernels[0].unless(V4_FLASH, BF16_ROWS) is None
    x, matrix = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(8, 32)
    for weight, by in ((Weight(matrix), "stock"), (Weight(*pack_int8(matrix), "int8", (1, 32)), "parts")):
        kernels[0].function(x, weight, FAST, torch.float32)
        assert choices[0].by == by


def test_a_compressor_that_fails_late_leaves_the_state_to_the_next() -> None:
    case = next(c for c in OPS["compress"].inputs() if "tiny" in c.label and "fast" in c.label)
    given = case.make(torch.device("cpu"))
    for name in ("wkv", "wgate"):
        given[name] = Weight(given[name].dequantize().to(torch.bfloat16))
    wanted = clone(given)
    OPS["compress"](**wanted)

    class TooNarrow(contract.Vendor):  # type: ignore[name-defined, misc]
        def call(self, key: str, *args: Any, **kwargs: Any) -> Tensor:
            # what the kernel leaves behind where it succeeds, and a result that cannot be stored
            args[3].fill_(7.0)
            return torch.zeros(3, 5)

    one = providers.Provider("compress", "vendorpack", (), providers.EVERYWHERE, compressor.compress)
    kernels, choices = ops.choose(TooNarrow(), "910B", [one])
    assert kernels[0].unless(V4_FLASH, BF16_ROWS) is None
    kernels[0].function(**given)
    assert choices[0].by == "parts"
    for name in OPS["compress"].mutates:
        assert torch.equal(given[name], wanted[name]), name


@pytest.mark.parametrize("one", ops.PROVIDERS, ids=lambda p: f"{p.op}-{p.pack}-{min(p.chips)}")
def test_a_row_is_one_that_can_be_bound(one: Any) -> None:
    names = list(inspect.signature(one.function).parameters)
    assert names[one.pack != "kernels" :] == list(OPS[one.op].signature.parameters)
    for key in one.calls:
        call = contract.contract()[key]
        assert call.pack == one.pack
        assert call.use != "exchange"


def test_every_row_of_the_contract_has_a_provider_or_is_for_exchange() -> None:
    used = {key for one in ops.PROVIDERS for key in one.calls}
    assert used == {key for key, call in contract.contract().items() if call.use != "exchange"}
    served = {
        key for one in ops.PROVIDERS for key in one.calls
        if one.unless(V4_FLASH, BF16_ROWS, min(one.chips)) is None
    }  # fmt: skip
    assert served == {key for key, call in contract.contract().items() if call.use == "step"}


class Bound(Backend):
    name = "bound"

    def __init__(self, family: str) -> None:
        self.table, self.choices = ops.choose(contract.Vendor(), family, ops.PROVIDERS)

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> tuple[Kernel[Any, Any], ...]:
        return self.table


@pytest.mark.parametrize("family", chip.FAMILIES)
def test_without_a_vendor_every_op_runs_its_parts_with_a_reason(family: str) -> None:
    binding = bind(Bound(family), V4_FLASH, BF16_ROWS)
    without = {b.op: b.reason for b in binding.ops}
    assert "npu.npu_rms_norm is not registered here" in str(without["rms_norm"])
    assert not [b.op for b in binding.ops if b.how == "kernel"]


@pytest.mark.parametrize(
    ("op", "pack", "family", "config", "engine", "says"),
    [
        ("hc_pre", "transformer", "910B", replace(V4_FLASH, hc_mult=2), BF16_ROWS, "2 streams"),
        ("hc_pre", "vendorpack", "910B", V4_PRO, BF16_ROWS, "hidden size 7168"),
        ("hc_pre", "transformer", "910B", replace(V4_FLASH, hc_sinkhorn_iters=10), BF16_ROWS, "10 rounds"),
        ("sparse_attn", "transformer", "910B", V4_FLASH, EngineConfig(FAST, "native"), "stored as `native`"),
        ("sparse_attn", "transformer", "910B", replace(V4_FLASH, sliding_window=64), BF16_ROWS, "a window of 64"),
        ("sparse_attn", "vendorpack", "910B", V4_PRO, BF16_ROWS, "128 heads"),
        ("sparse_attn", "stock", "910B", replace(V4_FLASH, num_attention_heads=48), BF16_ROWS, "48 heads"),
        ("sparse_attn", "stock", "910B", V4_FLASH, EngineConfig(EXACT, "float32"), "numerics `exact`"),
        ("index_topk", "stock", "910B", V4_FLASH, EngineConfig(REFERENCE, "bf16"), "rounds scores to BF16"),
        ("index_topk", "stock", "950", replace(V4_FLASH, index_n_heads=20), BF16_ROWS, "20 index heads"),
        ("index_topk", "transformer", "910B", V4_FLASH, BF16_ROWS, "read every key of the context"),
        ("compress", "vendorpack", "910B", replace(V4_FLASH, hidden_size=256), BF16_ROWS, "hidden size 256"),
        ("compress", "transformer", "910C", V4_FLASH, BF16_ROWS, "a private name"),
        ("route", "vendorpack", "910B", replace(V4_FLASH, num_experts_per_tok=65), BF16_ROWS, "65 experts"),
        ("routed_experts", "stock", "910B", replace(V4_FLASH, moe_intermediate_size=96), BF16_ROWS, "96 wide"),
        ("routed_experts", "stock", "910B", V4_FLASH, EngineConfig(EXACT, "float32"), "wider than BF16"),
    ],
)  # fmt: skip
def test_a_provider_declines_in_words(
    op: str, pack: str, family: str, config: Any, engine: EngineConfig, says: str
) -> None:
    one = next(p for p in ops.PROVIDERS if (p.op, p.pack) == (op, pack) and family in p.chips)
    why = one.unless(config, engine, family)
    assert why is not None
    assert says in why
    assert one.op in ("compress", "index_topk") or one.unless(V4_FLASH, BF16_ROWS, family) is None


@pytest.mark.parametrize("by_name", [False, True], ids=["by-place", "by-name"])
def test_a_call_without_tokens_reaches_no_provider(by_name: bool) -> None:
    function, choice, _ = chosen(row("transformer", broken), row("stock", broken))
    given = dict(zip(("x", "weight", "eps", "dtype"), (torch.zeros(0, 4), *ARGUMENTS[1:]), strict=True))
    assert set(given) == set(OPS["rms_norm"].signature.parameters)
    made = function(**given) if by_name else function(*given.values())
    assert made.shape == (0, 4)
    assert choice.by == "transformer"
