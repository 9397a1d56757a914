"""Op cases made ready for timing: which ones, whether they are right, their arguments, what they must move and compute.

The cases are the ops' own (`Op.inputs`), so what is timed is what conformance compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import Backend, Binding, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.numerics import FAST, Numerics
from v4sdk.ops import OPS
from v4sdk.ops.op import Case, Cost, Op
from v4sdk.presets import V4_FLASH, V4_PRO
from v4sdk.testing import CaseResult, judge_case
from v4sdk.testing.arguments import clone, on_backend, tensors
from v4sdk_bench.speed.ceilings import free_bytes, last_level_cache_bytes
from v4sdk_bench.speed.timing import Paired, device_seconds, paired

REAL = {"flash": V4_FLASH, "pro": V4_PRO}
# drawing, cloning and comparing arguments takes far longer than the op itself
QUICK_LIMIT_BYTES = 150_000_000
# conformance holds the drawn arguments, the reference's, the kernel's and their copies
_COPIES = 5
_QUICK_LAYOUTS = ("decode", "prefill")


class NotTimed(Exception):
    """A case is left out, for the reason given."""


@dataclass(frozen=True)
class OpCase:
    """A case and its op."""

    op: Op[..., Any]
    case: Case

    @property
    def label(self) -> str:
        """`op/case`."""
        return f"{self.op.name}/{self.case.label}"

    @property
    def real(self) -> bool:
        """Of the released models' sizes."""
        return self.case.scale in REAL

    def config(self, own: ModelConfig) -> ModelConfig:
        """The model a kernel is asked about: the one whose sizes these are, or `own`."""
        return REAL.get(self.case.scale, own)


def chosen(quick: bool, ops: Sequence[str] | None = None) -> list[OpCase]:
    """Cases to time, by op and in the ops' own order.

    Quick: of the default numerics, one decode and one prefill step of the tiny and the odd sizes, and the decode step of Flash.
    Otherwise all layouts of the default numerics, Pro too.
    """
    found = []
    for op in OPS.values():
        if ops is None or op.name in ops:
            found += [
                OpCase(op, case) for case in (op.inputs() if op.inputs else ()) if _wanted(op, case, quick)
            ]
    return found


def _wanted(op: Op[..., Any], case: Case, quick: bool) -> bool:
    if case.scale == "edge" or "ties" in case.label:
        return False
    # ops without numerics of their own name none either
    names = case.label.split("-")
    if names[-1] not in ("fast", "exact", "reference"):
        return not quick or case.scale in ("tiny", "odd", "flash")
    if names[-1] != FAST.name:
        return False
    if not quick:
        return True
    if case.scale == "flash":
        return "decode" in names
    return case.scale in ("tiny", "odd") and names[-2] in _QUICK_LAYOUTS


def argument_bytes(case: Case) -> int:
    """What a case's arguments take, without drawing them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return sum(t.nbytes for t in tensors(case.make(torch.device("cpu"))))


@dataclass
class Ready:
    """A case whose result was found right, on the device.

    Attributes:
        call: runs it once and waits. reset: puts back what the op writes in place, and empties the caches for real sizes.
        how: `kernel`, `parts` or `reference`. in_cache: everything it moves fits into the last cache.
        reference: the plain definition on the same tensors, for a ratio; None where that is what runs anyway.
    """

    subject: OpCase
    call: Callable[[], object]
    reset: Callable[[], None]
    cost: Cost
    dtype: str
    how: str
    evidence: str
    in_cache: bool
    worst: float
    reference: Callable[[], object] | None = None


@dataclass
class Timed:
    """Seconds of every round of a case.

    Attributes:
        kernel_seconds: on the device's own clock; empty on a host. against: the reference (a) beside what runs (b).
    """

    ready: Ready
    seconds: list[float]
    kernel_seconds: list[float] = field(default_factory=list)
    against: Paired | None = None


@dataclass
class Plan:
    """What is timed, how long, and what came of it. Handed to `bench_ops.py` as a plugin of its pytest run.

    Attributes:
        budget_s: of the timed rounds of one case. limit_bytes: larger arguments are left out.
        timed, wrong, left_out: results by `op/case`.
    """

    backend: Backend
    config: ModelConfig
    cases: Sequence[OpCase]
    budget_s: float
    limit_bytes: int
    timed: dict[str, Timed] = field(default_factory=dict)
    wrong: dict[str, CaseResult] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _evicting: Tensor | None = None

    def ready(self, subject: OpCase) -> Ready:
        """Judge a case and lay out its arguments.

        Raises:
            NotTimed: if there is no room for it, or no case to time.
            AssertionError: if its result is wrong.
        """
        self._admit(subject)
        drawn = subject.case.make(torch.device("cpu"))
        # judged and timed on the same values, drawn once
        found = judge_case(
            subject.op,
            replace(subject.case, make=lambda device: drawn),
            self.backend,
            subject.config(self.config),
        )
        if found.status != "passed":
            self.wrong[subject.label] = found
            raise AssertionError(f"{subject.label} {found.status}: {found.detail}")
        return self._lay_out(subject, drawn, found)

    def keep(self, ready: Ready, seconds: list[float]) -> None:
        """Note the rounds of a case; measure beside them what needs its tensors, which are dropped afterwards."""
        timed = Timed(ready, seconds)
        if ready.evidence == "device":
            timed.kernel_seconds = device_seconds(ready.call, self.backend.device, len(seconds), ready.reset)
        if ready.reference is not None:
            timed.against = paired(ready.reference, ready.call, self.budget_s, sync=self.backend.synchronize)
        # results are read later; hundreds of megabytes of arguments need not wait for that
        ready.call, ready.reset, ready.reference = _gone, _gone, None
        self.timed[ready.subject.label] = timed

    def _admit(self, subject: OpCase) -> None:
        if not subject.real:
            return
        size = argument_bytes(subject.case)
        free = free_bytes(self.backend)
        if size > self.limit_bytes:
            reason = f"its arguments take {size:,} bytes, above the {self.limit_bytes:,} of this run"
        elif free is not None and size * _COPIES > free:
            reason = (
                f"its arguments take {size:,} bytes, {_COPIES} copies do not fit into {free:,} free bytes"
            )
        else:
            return
        self.left_out[subject.label] = reason
        raise NotTimed(reason)

    def _lay_out(self, subject: OpCase, drawn: dict[str, Any], found: CaseResult) -> Ready:
        op, backend = subject.op, self.backend
        given = on_backend(drawn, backend)
        cost = op.cost(**drawn) if op.cost else Cost(0, 0, 0)
        function = _binding(backend, subject.config(self.config), drawn).table[op]
        kept = {name: clone(given[name]) for name in op.mutates}
        cache = last_level_cache_bytes(backend.device)

        def reset() -> None:
            for name, original in kept.items():
                for tensor, value in zip(tensors(given[name]), tensors(original), strict=True):
                    tensor.copy_(value)
            if subject.real:
                self._evict(cache)
            backend.synchronize()

        def call(run: Callable[..., object] = function) -> object:
            result = run(**given)
            backend.synchronize()
            return result

        return Ready(
            subject, call, reset, cost, dtype_of(drawn), found.how, found.evidence, 0 < cost.bytes < cache, found.worst,
            None if found.how == "reference" or found.evidence == "reference" else lambda: call(op),
        )  # fmt: skip

    def _evict(self, cache_bytes: int) -> None:
        """Read something else that fills the caches twice: in a model, every weight was last used a whole step ago."""
        if self._evicting is None:
            words = max(1, 2 * cache_bytes // 8)
            self._evicting = torch.ones(words, dtype=torch.int64, device=self.backend.device)
        self._evicting.sum()


def _gone() -> None:
    raise RuntimeError("this case was timed, and its arguments were dropped")


def _binding(backend: Backend, config: ModelConfig, args: dict[str, Any]) -> Binding:
    numerics = next((v for v in args.values() if isinstance(v, Numerics)), FAST)
    return bind(backend, config, EngineConfig(numerics, numerics.default_kv_format, backend.capability()))


def dtype_of(args: dict[str, Any]) -> str:
    """What its activations are, which decides whose products are its ceiling."""
    numerics = next((v for v in args.values() if isinstance(v, Numerics)), None)
    if numerics is not None:
        return "bfloat16" if numerics.bf16_activations else "float32"
    return next(_floating(args.values()), "float32")


def _floating(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float32):
            yield str(value.dtype).removeprefix("torch.")
