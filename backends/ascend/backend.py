"""The Ascend backend: functions of Huawei's and others' packs on the current NPU where they serve, else parts on its tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from v4sdk.backend import (
    Backend,
    DoctorRow,
    EngineConfig,
    Evidence,
    ExpertExchange,
    Kernel,
    MemoryInfo,
    Ranks,
)
from v4sdk.config import ModelConfig
from v4sdk.encodings import IntegerLayout
from v4sdk.errors import BackendUnavailable, CheckpointError
from v4sdk.numerics import KV_FORMATS, KVFormat
from v4sdk.ops import OPS
from v4sdk.ops.op import REFERENCES
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import ExpertWeights, Weight

from . import packs, policy, probe, results
from .contract import Vendor
from .doctor import device_rows, evidence_rows, machine_rows, op_rows, pack_rows, planned_rows, roofline_rows
from .graph import RecordedStep
from .identity import identity, uuid
from .ops import PROVIDERS, Choice, choose
from .providers import layout
from .verdict import refusal, verdict

log = logging.getLogger("v4sdk")

# how torch_npu and CANN mark what they raise: a process and a device, codes of a layer, names of their own functions
_OF_DEVICE = re.compile(r"\(PID:\d+, Device:|\bERR\d{5}\b|\bE[A-Z]\d{4}\b|\bacl(nn|rt|mdl|op)\w*")
_CODE = re.compile(r"\b(?:E[A-Z]\d{4}|ERR\d{5})\b")


class AscendBackend(Backend):
    """Tensors in the memory of the current Huawei Ascend NPU; with V4SDK_ASCEND_EMULATE=1 in main memory."""

    name = "ascend"
    # below the CPU until its functions were measured on a device: `auto` must not choose it before
    priority = -1
    bf16_products = True
    software = ("torch-npu",)

    def __init__(self) -> None:
        self._npu: probe.Device | None = None
        self.vendor = Vendor()
        # packs of functions that are installed, and why one cannot be loaded
        self.packs: Mapping[str, str | None] = {}
        # who serves which op, once the table was asked for
        self.choices: tuple[Choice, ...] = ()

    @cached_property
    def machine(self) -> probe.Machine:
        """What looking shows."""
        return probe.look()

    @property
    def npu(self) -> probe.Device:
        """The NPU in use, found on first use.

        Raises:
            BackendUnavailable: there is none that can be used.
        """
        self.open()
        assert self._npu is not None
        return self._npu

    def unavailable(self) -> str | None:
        """Look at files, environment and metadata; torch_npu is not imported, so that listing this backend is free."""
        refused = refusal(self.machine)
        return refused.reason if refused else None

    def open(self) -> None:
        """Import torch_npu, where looking says that it can be used, and ask it for the NPU."""
        if self._npu is not None:
            return
        refused = refusal(self.machine)
        if refused is not None:
            raise BackendUnavailable(refused.reason, hint=refused.hint)
        packs.prepare()
        npu = probe.load()
        if self.machine.emulates:
            probe.emulate()
        else:
            self.packs = packs.load()
        self._npu = probe.find(npu, self.machine.emulates)
        log.info("%s: %s", self._npu.name, verdict(self._npu))

    @property
    def evidence(self) -> Evidence:  # type: ignore[override]
        """`emulated` where the CPU computes; `device` where a device test of this very machine passed; else `schema`."""
        if self.machine.emulates:
            return "emulated"
        tested = self.tested if self._npu is not None else None
        return "device" if isinstance(tested, results.Result) and tested.ok else "schema"

    @property
    def tested(self) -> results.Result | str | None:
        """The device test that was made here; the reason in words where there is one that does not count, None without one."""
        found = results.read(results.path())
        if not isinstance(found, results.Result):
            return found
        why = found.why_not_here(self.npu, self.machine, self.number)
        return f"{results.path()} was {why}" if why else found

    @cached_property
    def number(self) -> str | None:
        """UUID of the NPU in use; None where nothing says it."""
        return uuid(torch.get_device_module("npu"), self.npu.index)

    @property
    def kv_formats(self) -> tuple[KVFormat, ...]:  # type: ignore[override]
        """Rows of the native layout are FP8, which of these chips only the 950 has; an unknown chip keeps BF16 too."""
        family = self._npu.family if self._npu else "950"
        kept: KVFormat = policy.POLICIES[family].kv_format if family else "bf16"
        return KV_FORMATS if kept == "native" else (kept, "float32")

    @property
    def device(self) -> torch.device:
        """The current NPU; main memory where it is emulated."""
        found = self.npu
        return torch.device("cpu") if self.machine.emulates else torch.device("npu", found.index)

    @property
    def product_inputs(self) -> Literal["float", "int8", "fp8"]:  # type: ignore[override]
        """Integer products round their inputs to int8, those of FP8 and FP4 to FP8."""
        family = self._npu.family if self._npu else None
        return policy.POLICIES[family].activations if family else "float"

    def capability(self) -> Mapping[str, Any]:
        """Family and SoC code of the chip; empty while torch_npu is not loaded."""
        if self._npu is None:
            return {}
        return {"family": self._npu.family, "soc": self._npu.code, "emulated": self.machine.emulates}

    def check(self, config: ModelConfig, folder: Path) -> None:
        """Refuse a checkpoint whose matrices this chip has no products of."""
        family = self.npu.family
        refused = policy.refusal(config, family) if family else None
        if refused is not None:
            reason, way_out = refused
            raise CheckpointError(reason, hint=way_out.replace("SOURCE", str(folder)))

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        """The table: per op the first provider that the dispatcher, the chip and the model's shapes admit."""
        if self._npu is None:
            ops = [OPS[name] for name in OPS if name in {p.op for p in PROVIDERS}]
            return tuple(Kernel(op, op.build(REFERENCES), _unopened) for op in ops)
        if self._npu.family is None:
            log.warning("%s", verdict(self._npu))
            return ()
        rows, self.choices = choose(self.vendor, self._npu.family, PROVIDERS)
        return rows

    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Lay a matrix out as this chip reads it; what it cannot read is refused, with the command that converts it."""
        self._refuse(role, weight)
        return (layout.mx_scales(weight) if self.npu.family == "950" else weight).to(self.device)

    def _refuse(self, role: str, weight: Weight) -> None:
        family = self.npu.family
        if family is not None and weight.encoding not in policy.POLICIES[family].encodings:
            raise CheckpointError(
                f"`{role}` is {weight.encoding}, of which {family} has no products",
                hint="v4sdk convert makes a folder that it runs, see v4sdk convert --help",
            )

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Stack the experts of one layer in the device's memory, as its grouped products read them."""
        for weight in (*experts.w1, *experts.w2, *experts.w3, *(experts.packed or ())):
            self._refuse(role, weight)
        return layout.experts(experts, self.device)

    def exchange_experts(
        self, plain: ExpertExchange, ranks: Ranks, config: ModelConfig, engine: EngineConfig
    ) -> ExpertExchange:
        """Exchange by the vendor's collectives where they and the model's shapes admit it, else rows by all-to-all over HCCL."""
        from .ep import join

        family = self.npu.family
        if family is None or self.machine.emulates:
            return plain
        return join(self.vendor, family, self.device, plain, ranks, config, engine)

    def convert_targets(self) -> Mapping[str, IntegerLayout]:
        """Layouts of folders for the chips that have integer products only."""
        return policy.LAYOUTS

    def converted(self, role: str, weight: Weight) -> Weight:
        """A matrix as the default layout for this chip stores it; where the chip takes released ones, as it is."""
        family = self.npu.family
        layouts = policy.POLICIES[family].layouts if family else ()
        if not layouts or weight.encoding not in ("fp8", "fp4"):
            return weight
        place = "ffn.experts.0.w1" if role == "experts" else role
        part = "ffn.shared_experts" if role in ("w1", "w2", "w3") else "attn"
        name = f"layers.0.{place}" if role == "experts" else f"layers.0.{part}.{place}"
        values = weight.dequantize()
        if policy.LAYOUTS[layouts[0]].encoding(name) == "float":
            return Weight(values.to(torch.bfloat16))
        data, scale = pack_int8(values)
        return Weight(data, scale, "int8", (1, weight.in_features))

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture a step as an ACL graph, after the first run of it."""
        return (
            step if self.machine.emulates else RecordedStep(step, torch.get_device_module("npu"), self._pool)
        )

    @cached_property
    def _pool(self) -> Any:
        # one recorded step follows another when a page is full: the next takes over the memory of the last
        return torch.get_device_module("npu").graph_pool_handle()

    def synchronize(self) -> None:
        """Wait for the NPU."""
        if not self.machine.emulates:
            torch.get_device_module("npu").synchronize()

    def close(self) -> None:
        """Give cached memory back to the driver."""
        if self._npu is not None and not self.machine.emulates:
            torch.get_device_module("npu").empty_cache()

    def memory(self) -> MemoryInfo | None:
        """Free and total memory of the NPU, by the driver."""
        if self.machine.emulates:
            return None
        self.open()
        free, total = torch.get_device_module("npu").mem_get_info()
        return MemoryInfo(free, total)

    def identity(self) -> Mapping[str, str | float] | None:
        """The NPU by name, UUID, driver and versions, and the time of a small kernel by its own clock."""
        return None if self.machine.emulates else identity(self.npu, self.machine)

    def failure(self, error: RuntimeError) -> str | None:
        """The first line of what CANN or torch_npu raised, with the code that their documents explain."""
        text = str(error)
        if _OF_DEVICE.search(text) is None:
            return None
        first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        code = _CODE.search(text)
        return f"{first} ({code[0]})" if code and code[0] not in first else first

    def doctor(self) -> Sequence[DoctorRow]:
        """Versions, driver, NPU; who serves each op, why others do not, and on what evidence; what a model of the chip says."""
        rows = machine_rows(self.machine)
        if self._npu is None:
            return (*rows, *planned_rows(PROVIDERS, self.evidence))
        from .device_test import bound

        bound(self)
        tested = None if self.machine.emulates else self.tested
        shown = tested if isinstance(tested, results.Result) else None
        evidence: Evidence = "emulated" if self.machine.emulates else "schema"
        return (
            *rows, *device_rows(self._npu, self.machine), *pack_rows(self.packs), *op_rows(self.choices, evidence, shown),
            *evidence_rows(self.evidence, tested), *roofline_rows(self._npu),
        )  # fmt: skip

    def device_test(self) -> Sequence[DoctorRow]:
        """Every op by its provider against the reference, and a replayed decode step; keeps the result for `evidence`."""
        from .device_test import run

        return run(self)


def _unopened(config: ModelConfig, engine: EngineConfig) -> str | None:
    return "torch_npu is loaded only where this backend is chosen by name"
