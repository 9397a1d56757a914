"""Parity as a map: how much of its limit the worst comparison of an op, a layer or a bucket of positions uses."""

from __future__ import annotations

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
    wanted = [(label, column) for column in columns for label in joined.labels]
    rows: list[tuple[float, tuple[Cell, ...]]] = []
    for name in dict.fromkeys(place[0] for place in places.values()):
        found: list[Cell] = []
        worst = 0.0
        for label, column in wanted:
            here = [ln.rows[label] for ln in lines if places[ln.key] == (name, column) and label in ln.rows]
            cell, share = _shade(here)
            found.append(cell)
            worst = max(worst, share if any(r.state == "failed" for r in here) else 0.0)
        rows.append((worst, (Cell(name), *found)))
    rows.sort(key=lambda pair: -pair[0])
    heads = [
        " ".join(x for x in (column, label if len(joined.sources) > 1 else "") if x) or "worst"
        for label, column in wanted
    ]
    note = "Percent of the accepted limit that the worst comparison of a cell uses; above 100% it failed."
    return Table(caption, (noun, *heads), tuple(row for _, row in rows), cells.commands(lines), note, "heat")


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
        over = share if share is not None and share > 1 else float("inf")
        said = (
            f"{over * 100:.0f}%"
            if over < 1e3
            else "no number"
            if over == float("inf")
            else f"{digits(over)}×"
        )
        return Cell(
            said if over != float("inf") else "failed", "bad", f"{len(failed)} of {len(ran)} failed"
        ), over
    if share is None:
        return Cell("no limit", ""), 0.0
    tone: Tone = "near" if share > 0.5 else "good"
    return Cell(f"{share * 100:.0f}%" if share >= 0.01 or share == 0 else "<1%", tone), share
