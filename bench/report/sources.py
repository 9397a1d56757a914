"""Records as they are read for a report: each under a label, the same one once, nothing of a wrong type inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4sdk_bench.record import Record
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
