"""Who serves each op: the choice among providers, with a reason for everyone passed over, and what happens when one fails.

Order per op: cann_ops_transformer, vllm-ascend, torch_npu, our own kernels, then the op's parts or its reference.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig, Kernel
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops import OPS
from v4sdk.ops.batch import Batch
from v4sdk.ops.op import OpTable
from v4sdk.weights import ExpertWeights, Weight

from .chip import Family
from .contract import ContractBroken, Vendor, absent
from .kernels.launch import PROVIDERS as KERNELS
from .providers import Calls, Provider, stock, transformer, vendorpack

log = logging.getLogger(__name__)

PROVIDERS: tuple[Provider, ...] = (
    *transformer.PROVIDERS,
    *vendorpack.PROVIDERS,
    *stock.PROVIDERS,
    *KERNELS,
)
_PARTS = "parts"


@dataclass
class Choice:
    """Who serves one op, for reports; by the chip and the libraries at hand until a model was bound, then by its shapes too.

    Attributes:
        by: a pack, `kernels`, or `parts` (parts or reference on the chip's tensors).
        passed_over: why those before it do not serve.
    """

    op: str
    by: str = _PARTS
    passed_over: list[str] = field(default_factory=list)


def choose(
    vendor: Vendor, family: Family, rows: Sequence[Provider]
) -> tuple[tuple[Kernel[Any, Any], ...], tuple[Choice, ...]]:
    """Build the table of a run: one kernel per op that has a provider for this chip.

    The live dispatcher and the chip are asked here, the model's shapes when the table is bound.

    Args:
        rows: providers, those to be preferred first.

    Returns:
        kernels for `v4sdk.backend.bind`, and what was chosen; binding completes the latter.
    """
    parts = OpTable({})
    kernels, choices = [], []
    for name, op in OPS.items():
        chain = _Chain(name, family, [row for row in rows if row.op == name], Calls(vendor, parts, family))
        if chain.known:
            parts.set(name, chain.function)
            kernels.append(Kernel(op, chain.function, chain.unless))
            choices.append(chain.choice)
    return tuple(kernels), tuple(choices)


class _Chain:
    """The providers of one op in order; the first that serves runs, and one that fails on first use gives way to the next."""

    def __init__(self, op: str, family: Family, rows: Sequence[Provider], calls: Calls) -> None:
        self.choice = Choice(op)
        self.known = bool(rows)
        # where a pack has one row per family, only the one for this chip is worth a word
        here = {row.pack for row in rows if family in row.chips}
        rows = [row for row in rows if family in row.chips or row.pack not in here]
        self._family = family
        found = [(row, _absent(row, family)) for row in rows]
        self._absent = [f"{row.pack}: {why}" for row, why in found if why]
        self._present = [row for row, why in found if not why]
        # until a model is bound: by the chip and the libraries alone
        self.choice.by = self._present[0].pack if self._present else _PARTS
        self.choice.passed_over = list(self._absent)
        self._calls = calls
        self._serving: list[tuple[str, Callable[..., Any]]] = []
        self._proven: set[tuple[str, Hashable]] = set()
        self._rest = OPS[op].build(calls.ops)
        # the argument with a row per token
        self._rows = next(iter(OPS[op].signature.parameters))

        @functools.wraps(self._rest)
        def function(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        function.__signature__ = OPS[op].signature  # type: ignore[attr-defined]
        self.function: Callable[..., Any] = function

    def unless(self, config: ModelConfig, engine: EngineConfig) -> str | None:
        """Choose for a model: None if anyone serves, else why nobody does."""
        passed = list(self._absent)
        self._serving = []
        for row in self._present:
            why = row.unless(config, engine, self._family)
            if why is None:
                self._serving.append((row.pack, self._bound(row)))
            elif not self._serving:
                passed.append(f"{row.pack}: {why}")
        self.choice.passed_over = passed
        self.choice.by = self._serving[0][0] if self._serving else _PARTS
        return None if self._serving else "; ".join(passed)

    def _bound(self, row: Provider) -> Callable[..., Any]:
        return row.function if row.pack == "kernels" else functools.partial(row.function, self._calls)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # no vendor documents a call without tokens
        if not len(args[0] if args else kwargs[self._rows]):
            return self._rest(*args, **kwargs)
        # whatever way a call takes through a provider, its first time is a first use
        way = (*map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
        while self._serving:
            pack, serve = self._serving[0]
            if (pack, way) in self._proven:
                return serve(*args, **kwargs)
            try:
                result = serve(*args, **kwargs)
            except ContractBroken:
                raise
            # whatever a vendor's library raises on first use, the next provider may do without
            except Exception as exc:
                if _out_of_memory(exc):
                    raise
                self._serving.pop(0)
                self._passed(pack, exc)
                continue
            self._proven.add((pack, way))
            return result
        return self._rest(*args, **kwargs)

    def _passed(self, pack: str, exc: Exception) -> None:
        next_one = self._serving[0][0] if self._serving else _PARTS
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
        log.warning(
            "%s: %s failed on first use, %s serves it from now on: %s", self.choice.op, pack, next_one, why
        )
        self.choice.passed_over.append(f"{pack}: failed on first use: {why}")
        self.choice.by = next_one


def _absent(row: Provider, family: Family) -> str | None:
    """Why a provider is not there at all on this chip, with the libraries that are loaded."""
    if family not in row.chips:
        return f"is for {', '.join(sorted(row.chips))}"
    return absent(row.calls, family)


def _kind(value: object) -> Hashable:
    """What of an argument a provider may branch on: all but sizes and values."""
    match value:
        case Tensor():
            return value.dtype, value.numel() == 0
        case Weight():
            return value.encoding, value.data.dtype, value.block
        case ExpertWeights():
            return "experts", None if value.packed is None else tuple(_kind(one) for one in value.packed)
        case Batch():
            return "decode" if value.is_decode else "prompt"
        # of a model there are few: a ratio, a width, what is asked for
        case int() | float() | Numerics():
            return value
        case torch.dtype():
            return str(value)
        case _:
            return type(value).__name__


def _out_of_memory(exc: Exception) -> bool:
    """Whether the device's memory is full: another provider would want it too, and callers have an answer to it."""
    return isinstance(exc, torch.OutOfMemoryError) or "out of memory" in str(exc).lower()
