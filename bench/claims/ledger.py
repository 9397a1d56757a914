"""The ledger of published claims: what was said where, how it is answered here, and the figures an answer is held to.

The ledger is data (`claims.json`); this module reads it strictly and finds the rows of a record that answer it. Published speeds
of other engines lie in the same file, in a list of their own: they are cited, never compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from v4sdk.errors import V4Error
from v4sdk_bench.record import Record, Row

VERSION = 1
LEDGER = Path(__file__).with_name("claims.json")
PREFIX = "claims/"

Status = Literal["measured here", "reproduced by arithmetic", "not testable here"]
STATUSES: tuple[Status, ...] = get_args(Status)
# ways to hold a found figure to a claimed one; a figure has at most one of them
_LIMITS = ("deviation", "at_most", "at_least")


class BadLedger(V4Error):
    """The ledger of claims breaks its own rules."""

    way_out = "correct the entry named; bench/claims/ledger.py states the fields"


@dataclass(frozen=True)
class Source:
    """Where something was published: document, section or table (may be empty), address."""

    document: str
    section: str
    url: str


@dataclass(frozen=True)
class Figure:
    """One figure of a claim and the row that answers it.

    Attributes:
        key: of the row. what: the figure in words. claimed: as published; a pair is a range. unit: of `claimed`.
        deviation: largest accepted |found - claimed|. at_most, at_least: bounds of the found value itself. None of them: the
            row only informs.
    """

    key: str
    what: str
    claimed: float | tuple[float, float]
    unit: str
    deviation: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """As limits of a row."""
        named = (("deviation", self.deviation), ("found", self.at_most), (">=found", self.at_least))
        return {name: limit for name, limit in named if limit is not None}


@dataclass(frozen=True)
class Claim:
    """One published claim.

    Attributes:
        id: keys of its rows begin with `claims/<id>`. statement: what was said, figures exact. compares: what with what.
        method: how it is answered here. status: what kind of answer that is. needs: what a test would take, where there is
            none. beside: key prefix to words, for rows of our own that are shown next to a claim they do not answer.
    """

    id: str
    statement: str
    source: Source
    compares: str
    method: str
    status: Status
    figures: tuple[Figure, ...]
    needs: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the rows that answer it."""
        return tuple(figure.key for figure in self.figures)

    def figure(self, key: str) -> Figure:
        """The figure a row answers.

        Raises:
            BadLedger: if the claim has no such row.
        """
        for figure in self.figures:
            if figure.key == key:
                return figure
        raise BadLedger(f"claim `{self.id}` has no row `{key}`, expected one of {', '.join(self.keys)}")


@dataclass(frozen=True)
class Cited:
    """A speed somebody published; `figures` by name with units in the names. Rendered apart from our own."""

    engine: str
    hardware: str
    model: str
    setting: str
    figures: Mapping[str, float]
    source: Source


@dataclass(frozen=True)
class Ledger:
    """All claims in order, and the cited speeds."""

    claims: tuple[Claim, ...]
    cited: tuple[Cited, ...]

    def claim(self, name: str) -> Claim:
        """A claim by id.

        Raises:
            BadLedger: if there is none.
        """
        for claim in self.claims:
            if claim.id == name:
                return claim
        raise BadLedger(f"no claim `{name}`, expected one of {', '.join(c.id for c in self.claims)}")

    def answers(self, record: Record) -> list[tuple[Claim, list[Row], list[Row]]]:
        """Every claim with the rows of a record that answer it, and those that stand beside it."""
        found = []
        for claim in self.claims:
            rows = [row for key in claim.keys if (row := record.row(key)) is not None]
            beside = [row for prefix in claim.beside for row in record.under(prefix)]
            found.append((claim, rows, beside))
        return found


@cache
def ledger() -> Ledger:
    """The project's own ledger."""
    return load(LEDGER)


def load(path: Path) -> Ledger:
    """Read a ledger.

    Raises:
        BadLedger: naming the entry and the field that is missing, unknown, of another type, or contradicts another.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BadLedger(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadLedger(f"{path} is not JSON: {exc}") from exc
    top = _fields(raw, path.name, {"version": int, "claims": list, "cited": list})
    if top["version"] != VERSION:
        raise BadLedger(f"`{path.name}` has version {top['version']}, expected {VERSION}")
    claims = tuple(_claim(entry, f"claims[{i}]") for i, entry in enumerate(top["claims"]))
    _no_repeats([c.id for c in claims], "id")
    _no_repeats([key for c in claims for key in c.keys], "key")
    return Ledger(claims, tuple(_cited(entry, f"cited[{i}]") for i, entry in enumerate(top["cited"])))


def _claim(raw: Any, where: str) -> Claim:
    kinds = {
        "id": str,
        "statement": str,
        "source": dict,
        "compares": str,
        "method": str,
        "status": str,
        "rows": list,
    }
    entry = _fields(raw, where, kinds, {"needs": str, "beside": dict})
    where = f"claim `{entry['id']}`"
    if entry["status"] not in STATUSES:
        raise BadLedger(f"{where} has status `{entry['status']}`, expected one of {', '.join(STATUSES)}")
    untested = entry["status"] == "not testable here"
    if untested != bool(entry.get("needs")):
        raise BadLedger(f"{where} is `{entry['status']}` with needs {entry.get('needs')!r}; "
                        "what is not testable says what it needs, everything else needs nothing")  # fmt: skip
    if not entry["rows"]:
        raise BadLedger(f"{where} names no row, expected at least one")
    figures = tuple(_figure(row, f"{where}, rows[{i}]") for i, row in enumerate(entry["rows"]))
    own = f"{PREFIX}{entry['id']}"
    for figure in figures:
        if figure.key != own and not figure.key.startswith(f"{own}/"):
            raise BadLedger(f"{where} has the row `{figure.key}`, expected a key that begins with `{own}`")
        if untested and figure.limits:
            raise BadLedger(f"{where} is not testable here, so `{figure.key}` can have no limit")
    for prefix, words in entry.get("beside", {}).items():
        if not prefix.startswith(PREFIX) or not isinstance(words, str) or prefix.startswith(own):
            raise BadLedger(
                f"{where} has beside `{prefix}`, expected the key of another row of this suite and words"
            )
    return Claim(
        entry["id"], entry["statement"], _source(entry["source"], where), entry["compares"], entry["method"],
        entry["status"], figures, entry.get("needs", ""), entry.get("beside", {}),
    )  # fmt: skip


def _figure(raw: Any, where: str) -> Figure:
    kinds = {"key": str, "what": str, "claimed": (int, float, list), "unit": str}
    entry = _fields(raw, where, kinds, dict.fromkeys(_LIMITS, (int, float)))
    limits = [name for name in _LIMITS if name in entry]
    if len(limits) > 1:
        raise BadLedger(f"{where} has {' and '.join(limits)}, expected one of them at most")
    claimed = entry["claimed"]
    if isinstance(claimed, list):
        if len(claimed) != 2 or not all(_is_number(v) for v in claimed) or claimed[0] >= claimed[1]:
            raise BadLedger(f"{where} has claimed {claimed!r}, expected a number or a rising pair of numbers")
        if "deviation" in entry:
            raise BadLedger(f"{where} claims a range, from which no deviation can be taken")
        claimed = (float(claimed[0]), float(claimed[1]))
    for name in limits:
        if entry[name] < 0:
            raise BadLedger(f"{where} has {name} {entry[name]}, expected 0 or more")
    return Figure(entry["key"], entry["what"], claimed, entry["unit"], *(entry.get(name) for name in _LIMITS))


def _cited(raw: Any, where: str) -> Cited:
    kinds = {"engine": str, "hardware": str, "model": str, "setting": str, "figures": dict, "source": dict}
    entry = _fields(raw, where, kinds)
    if not entry["figures"] or not all(_is_number(v) for v in entry["figures"].values()):
        raise BadLedger(f"{where} has figures {entry['figures']!r}, expected names with numbers")
    return Cited(
        entry["engine"], entry["hardware"], entry["model"], entry["setting"], entry["figures"],
        _source(entry["source"], where),
    )  # fmt: skip


def _source(raw: Any, where: str) -> Source:
    entry = _fields(raw, f"{where}, source", {"document": str, "url": str}, {"section": str})
    if not entry["url"].startswith("https://"):
        raise BadLedger(f"{where} has the url `{entry['url']}`, expected https://")
    return Source(entry["document"], entry.get("section", ""), entry["url"])


def _fields(
    raw: Any, where: str, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadLedger(f"{where} is a {type(raw).__name__}, expected an object")
    known = {**needed, **(optional or {})}
    missing, strange = [n for n in needed if n not in raw], [n for n in raw if n not in known]
    if missing or strange:
        told = f"lacks {', '.join(missing)}" if missing else f"has the unknown field {', '.join(strange)}"
        raise BadLedger(f"{where} {told}; its fields are {', '.join(known)}")
    for name, value in raw.items():
        numeric = known[name] is int or isinstance(known[name], tuple)
        empty = isinstance(value, str) and not value.strip()
        finite = not isinstance(value, (int, float)) or (_is_number(value) and numeric)
        if not isinstance(value, known[name]) or empty or not finite:
            raise BadLedger(f"{where} has {name} {value!r}, expected {_kind(known[name])}")
    return raw


def _kind(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return " or ".join(dict.fromkeys(names[k] for k in kinds))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _no_repeats(names: Sequence[str], field_name: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadLedger(f"two entries have the {field_name} `{twice[0]}`, expected each once")
