"""Every function of a vendor that this plugin may call, with the arguments it passes: the table, and the calls themselves.

The table is `contract.toml`. No call goes around `Vendor.call`, so what is passed, what the live schema has and what the
table promises can be held against each other.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch

from .chip import Family

Pack = Literal["transformer", "vendorpack", "stock"]


class ContractBroken(Exception):
    """This plugin passed what its own table does not name: a fault here, whatever the vendor has."""


@dataclass(frozen=True)
class Call:
    """A row of the table.

    Attributes:
        pack: who ships it. namespace: its own in the dispatcher ("npu", "_C_ascend", ..). name: as registered there.
        positional, keyword: names of all arguments that this plugin passes, in the vendor's spelling and order.
        since: first torch_npu (or pack) version with all of them. chips: families its documents list.
        source: "wheel", whose schemas are committed and checked, or "transcribed": from a document at a commit.
        keyword_950, since_950: further keywords that are passed on that family alone, and the version they came with.
        schema: as the document gives it; empty for a wheel's.
        use: "step" (a run may call it), "exchange" (only expert parallelism does), "declined" (passed over, with a reason).
    """

    pack: Pack
    namespace: str
    name: str
    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    since: str
    chips: frozenset[Family]
    source: Literal["wheel", "transcribed"]
    document: str = ""
    keyword_950: tuple[str, ...] = ()
    since_950: str = ""
    schema: str = ""
    use: Literal["step", "exchange", "declined"] = "step"

    def arguments(self, family: Family | None = None) -> tuple[str, ...]:
        """All argument names that may be passed on a family; on any, if none is given."""
        return (*self.positional, *self.keyword, *(self.keyword_950 if family in ("950", None) else ()))

    @property
    def key(self) -> str:
        """Library and name: how providers and records call it."""
        return f"{self.namespace}.{self.name}"


@cache
def contract() -> Mapping[str, Call]:
    """All rows by key."""
    raw = tomllib.loads(files(__package__).joinpath("contract.toml").read_text(encoding="utf-8"))
    rows = [
        Call(
            row["pack"], row["namespace"], row["name"], tuple(row.get("positional", ())), tuple(row.get("keyword", ())),
            row["since"], frozenset(row["chips"]), row["source"], row.get("document", ""),
            tuple(row.get("keyword_950", ())), row.get("since_950", ""), row.get("schema", ""), row.get("use", "step"),
        )
        for row in raw["call"]
    ]  # fmt: skip
    return {row.key: row for row in rows}


def lacks(call: Call, family: Family | None = None) -> str | None:
    """Why a call cannot be made here, by the live dispatcher; None if it has the op and every argument we pass.

    With a family, only what is passed on that family is asked for.
    """
    schemas = _schemas(call)
    if not schemas:
        return f"{call.key} is not registered here"
    wanted = set(call.arguments(family))
    missing = min((sorted(wanted - {a.name for a in s.arguments}) for s in schemas), key=len)
    if not missing:
        return None
    since = call.since_950 if set(missing) <= set(call.keyword_950) else call.since
    return f"{call.key} has no argument {', '.join(missing)}, which came with {since}"


def absent(keys: Iterable[str], family: Family) -> str | None:
    """Why functions are not there on this chip, with the libraries that are loaded; None if all of them are."""
    for key in keys:
        call = contract()[key]
        if family not in call.chips:
            return f"{key} is documented for {', '.join(sorted(call.chips))}"
        why = lacks(call, family)
        if why is not None:
            return why
    return None


def _schemas(call: Call) -> list[Any]:
    packet = getattr(getattr(torch.ops, call.namespace), call.name, None)
    return [getattr(packet, name)._schema for name in packet.overloads()] if packet is not None else []


@dataclass
class Vendor:
    """Makes the calls.

    Attributes:
        observers: told (key, positional values, keyword values) before every call; tests and the device test record with it.
    """

    observers: list[Callable[[str, tuple[Any, ...], Mapping[str, Any]], None]] = field(default_factory=list)

    def call(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Call a vendor's function; only what its row names may be passed.

        Raises:
            ContractBroken: the table has no such row, or an argument is passed that the row does not name.
        """
        row = contract().get(key)
        if row is None:
            raise ContractBroken(f"{key} is called, and the contract has no row of it")
        named = row.arguments()
        if len(args) > len(row.positional) or not kwargs.keys() <= {*named[len(args) :]}:
            passed = [f"{len(args)} positional", *kwargs]
            raise ContractBroken(
                f"{key} is passed {', '.join(passed)}; its row of the contract names {', '.join(named)}"
            )
        for told in self.observers:
            told(key, args, kwargs)
        return getattr(getattr(torch.ops, row.namespace), row.name)(*args, **kwargs)
