"""The record of a run: one JSON file with a versioned schema. Markdown, HTML and tables are derived from it.

A file is complete at every moment: it is written beside its place and moved there, so a crash, a full disk or Ctrl-C leaves the
last whole version. Reading is strict: another schema, a truncated file or a `device` row without its proof is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from v4sdk.backend import Evidence
from v4sdk.errors import V4Error

KIND = "v4sdk bench"
SCHEMA = 1
SUITES = ("parity", "ops", "model", "claims", "device")

Value = str | int | float | bool | None | Sequence[Any] | Mapping[str, Any]
State = Literal["ok", "failed", "info", "not run"]
Status = Literal["running", "interrupted", "complete"]

# what a row may not say when its result is wrong
SPEED_ENDINGS = ("_s", "_per_s", "_of_ceiling", "_of_fastest", "_ratio")
# what a record must know of its device before a row may claim evidence `device`
DEVICE_PROOF = ("uuid", "driver", "kernel_s")
# suites whose rows are about time: on a device it is the device's own clock that counts
_TIMED_SUITES = ("ops", "device")


class BadRecord(V4Error):
    """A record file, or a row about to enter one, breaks the schema."""

    way_out = "measure again: v4sdk bench run --output FILE"


class NotSaved(BadRecord):
    """The system does not let a record be written."""


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        key: unique in a record and stable over machines and versions; its first part is the suite: `ops/rms_norm/tiny`.
        what: the subject in words. state: `failed` if a limit is broken; `info` if there is none; `not run` with the reason in
            `note`. evidence: what stands behind the values; `none` for a row that was not run.
        values: numbers by name; a name ends in its unit: `_s` seconds, `_bytes`, `_flops`, `_per_s`, `_of_ceiling` (a share of
            the measured ceiling), `_ratio` (of two measured speeds), none for plain numbers and shares.
        limits: value name to the largest accepted value; a name that begins with `>=` to the smallest.
        setting: what another machine's row must share to be compared with this one (model fingerprint, shape, dtype, ...).
        command: reproduces this row. seed: of everything random in it. seconds: it took in all. date: UTC, ISO 8601.
    """

    key: str
    what: str
    state: State
    evidence: Evidence | Literal["none"] = "reference"
    values: Mapping[str, Value] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    setting: Mapping[str, Value] = field(default_factory=dict)
    note: str = ""
    command: str = ""
    seed: int | None = None
    seconds: float = 0.0
    date: str = ""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise BadRecord(
                f"row `{self.key}` begins with `{self.suite}`, expected one of {', '.join(SUITES)}"
            )
        if self.state not in get_args(State):
            raise BadRecord(
                f"row `{self.key}` has state `{self.state}`, expected one of {', '.join(get_args(State))}"
            )
        if self.evidence not in (*get_args(Evidence), "none"):
            raise BadRecord(
                f"row `{self.key}` has evidence `{self.evidence}`, expected one of {', '.join(get_args(Evidence))}"
            )
        if (self.state == "not run") != (self.evidence == "none"):
            raise BadRecord(
                f"row `{self.key}` is `{self.state}` with evidence `{self.evidence}`; only what was not run has none"
            )
        if self.state == "failed":
            told = [name for name in self.values if name.endswith(SPEED_ENDINGS)]
            if told:
                raise BadRecord(
                    f"row `{self.key}` failed and still gives a speed, `{told[0]}`; a wrong result has none"
                )

    @property
    def suite(self) -> str:
        """The first part of the key."""
        return self.key.partition("/")[0]


def judged(values: Mapping[str, Value], limits: Mapping[str, float]) -> State:
    """`ok` or `failed` by the limits, `info` without any. NaN and a missing value are failures."""
    if not limits:
        return "info"
    return (
        "ok"
        if all(_within(values.get(name.removeprefix(">=")), name, limit) for name, limit in limits.items())
        else "failed"
    )


def _without_nan(value: Any) -> Any:
    """NaN and infinity are not JSON: what could not be measured is null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _within(value: Value, name: str, limit: float) -> bool:
    if not isinstance(value, (int, float)) or math.isnan(value):
        return False
    return value >= limit if name.startswith(">=") else value <= limit


def not_run(key: str, what: str, why: str, **rest: Any) -> Row:
    """A row that says why it has no result."""
    return Row(key, what, "not run", "none", note=why, **rest)


@dataclass
class Record:
    """Everything one run found.

    Attributes:
        started, finished: UTC, ISO 8601. status: `interrupted` and `running` files can be resumed,
            and `complete` ones in which a stage broke.
        command: as it was typed. options: what the run chose; resuming requires the same.
        machine: processor, cores, threads, memory, load. software: versions. device: what
            `Backend.identity` says of an accelerator.
        models: name to fingerprint and sizes of every model that was measured.
        ceilings: what this machine can do, measured in this run (`bench/speed/ceilings.py`).
        stages: stage to state (`done`, `interrupted`, `broken`), seconds, budget and note.
        rows: the results.
    """

    started: str
    command: str
    options: dict[str, Any]
    machine: dict[str, Any]
    software: dict[str, str]
    device: dict[str, Any] | None = None
    finished: str | None = None
    status: Status = "running"
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Append a row; a row of the same key is replaced.

        Raises:
            BadRecord: for a `device` row of a run that cannot name its device, or with times that are not the device's.
        """
        self._check_device(row)
        self.rows = [kept for kept in self.rows if kept.key != row.key] + [row]

    def row(self, key: str) -> Row | None:
        """The row of a key."""
        return next((row for row in self.rows if row.key == key), None)

    def under(self, prefix: str) -> list[Row]:
        """Rows whose key begins with `prefix`."""
        return [row for row in self.rows if row.key.startswith(prefix)]

    def save(self, path: Path) -> None:
        """Write the whole file, or leave the old one.

        Raises:
            NotSaved: with the system's reason, for instance a full disk.
        """
        whole = _without_nan({"kind": KIND, "schema": SCHEMA, **asdict(self)})
        text = json.dumps(whole, indent=1, allow_nan=False)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(text + "\n", encoding="utf-8")
            os.replace(aside, path)
        except OSError as exc:
            aside.unlink(missing_ok=True)
            kept = "; the file keeps what was written before" if path.exists() else ""
            raise NotSaved(
                f"cannot write {path}: {exc.strerror}{kept}",
                hint="make room, or give another place with --output; then run the "
                "same command again: finished stages are kept",
            ) from exc

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file that `save` wrote.

        Raises:
            BadRecord: if it is missing, truncated, of another kind or schema, or has a row that may not be there.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise BadRecord(
                f"cannot read {path}: {exc.strerror}", hint="give a file that v4sdk bench run wrote"
            ) from exc
        except (json.JSONDecodeError, UnicodeDecodeError) as exc:
            raise BadRecord(
                f"{path} is not whole JSON ({exc}); it may be truncated",
                hint="copy it again, or measure again",
            ) from exc
        if not isinstance(raw, dict) or raw.get("kind") != KIND:
            found = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
            raise BadRecord(
                f"{path} is not a record of v4sdk bench: its kind is {found!r}, expected {KIND!r}"
            )
        if raw.get("schema") != SCHEMA:
            raise BadRecord(
                f"{path} has schema {raw.get('schema')!r}, expected {SCHEMA}",
                hint="read it with the version of v4sdk that wrote it (it is named in the file), or measure again",
            )
        _check_types(raw, path)
        try:
            rows = [Row(**row) for row in raw["rows"]]
            known = {f.name for f in fields(cls)}
            record = cls(**{k: v for k, v in raw.items() if k in known and k != "rows"})
        except BadRecord as exc:
            raise BadRecord(f"{path}: {exc.message}", hint=exc.hint) from exc
        except (KeyError, TypeError, AttributeError) as exc:
            raise BadRecord(f"{path} does not follow schema {SCHEMA}: {exc}") from exc
        for row in rows:
            record._check_device(row)
        record.rows = rows
        return record

    def _check_device(self, row: Row) -> None:
        if row.evidence != "device":
            return
        missing = [name for name in DEVICE_PROOF if not (self.device or {}).get(name)]
        if missing:
            raise BadRecord(
                f"row `{row.key}` claims evidence `device`, but the record has no {' and no '.join(missing)} of a device"
            )
        kernel_times = any(name.startswith("kernel") and name.endswith("_s") for name in row.values)
        timed = any(name.endswith(SPEED_ENDINGS) for name in row.values)
        if row.suite in _TIMED_SUITES and timed and not kernel_times:
            raise BadRecord(f"row `{row.key}` claims evidence `device` without kernel times")


_TYPES: Mapping[str, type] = {
    "options": dict, "machine": dict, "software": dict, "models": dict, "stages": dict, "ceilings": list, "rows": list,
    "started": str, "command": str, "status": str,
}  # fmt: skip
_ROW_TYPES: Mapping[str, type] = {
    "key": str, "what": str, "state": str, "evidence": str, "values": dict, "limits": dict, "setting": dict, "note": str,
    "command": str,
}  # fmt: skip


def _check_types(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse what whoever reads the record would fall over; fields that are missing are for the constructors to name."""
    for name in _TYPES.keys() & raw.keys():
        if not isinstance(raw[name], _TYPES[name]):
            raise BadRecord(
                f"{path}: `{name}` is {type(raw[name]).__name__}, expected {_TYPES[name].__name__}"
            )
    for name in ("models", "stages", "ceilings", "rows"):
        held = raw.get(name, [])
        if not all(isinstance(entry, dict) for entry in (held.values() if isinstance(held, dict) else held)):
            raise BadRecord(f"{path}: an entry of `{name}` is not an object")
    if not isinstance(raw.get("device"), dict | None):
        raise BadRecord(f"{path}: `device` is {type(raw['device']).__name__}, expected an object or null")
    for row in raw.get("rows", []):
        for name in _ROW_TYPES.keys() & row.keys():
            if not isinstance(row[name], _ROW_TYPES[name]):
                raise BadRecord(
                    f"{path}: `{name}` of row `{row.get('key')}` is {type(row[name]).__name__}, "
                    f"expected {_ROW_TYPES[name].__name__}"
                )
