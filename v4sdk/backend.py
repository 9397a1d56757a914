"""What a backend is: where tensors live, which kernels it has, how weights are laid out; and the binding of kernels to ops."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.encodings import IntegerLayout
from v4sdk.errors import KernelMismatch, V4Error
from v4sdk.numerics import FAST, KV_FORMATS, KVFormat, Numerics
from v4sdk.ops import OPS
from v4sdk.ops.op import Op, OpTable, copy_out
from v4sdk.weights import ExpertWeights, Weight, stack

P = ParamSpec("P")
R = TypeVar("R")

# raised when a required member changes meaning; a plugin states the version it was written against
API_VERSION = 1

Evidence = Literal["reference", "schema", "meta", "emulated", "compiled", "device"]


@dataclass(frozen=True)
class EngineConfig:
    """What a run chose, as far as a kernel may care.

    Attributes:
        numerics: which roundings run. kv_format: how cache rows are stored.
        capability: facts of the device under the backend's own keys (an architecture name, a core count).
    """

    numerics: Numerics = FAST
    kv_format: KVFormat = "native"
    capability: Mapping[str, Any] = field(default_factory=dict)


Unless = Callable[[ModelConfig, EngineConfig], str | None]


@dataclass(frozen=True)
class Kernel(Generic[P, R]):
    """One row of a backend's table: an op, the function that serves it, and when it cannot.

    Attributes:
        unless: asked once at bind; None to serve, or the reason in words ("head_dim 512 > 256").
    """

    op: Op[P, R]
    function: Callable[P, R]
    unless: Unless | None = None


def kernel(op: Op[P, R], function: Callable[P, R], unless: Unless | None = None) -> Kernel[P, R]:
    """Make a table row; a type checker rejects a function whose signature differs from the op's."""
    return Kernel(op, function, unless)


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of the device's memory."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class DoctorRow:
    """One line of `v4sdk doctor`: what was looked at, what was found, whether it stands in the way, and the way out."""

    subject: str
    finding: str
    ok: bool
    hint: str | None = None


@dataclass(frozen=True)
class PagingUsage:
    """What the paging of experts has done since the model was loaded.

    Attributes:
        hits, misses: choices of an expert that was in memory, and that was not. evictions: experts dropped for others.
        read_bytes: of experts that were not in memory. read_s: spent waiting for them.
        resident_bytes: of experts in memory now, budget_bytes at most.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    resident_bytes: int = 0
    budget_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of choices that were in memory."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def disk_bytes_per_s(self) -> float:
        """How fast experts came while nothing else was done: the ceiling the disk sets."""
        return self.read_bytes / self.read_s if self.read_s else 0.0


class ExpertPaging(ABC):
    """Keeps a bounded part of the routed experts in memory and reads the others when they are chosen."""

    @abstractmethod
    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Lay out a weight that is no routed expert's, in place of `Backend.prepare_weight`: at no more bytes than stored."""

    @abstractmethod
    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Lay out the experts of one layer, in place of `Backend.prepare_experts`."""

    @abstractmethod
    def around(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give a `routed_experts` that has the chosen experts in memory when it calls `function`."""

    @abstractmethod
    def usage(self) -> PagingUsage:
        """What has happened so far."""


class Settling(ABC):
    """Copies mapped weights, once at load, into memory that kernels read faster. Tensors keep their addresses and values.

    Attributes:
        least_bytes: smaller files stay mapped.
        demanded_by: the setting that asks for it wherever it fits at all; None: where memory is plentiful.
    """

    least_bytes: int = 0
    demanded_by: str | None = None

    @abstractmethod
    def settle(self, files: Mapping[Path, Tensor], report: Callable[[int], None]) -> int:
        """Copy whole files, each given as its mapped bytes, to which nothing was written yet.

        Args:
            report: told how many bytes are done. What it raises, like Ctrl-C, leaves every file as it was or copied.

        Returns:
            Bytes copied. The first file that cannot be copied is logged; it and those after it stay mapped.
        """


class ExchangeBroken(Exception):
    """Rows could not be exchanged between ranks."""


class ExpertExchange(Protocol):
    """One rank's side of the routed experts of a layer, when they are spread over ranks. All ranks call it at the same point."""

    def run(
        self, u: Tensor, ids: Tensor, weights: Tensor, compute: Callable[[Tensor, Tensor, list[int], int], Tensor],
        back: torch.dtype, waves: int = 1, *, experts: ExpertWeights | None = None, tokens: int = 0,
    ) -> Tensor:  # fmt: skip
        """Compute the routed sum of the driver's tokens, which no other rank has.

        Args:
            compute: runs experts of this rank on rows [R, N] sorted by expert, with weights [R], rows per expert and the first
                of these experts within the rank. back: dtype in which single results travel. waves: see `Exchange`.
            experts: this rank's, in the layer that runs. tokens: T of the driver, known to every rank.

        Shapes:
            u [T, N], ids [T, K] int, weights [T, K] f32 -> [T, N] float32; T is 0 on every rank but the driver

        Raises:
            ExchangeBroken: if another rank is gone or too slow.
        """


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as far as an exchange needs them.

    Attributes:
        rank: of this process; 0 is the driver. bounds: rank j owns experts bounds[j] to bounds[j + 1].
        group: the group of torch.distributed that joins them; asked on every use and never kept.
        all_to_all: starts sending rows to each rank and returns what is waited for: (received, sent, received rows by rank, sent
            rows by rank). Raises `ExchangeBroken`, also on waiting.
    """

    rank: int
    bounds: tuple[int, ...]
    group: Callable[[], Any]
    all_to_all: Callable[[Tensor, Tensor, list[int], list[int]], Any]


class Backend(ABC):
    """A device's functions, memory and name. Three members are required, the others have defaults.

    Attributes:
        name: equals the entry-point name.
        api: the `API_VERSION` this backend was written against.
        priority: `auto` takes the available backend with the highest; 0 is the plain CPU.
        evidence: the strongest evidence this backend's results carry on this machine.
        pages_experts: whether `page_experts` works here.
        kv_formats: how its cache rows may be stored; the first is taken where the numerics' own is not among them.
        bf16_products: products of BF16 matrices give BF16, also where the parts of an op hand float32 on: of values that are then
            rounded to FP8 or FP4, some fall on another step, which conformance allows for.
        product_inputs: what products of quantised matrices round their inputs to; `float` where only numerics decide.
        software: distributions that compute for it, whose versions belong into every record.
        known_gaps: `op/case` to cause, for conformance cases known to fail; an unexpected pass is a failure.
    """

    name: str
    api: int = API_VERSION
    priority: int = 0
    evidence: Evidence = "reference"
    pages_experts: bool = False
    kv_formats: tuple[KVFormat, ...] = KV_FORMATS
    bf16_products: bool = False
    product_inputs: Literal["float", "int8", "fp8"] = "float"
    software: tuple[str, ...] = ()
    known_gaps: Mapping[str, str] = {}

    @abstractmethod
    def unavailable(self) -> str | None:
        """None if usable here, or the reason in words. Must not allocate on the device.

        Every installed backend is asked when they are listed: what another vendor's library would mind, wait for `open`.
        """

    def open(self) -> None:  # noqa: B027 - optional by contract, most have found everything by then
        """Load the vendor's libraries and find the device, once this backend was chosen (optional; may be called again).

        Raises:
            BackendUnavailable: it cannot run here: the reason alone, and the way out.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors live."""

    def check(self, config: ModelConfig, folder: Path) -> None:  # noqa: B027 - optional by contract
        """Refuse a checkpoint whose weights this device cannot compute with, before one is read (optional).

        Raises:
            CheckpointError: what it cannot compute with, and the command that makes a folder it can run.
        """

    def capability(self) -> Mapping[str, Any]:
        """Device facts handed to `unless` (optional)."""
        return {}

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        """The table; vendor imports happen here (optional)."""
        return ()

    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Lay a weight out for this device once, at load (optional; default: move it). `role` is the tensor's name."""
        return weight.to(self.device)

    def converted(self, role: str, weight: Weight) -> Weight:
        """A matrix as folders made for this device store it, see `convert_targets` (optional; default: as released).

        Conformance gives kernels such matrices. `role` is an op's parameter, `experts` for those of a routed expert.
        """
        return weight

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Lay the routed experts of one layer out (optional).

        By default they stay as mapped on the CPU, where only chosen ones are read from disk; on any other device they
        are moved and stacked, so that a decode step chooses among them without asking the host.
        """
        moved = experts.to(self.device)
        if self.device.type == "cpu" or not moved.w1:
            return moved
        return ExpertWeights(packed=(stack(moved.w1), stack(moved.w2), stack(moved.w3)))

    def exchange_experts(
        self, plain: ExpertExchange, ranks: Ranks, config: ModelConfig, engine: EngineConfig
    ) -> ExpertExchange:
        """Exchange rows between ranks by the device's own collectives (optional; default: `plain`, rows by all-to-all).

        Asked once on every rank, at the same point, when the ranks are connected; it may exchange with them.
        """
        return plain

    def page_experts(self, budget_bytes: int) -> ExpertPaging:
        """Page the routed experts of one model, at most `budget_bytes` of them in memory (optional, see `pages_experts`).

        Raises:
            V4Error: where `pages_experts` is false; such a backend is never asked while a model is loaded.
        """
        raise V4Error(
            f"backend `{self.name}` cannot page experts",
            hint="take a backend whose `pages_experts` is true, e.g. the host's",
        )

    def settling(self) -> Settling | None:
        """Copy mapped weights into faster memory at load (optional; None: they stay mapped)."""
        return None

    def place(self, tensor: Tensor) -> Tensor:
        """Bring a plain tensor to the device (optional)."""
        return tensor.to(self.device)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Give a function that replays a decode step from fixed buffers (optional; default: the step itself).

        What it gives may have an attribute `reason`: why, after its second call, it still runs the step itself; None where it
        replays. Nothing else tells the two apart, so benchmarks ask for it.
        """
        return step

    def close(self) -> None:  # noqa: B027 - optional by contract, most have nothing of their own
        """Let go of threads and buffers when a session closes; what another session needs is made again (optional)."""

    def hollow(self) -> AbstractContextManager[None] | None:
        """While entered, kernels do nothing, so that a benchmark sees the host's share of a step (optional; None: unknown)."""
        return None

    def with_threads(self, count: int) -> AbstractContextManager[None]:
        """While entered, kernels that run on the host use this many of its threads (optional; torch's own are not meant)."""
        return nullcontext()

    def variants(self, op: str) -> Mapping[str, Callable[..., Any]]:
        """Other ways to compute an op here, by name, for benchmarks that compare (optional; same signature as the op).

        `ours` is the backend's own kernel of an op whose kernel is the library of somebody else.
        """
        return {}

    def declined(self, op: str) -> Sequence[str]:
        """Libraries of others that have a function for an op and do not serve it here, each with the reason (optional)."""
        return ()

    def launches(self, step: Callable[[], object]) -> Mapping[str, int] | None:
        """Run a step and count the device's kernels it starts, by name (optional; None: unknown)."""
        return None

    def synchronize(self) -> None:  # noqa: B027 - optional by contract, a host has nothing to wait for
        """Wait for the device (optional)."""

    def memory(self) -> MemoryInfo | None:
        """Free and total memory of the device (optional; None: ask the operating system)."""
        return None

    def identity(self) -> Mapping[str, str | float] | None:
        """Name the accelerator (optional; None: the device is the host).

        Returns:
            `name`, `uuid`, `driver`, and `kernel_s`: seconds by the device's own clock of a small kernel it has just run.
        """
        return None

    def doctor(self) -> Sequence[DoctorRow]:
        """What a user needs to know about this device's software (optional)."""
        return ()

    def failure(self, error: RuntimeError) -> str | None:
        """What the device reported, in one line, if this exception came from it (optional; None: it did not)."""
        return None

    def device_test(self) -> Sequence[DoctorRow] | None:
        """Run the ops on the device against their references, in about a minute, and keep what was found (optional).

        Returns:
            What to show; a row that is not ok has failed. None: this backend has no such test.

        Raises:
            BackendUnavailable: there is no device here that could be tested.
        """
        return None

    def convert_targets(self) -> Mapping[str, IntegerLayout]:
        """Weight layouts that a checkpoint can be converted to for this device, by name (optional).

        Also asked where the device is absent: folders are often converted elsewhere.
        """
        return {}


@dataclass(frozen=True)
class BoundOp:
    """How one op runs: `kernel`, its `parts`, or the `reference`; and why not a kernel."""

    op: str
    how: Literal["kernel", "parts", "reference"]
    reason: str | None = None


@dataclass(frozen=True)
class Binding:
    """The functions of a run, and the report of how each was chosen."""

    table: OpTable
    ops: tuple[BoundOp, ...]

    @property
    def without_kernel(self) -> tuple[BoundOp, ...]:
        """Ops that run the reference, or parts of which no part has a kernel."""
        served = {b.op for b in self.ops if b.how == "kernel"}
        return tuple(
            b
            for b in self.ops
            if b.how == "reference"
            or (b.how == "parts" and not any(p.name in served for p in OPS[b.op].parts))
        )


def bind(backend: Backend, config: ModelConfig, engine: EngineConfig, strict: bool = False) -> Binding:
    """Choose a function for every op, once.

    A kernel is taken if its `unless` says nothing; a fused op without one becomes its parts, taken from the same table;
    else the reference runs on the device's tensors.

    Raises:
        KernelMismatch: the table cannot be read, a kernel's signature differs from its op's, an op has two kernels, the
            plugin was written for another API version, or `strict` and an op has no kernel.
    """
    if backend.api != API_VERSION:
        raise KernelMismatch(
            f"backend `{backend.name}` was written for backend API {backend.api}, this v4sdk has {API_VERSION}",
            hint="install a version of the plugin that matches, or another v4sdk",
        )
    kernels: dict[str, Kernel[Any, Any]] = {}
    for row in _rows(backend):
        _check_signature(backend.name, row)
        if row.op.name in kernels:
            raise KernelMismatch(
                f"backend `{backend.name}` has two kernels for op `{row.op.name}`, expected one"
            )
        kernels[row.op.name] = row
    table = OpTable({})
    report = []
    for op in OPS.values():
        found = kernels.get(op.name)
        reason = "no kernel" if found is None else _declined(found, config, engine)
        if found is not None and reason is None:
            table.set(op.name, _with_out(found.function))
            report.append(BoundOp(op.name, "kernel"))
        elif op.parts:
            table.set(op.name, _with_out(op.build(table)))
            report.append(BoundOp(op.name, "parts", reason))
        else:
            table.set(op.name, op)
            report.append(BoundOp(op.name, "reference", reason))
    binding = Binding(table, tuple(report))
    if strict and binding.without_kernel:
        names = ", ".join(f"{b.op} ({b.reason})" for b in binding.without_kernel)
        raise KernelMismatch(
            f"backend `{backend.name}` has no kernel for {len(binding.without_kernel)} of {len(OPS)} ops: {names}",
            hint="leave out --strict to run their references",
        )
    return binding


def _rows(backend: Backend) -> list[Kernel[Any, Any]]:
    rows: list[Any]
    try:
        rows = list(backend.kernels())
    except V4Error:
        raise
    except Exception as exc:  # a plugin's imports run here, whatever they do
        raise KernelMismatch(
            f"backend `{backend.name}` cannot list its kernels: {type(exc).__name__}: {exc}",
            hint="run `v4sdk doctor`, or choose another backend with --backend",
        ) from exc
    for row in rows:
        if not isinstance(row, Kernel) or row.op.name not in OPS:
            listed = f"op `{row.op.name}`" if isinstance(row, Kernel) else f"a {type(row).__name__}"
            raise KernelMismatch(
                f"backend `{backend.name}` lists {listed}, expected kernels of ops in `v4sdk.ops.OPS`"
            )
    return rows


def _declined(row: Kernel[Any, Any], config: ModelConfig, engine: EngineConfig) -> str | None:
    if row.unless is None:
        return None
    try:
        return row.unless(config, engine)
    except Exception as exc:  # a plugin's mistake must not take the run down; it is reported with the op
        return f"its `unless` failed: {type(exc).__name__}: {exc}"


def _check_signature(backend: str, row: Kernel[Any, Any]) -> None:
    want = list(row.op.signature.parameters)
    got = [name for name in inspect.signature(row.function).parameters if name != "out"]
    if got != want:
        raise KernelMismatch(
            f"backend `{backend}`: kernel `{row.op.name}` takes ({', '.join(got)}), expected ({', '.join(want)})"
        )


def _with_out(function: Callable[..., Any]) -> Callable[..., Any]:
    if "out" in inspect.signature(function).parameters:
        return function

    def run(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result if out is None else copy_out(out, result)

    return run
