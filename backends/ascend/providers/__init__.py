"""Who serves an op on which chip: the packs of Huawei and others, in order, then parts on tensors of the NPU.

A provider's function has its op's signature after a first parameter, the `Calls` through which it reaches the vendor and the
smaller ops; the table in `ops` binds that one, so any of them can be handed to `v4sdk.backend.bind`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.ops import OPS
from v4sdk.ops.op import OpTable

from ..chip import FAMILIES, Family
from ..contract import ContractBroken, Pack, Vendor, contract

EVERYWHERE: frozenset[Family] = frozenset(FAMILIES)
A2_A3: frozenset[Family] = frozenset(("910B", "910C"))
ONLY_950: frozenset[Family] = frozenset(("950",))

Predicate = Callable[[ModelConfig, EngineConfig, Family], str | None]


def always(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """No further condition."""
    return None


def rounded(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Only where activations are BF16, which is what the vendors' functions take."""
    if engine.numerics.bf16_activations:
        return None
    return f"numerics `{engine.numerics.name}` keeps activations that are wider than BF16"


def bf16_rows(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Only where cache rows are stored in BF16."""
    if engine.kv_format != "bf16":
        return f"cache rows are stored as `{engine.kv_format}`, and it reads BF16 rows"
    return rounded(config, engine, family)


def narrow(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Anything but the float64 of tests."""
    return "float64 is asked for" if engine.numerics.float64 else None


@dataclass(frozen=True)
class Calls:
    """What a provider's function works through.

    Attributes:
        vendor: makes the calls. ops: the smaller ops as chosen for this run. family: of the chip.
    """

    vendor: Vendor
    ops: OpTable
    family: Family

    def __call__(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Call a vendor's function by its key in the contract."""
        return self.vendor.call(key, *args, **kwargs)


@dataclass(frozen=True)
class Provider:
    """One way to serve one op.

    Attributes:
        op: of the vocabulary. pack: whose functions it calls; `kernels` are our own and call none. calls: keys of the
            contract's rows it may use, all of them.
        chips: families it is for. function: signature of the op, behind a `Calls` unless the pack is `kernels`. unless: None
            to serve, or the reason in words, from the model's shapes, numerics, KV format and the family.
    """

    op: str
    pack: Pack | Literal["kernels"]
    calls: tuple[str, ...]
    chips: frozenset[Family]
    function: Callable[..., Any]
    unless: Predicate = always

    @property
    def is_declined(self) -> bool:
        """Whether it is named only to be passed over, with a reason: there is no adapter of its calls."""
        return any(contract()[key].use == "declined" for key in self.calls)


def no_adapter(op: str) -> Callable[..., Any]:
    """The function of a declined provider, with its op's signature: a call that got past `unless` must not pass for another."""

    def function(to: Calls, *args: Any, **kwargs: Any) -> Any:
        raise ContractBroken(f"`{op}` was asked of a provider that declines every model, expected never")

    first = inspect.Parameter("to", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = OPS[op].signature
    function.__signature__ = known.replace(parameters=[first, *known.parameters.values()])  # type: ignore[attr-defined]
    return function
