"""A forward of four layers of V4-Flash's shapes on tensors without memory, and the vendor calls it makes, as JSON.

`trace.py FAMILY PACK`: PACK is `stock`, or `transformer` or `vendorpack` beside it. 910B and 910C are traced on a fake `npu:0`,
where a tensor left on the host is an error; 950 on the meta device, since some of torch's own ops ask a device there. A prompt
step reads lengths on the host, which tensors without memory do not have: it is told them; a decode step is not.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from v4sdk.backend import Backend, EngineConfig, Kernel, bind
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST, KVFormat
from v4sdk.ops.batch import Batch, make_batch
from v4sdk.presets import V4_FLASH
from v4sdk.tensors import expected_tensors
from v4sdk.weight_formats import TORCH_DTYPES
from v4sdk.weights import ExpertWeights, Weight, WeightSource

contract = importlib.import_module("v4sdk_ascend.contract")
ops = importlib.import_module("v4sdk_ascend.ops")
layout = importlib.import_module("v4sdk_ascend.providers.layout")
policy = importlib.import_module("v4sdk_ascend.policy")

FOUR_LAYERS = replace(
    V4_FLASH, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), num_hash_layers=2, n_routed_experts=8, vocab_size=1024,
    num_nextn_predict_layers=0,
)  # fmt: skip
STARTS, NEW = (2500, 40), (130, 7)


class Traced(Backend):
    """Tensors on a device without memory, and the providers of one chip."""

    name = "traced"

    def __init__(self, family: str, device: torch.device, vendor: Any) -> None:
        self._kernels, self.choices = ops.choose(vendor, family, ops.PROVIDERS)
        self._device = device

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return self._device

    def kernels(self) -> tuple[Kernel[Any, Any], ...]:
        return self._kernels


class Unread(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, without memory."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._specs = {spec.name: spec for spec in expected_tensors(config)}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtypes[0]], device=self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def step(config: ModelConfig, device: torch.device, prompt: bool) -> tuple[Batch, dict[int, list[int]]]:
    """A step of two sequences, and what its tensors would hold."""
    positions = [s + i for s, n in zip(STARTS, NEW, strict=True) for i in range(n)] if prompt else [2630, 47]
    bounds = [0, NEW[0], sum(NEW)] if prompt else [0, 1, 2]
    values = {"positions": positions, "cu_seqlens": bounds, "slots": [0, 1]}
    made = {n: torch.empty(len(v), dtype=torch.int32, device=device) for n, v in values.items()}
    ids = torch.empty(len(positions), dtype=torch.int64, device=device)
    table = torch.empty(2, 3, dtype=torch.int32, device=device)
    batch = make_batch(ids, made["positions"], made["cu_seqlens"], made["slots"], table, 1024)
    return batch, {id(made[n]): v for n, v in values.items()}


class Valueless(TorchFunctionMode):
    """`torch.tensor` on a device without its values: it reaches for the device itself, past fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return torch.empty(made.shape, dtype=made.dtype, device=device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def told(values: dict[int, list[int]]) -> Iterator[None]:
    """While entered, `tolist` of the named tensors gives what they would hold."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Tensor, FakeTensor):

            def tolist(self: Tensor, before: Any = kind.tolist) -> Any:
                return values[id(self)] if id(self) in values else before(self)

            patch.setattr(kind, "tolist", tolist)
        yield


def trace(config: ModelConfig, family: str, fmt: KVFormat, vendor: Any, device: torch.device) -> Any:
    """Bind and run a prompt step, where cache rows are BF16, and a decode step; gives the choices made."""
    backend = Traced(family, device, vendor)
    binding = bind(backend, config, EngineConfig(FAST, fmt, {"family": family}))

    def weight(role: str, stored: Weight) -> Weight:
        return layout.mx_scales(stored)

    def experts(role: str, stored: ExpertWeights) -> ExpertWeights:
        return layout.experts(stored, device)

    source = WeightSource(Unread(config, device))
    model = V4Model(Binder(config, source, weight, experts), FAST, binding.table)
    kv = KVCache(config, fmt, device)
    rows = [kv.allocate(), kv.allocate()]
    for one in rows:
        kv.reserve(one, 3000)
    for prompt in (True, False) if fmt == "bf16" else (False,):
        batch, values = step(config, device, prompt)
        with told(values):
            hidden = model.forward(batch, kv)
        assert hidden.device == device, hidden.device
        logits = model.logits(hidden)
        assert logits.shape == (batch.num_tokens, config.vocab_size), logits.shape
    return backend.choices


def main(family: str, pack: str) -> None:
    importlib.import_module("v4sdk_ascend.probe").load()
    if pack != "stock":
        library = {"transformer": "cann_ops_transformer", "vendorpack": "_C_ascend"}[pack]
        importlib.import_module("v4sdk_ascend.testing.emulators").define(library)
    vendor, passed = contract.Vendor(), dict[str, set[str]]()

    def note(key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = contract.contract()[key].positional[: len(args)]
        passed.setdefault(key, set()).update(names, (n for n, v in kwargs.items() if v is not None))

    vendor.observers.append(note)
    native = family == "950"
    device = torch.device("meta") if native else torch.device("npu", 0)
    float_experts = replace(FOUR_LAYERS, expert_dtype=None, quantization=None)
    stored = FOUR_LAYERS if native else replace(float_experts, integers=policy.W8A8)
    runs = []
    with torch.no_grad(), contextlib.nullcontext() if native else FakeTensorMode(), Valueless():
        for config, fmt in (
            (stored, "bf16"),
            (float_experts, "bf16"),
            *([(stored, "native")] if native else []),
        ):
            choices = trace(config, family, fmt, vendor, device)
            runs.append({c.op: (c.by, c.passed_over) for c in choices})
    print(json.dumps({"passed": {k: sorted(v) for k, v in passed.items()}, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
