"""What the adapters of vllm-ascend pass, dtype by dtype, against the kernels that lie prebuilt for 910B in its wheel.

The adapters run here as they are, on small inputs of their ops, with a recorder in the vendor's place: it computes nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk.ops import OPS

contract = importlib.import_module("v4sdk_ascend.contract").contract
providers = {
    name: importlib.import_module(f"v4sdk_ascend.providers.{name}")
    for name in ("compressor", "gate", "rotary", "streams", "window")
}

# registered op -> kernel of the tables, and what the kernel calls arguments that it names otherwise
KERNELS: dict[str, tuple[str, dict[str, str]]] = {
    "_C_ascend.npu_hc_pre_v2": ("hc_pre", {}),
    "_C_ascend.npu_hc_post": ("hc_post", {}),
    "_C_ascend.compressor": ("compressor", {}),
    "_C_ascend.npu_sparse_attn_sharedkv": ("sparse_attn_sharedkv", {}),
    "_C_ascend.moe_gating_top_k_hash": ("moe_gating_top_k_hash", {}),
    "_C_ascend.inplace_partial_rotary_mul": ("inplace_partial_rotary_mul", {"r1": "cos", "r2": "sin"}),
}
# runs on the chip's CPU cores, for which the wheel has one library and no table
WITHOUT_KERNEL = {"_C_ascend.npu_sparse_attn_sharedkv_metadata"}


class Recorder:
    """Takes calls in the vendor's place.

    Attributes:
        seen: key and dtypes of the tensors of each call, by the kernel's names.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []

    def __call__(self, key: str, *args: Any, **kwargs: Any) -> Any:
        row = contract()[key]
        named = {**dict(zip(row.positional, args, strict=False)), **kwargs}
        names = KERNELS[key][1] if key in KERNELS else {}
        tensors = {n: v for n, v in named.items() if isinstance(v, Tensor)}
        self.seen.append(
            (key, {names.get(n, n): str(v.dtype).removeprefix("torch.") for n, v in tensors.items()})
        )
        return getattr(self, f"_{row.name}")(named)

    def _npu_hc_pre_v2(self, a: dict[str, Any]) -> Any:
        x = a["x"]
        return x[:, 0], x.new_zeros(x.shape[:2]), x.new_zeros(*x.shape[:2], x.shape[1])

    def _npu_hc_post(self, a: dict[str, Any]) -> Any:
        return a["residual"]

    def _compressor(self, a: dict[str, Any]) -> Any:
        tokens, sequences = len(a["x"]), len(a["cu_seqlens"]) - 1
        return a["x"].new_zeros(min(tokens, tokens // a["cmp_ratio"] + sequences), len(a["norm_weight"]))

    def _npu_sparse_attn_sharedkv_metadata(self, a: dict[str, Any]) -> Any:
        return torch.zeros(1024, dtype=torch.int32)

    def _npu_sparse_attn_sharedkv(self, a: dict[str, Any]) -> Any:
        return a["q"], None

    def _moe_gating_top_k_hash(self, a: dict[str, Any]) -> Any:
        ids = torch.zeros(len(a["x"]), a["k"], dtype=torch.int32)
        return ids.float(), ids, None

    def _inplace_partial_rotary_mul(self, a: dict[str, Any]) -> None:
        return None


def inputs(op: str, step: str) -> Iterator[dict[str, Any]]:
    """Small inputs of an op as it runs by default, with BF16 cache rows."""
    for case in OPS[op].inputs():
        if case.scale == "tiny" and f"{step}-fast" in case.label:
            arguments = case.make(torch.device("cpu"))
            width = (
                len(arguments["norm"])
                if op == "compress"
                else arguments["q"].shape[-1]
                if op == "sparse_attn"
                else 0
            )
            for name in ("entries", "window", "kv"):
                if arguments.get(name) is not None:
                    arguments[name] = torch.zeros(*_rows(name, arguments), width, dtype=torch.bfloat16)
            yield arguments


def _rows(name: str, arguments: dict[str, Any]) -> tuple[int, ...]:
    """Rows of a cache, or of a prefill's rings and new rows, with the window of 128 that the pack knows."""
    batch, value = arguments["batch"], arguments[name]
    if name == "kv" and not batch.is_decode:
        return (128 * batch.num_sequences + batch.num_tokens,)
    return (value.shape[0], 128) if name == "window" else tuple(value.shape[:-1])


def trace(adapter: Callable[..., Any], op: str, step: str = "decode") -> list[tuple[str, dict[str, str]]]:
    to = Recorder()
    for arguments in inputs(op, step):
        adapter(to, **arguments)
    return to.seen


def attention(to: Any, **arguments: Any) -> Any:
    window = providers["window"]
    return window.sparse_attn(window.vendorpack, to, **arguments)


def rotation(to: Any) -> None:
    for shape in ((3, 8, 512), (3, 512)):
        providers["rotary"].vendorpack(
            to, torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(3, 64), False
        )


@pytest.fixture(scope="session")
def traced() -> list[tuple[str, dict[str, str]]]:
    """Every call of the pack that the adapters make."""
    streams, gate = providers["streams"], providers["gate"]
    to = Recorder()
    rotation(to)
    calls = [
        *to.seen, *trace(streams.vendorpack_pre, "hc_pre"), *trace(streams.vendorpack_post, "hc_post"),
        *trace(gate.route, "route"), *trace(gate.route_hash, "route_hash"),
    ]  # fmt: skip
    for step in ("decode", "prefill"):
        calls += trace(attention, "sparse_attn", step) + trace(
            providers["compressor"].compress, "compress", step
        )
    return calls


@pytest.fixture(scope="session")
def built(tables: tuple[Any, ...]) -> Any:
    table = next(t for t in tables if t.distribution == "vllm-ascend")
    return table.kernels["ascend910b"]


def test_every_call_has_a_kernel_for_its_dtypes(
    traced: list[tuple[str, dict[str, str]]], built: Any, say: Callable[[str], None]
) -> None:
    for key, dtypes in traced:
        if key not in WITHOUT_KERNEL:
            kernel = built[KERNELS[key][0]]
            assert kernel.accepts(dtypes), f"{key} is passed {dtypes}, and is built for {kernel.dtypes}"
    say(
        f"L6: {len(traced)} calls of {len({key for key, _ in traced})} ops of vllm-ascend have a prebuilt kernel for 910B"
    )


def test_all_rows_that_a_step_may_call_were_traced(traced: list[tuple[str, dict[str, str]]]) -> None:
    rows = {key for key, call in contract().items() if call.pack == "vendorpack" and call.use == "step"}
    assert {key for key, _ in traced} == rows == KERNELS.keys() | WITHOUT_KERNEL


@pytest.mark.parametrize("key", sorted(KERNELS))
def test_another_dtype_has_no_kernel(traced: list[tuple[str, dict[str, str]]], built: Any, key: str) -> None:
    kernel = built[KERNELS[key][0]]
    dtypes = next(d for k, d in traced if k == key)
    for name in dtypes:
        assert not kernel.accepts({**dtypes, name: "float64"}), name
    with pytest.raises(KeyError, match="no tensor misspelt"):
        kernel.accepts({**dtypes, "misspelt": "float32"})
