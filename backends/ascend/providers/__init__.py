"""Who serves an op on which chip: the packs of Huawei and others, in order, then parts on tensors of the NPU.

A provider's function has exactly the signature of its op, so the table in `ops` can hand any of them to `v4sdk.backend.bind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig

from ..chip import Family
from ..contract import Pack

Predicate = Callable[[ModelConfig, EngineConfig, Family], str | None]


def always(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """No further condition."""
    return None


@dataclass(frozen=True)
class Provider:
    """One way to serve one op.

    Attributes:
        op: of the vocabulary. pack: whose functions it calls; `kernels` are our own and call none. calls: keys of the
            contract's rows it may use, all of them.
        chips: families it is for. function: same signature as the op. unless: None to serve, or the reason in words, from
            the model's shapes, numerics, KV format and the family.
    """

    op: str
    pack: Pack | Literal["kernels"]
    calls: tuple[str, ...]
    chips: frozenset[Family]
    function: Callable[..., Any]
    unless: Predicate = always
