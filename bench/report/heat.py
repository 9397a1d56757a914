"""Parity as a map: how much of its limit the worst comparison of an op, a layer or a bucket of positions uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined, Line
from v4sdk_bench.report.numbers import ABSENT, digits
from v4sdk_bench.report.page import Cell, Table, Tone

_MAP_COLUMNS = 9
# of an op's cases; a case without one is an edge: ties, unused rows, empty sequences
_SIZES = ("tiny", "odd", "float", "flash", "pro")


def heat(joined: Joined, lines: Sequence[Line], caption: str, noun: str) -> Table:
    """Worst share of the limit by subject and case. Red subjects come first."""
    places = {line.key: _place(line.key) for line in lines}
    columns = list(dict.fromkeys(place[1] for place in places.values()))
    if len(columns) > _MAP_COLUMNS:
        columns, places = [""], {key: (row, "") for key, (row, _) in places.items()}
    several = len(joined.sources) > 1
    # many columns of many records: a row for each record then
    stacked = several and len(columns) * len(joined.sources) > _MAP_COLUMNS
    rows: list[tuple[float, tuple[Cell, ...]]] = []
    for name in dict.fromkeys(place[0] for place in places.values()):
        for labels in [[label] for label in joined.labels] if stacked else [joined.labels]:
            here = [ln for ln in lines if places[ln.key][0] == name]
            found = [
                _shade([ln.rows[at] for ln in here if places[ln.key][1] == c and at in ln.rows])
                for c in columns
                for at in labels
            ]
            first = Cell(f"{name}, {labels[0]}" if stacked else name)
            rows.append(
                (
                    max(share if cell.tone == "bad" else 0.0 for cell, share in found),
                    (first, *(cell for cell, _ in found)),
                )
            )
    rows.sort(key=lambda pair: -pair[0])
    heads = [
        " ".join(x for x in (_words(column), label if several and not stacked else "") if x) or "worst"
        for column in columns
        for label in (joined.labels if not stacked else [""])
    ]
    note = "Percent of the accepted limit that the worst comparison of a cell uses; above 100% it failed."
    ran = [row for line in lines for row in line.rows.values() if row.state != "not run"]
    if ran and all(
        row.values.get("how") in ("reference", "parts") and not row.values.get("worst") for row in ran
    ):
        note += " Here the references themselves computed every case, so none could differ; a backend's kernels can."
    return Table(caption, (noun, *heads), tuple(row for _, row in rows), cells.commands(lines), note, "heat")


def _words(column: str) -> str:
    return column if column[:1].isdigit() else column.replace("-", " ")


def _place(key: str) -> tuple[str, str]:
    """Row and column of a key in the map: `parity/op/linear/tiny-x-exact` is (linear, tiny)."""
    kind, *rest = key.split("/")[1:]
    if kind == "op":
        return rest[0], next((word for word in rest[-1].split("-") if word in _SIZES), "special") if len(
            rest
        ) > 1 else ""
    if kind == "layer" and len(rest) == 4:
        return f"{rest[1]}, {rest[0]}", rest[2]
    if len(rest) > 1:
        return " ".join(rest[:-1]), rest[-1]
    return rest[0] if rest else kind, ""


def _shade(rows: Sequence[Row]) -> tuple[Cell, float]:
    """One cell: the tone says how near the limit is, the text says it in percent."""
    ran = [row for row in rows if row.state != "not run"]
    if not ran:
        return (Cell("not run" if rows else ABSENT, "mute"), 0.0)
    share = cells.worst_share(ran)
    failed = [row for row in ran if row.state == "failed"]
    if failed:
        over = share if share is not None and share > 1 else math.inf
        said = "failed" if over == math.inf else f"{over * 100:.0f}%" if over < 10 else f"{digits(over)}×"
        return Cell(said, "bad", f"{len(failed)} of {len(ran)} failed"), over
    if share is None:
        return Cell("no limit", ""), 0.0
    tone: Tone = "near" if share > 0.5 else "good"
    return Cell(f"{share * 100:.0f}%" if share >= 0.01 or share == 0 else "<1%", tone), share
