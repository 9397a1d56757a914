"""Records as they are read for a report: each under a label, the same one once, nothing of a wrong type inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4sdk_bench.record import BadRecord, Record
from v4sdk_bench.report.numbers import finite


@dataclass(frozen=True)
class Source:
    """One record as a column.

    Attributes:
        label: how tables call it: A, B, ...; path: where it was read from.
    """

    label: str
    path: str
    record: Record

    @property
    def backend(self) -> str:
        """Name of the backend that was measured."""
        return str(self.record.options.get("backend") or "backend unknown")

    @property
    def processor(self) -> str:
        """The accelerator, or else the processor and its cores."""
        if self.record.device and self.record.device.get("name"):
            return str(self.record.device["name"])
        machine = self.record.machine
        name, cores = (
            machine.get("processor") or machine.get("machine") or "machine unknown",
            machine.get("cores"),
        )
        return f"{name}, {cores} cores" if cores else str(name)

    def noise(self, suite: str) -> float | None:
        """By how much the same call differs from itself on that machine, as a suite measured it; None if it did not."""
        rows = [row for row in self.record.under(f"{suite}/") if row.key.endswith("/noise")]
        return max((n for row in rows if (n := finite(row.values.get("noise"))) is not None), default=None)

    @property
    def title(self) -> str:
        """Backend, machine and day."""
        return f"{self.backend} on {self.processor}, {self.record.started[:10]}"


def load(paths: Sequence[Path]) -> tuple[list[Source], list[str]]:
    """Read records; the same record given twice is taken once and said.

    Returns:
        The records under the labels A, B, ..., and notes.
    Raises:
        BadRecord: if a file is missing, truncated, no record, or of another schema.
    """
    found: list[Source] = []
    notes = []
    seen: dict[str, Source] = {}
    for path in paths:
        record = Record.load(path)
        _check(record, path)
        digest = json.dumps(vars(record), default=vars, sort_keys=True)
        if digest in seen:
            twin = seen[digest]
            notes.append(f"{path} is the same record as {twin.path} ({twin.label}); it is shown once")
            continue
        source = Source(_label(len(found)), str(path), record)
        seen[digest] = source
        found.append(source)
    return found, notes


def _label(at: int) -> str:
    return chr(ord("A") + at) if at < 26 else f"R{at + 1}"


def _check(record: Record, path: Path) -> None:
    """`Record.load` checks rows; what stands around them must have its type too, or a report would fall over it."""
    for name, kind in (
        ("options", dict), ("machine", dict), ("software", dict), ("models", dict), ("stages", dict), ("ceilings", list),
        ("started", str), ("command", str),
    ):  # fmt: skip
        if not isinstance(getattr(record, name), kind):
            raise BadRecord(
                f"{path}: `{name}` is {type(getattr(record, name)).__name__}, expected {kind.__name__}"
            )
    inner = {"models": record.models.values(), "stages": record.stages.values(), "ceilings": record.ceilings}
    for name, values in inner.items():
        if not all(isinstance(value, dict) for value in values):
            raise BadRecord(f"{path}: an entry of `{name}` is not an object")
    if record.device is not None and not isinstance(record.device, dict):
        raise BadRecord(f"{path}: `device` is {type(record.device).__name__}, expected an object or null")
    for row in record.rows:
        for name, value, kind in (
            ("key", row.key, str), ("values", row.values, dict), ("limits", row.limits, dict),
            ("setting", row.setting, dict), ("note", row.note, str), ("command", row.command, str), ("what", row.what, str),
        ):  # fmt: skip
            if not isinstance(value, kind):
                raise BadRecord(
                    f"{path}: `{name}` of row `{row.key}` is {type(value).__name__}, expected {kind.__name__}"
                )
