"""Ops in a report: rooflines under the ceilings of the same run, and the table whose numbers they carry."""

from __future__ import annotations

from collections.abc import Sequence

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells, charts
from v4sdk_bench.report.compare import Joined, Line, ends, withheld
from v4sdk_bench.report.numbers import ABSENT, digits, finite, percent, show
from v4sdk_bench.report.page import Block, Cell, Figure, Figures, Section, Table, Text
from v4sdk_bench.report.ratios import is_ratio
from v4sdk_bench.report.sources import Source

_MOST_SPOTS = 26
_BYTES = ("moved_bytes", "read_bytes", "write_bytes")


def section(joined: Joined) -> Section | None:
    """Every timed op."""
    lines = [line for line in joined.peek("ops/") if _is_op(line) and not is_ratio(line)]
    for line in lines:
        joined.take(line.key)
    if not lines:
        return None
    numbers = {key: at for at, key in enumerate(dict.fromkeys(line.key for line in lines), 1)}
    blocks: list[Block] = []
    for source in joined.sources:
        blocks += _roofline(joined, source, lines, numbers)
    lead = (
        "Bytes at stored width and FLOPs are what an op must move and compute. Its floor is the time that takes at the "
        "ceilings measured in the same run; the last column says how near the op comes."
    )
    title = "How near is each op to what the machine can do?"
    return Section("ops", title, (*blocks, _table(joined, lines, numbers)), lead, nav="Ops")


def _is_op(line: Line) -> bool:
    timed = any(finite(row.values.get("median_s")) for row in line.rows.values())
    return timed or len(line.key.split("/")) > 2


def _roofline(joined: Joined, source: Source, lines: Sequence[Line], numbers: dict[str, int]) -> list[Block]:
    spots: list[tuple[float, charts.Spot]] = []
    idle, cached = [], 0
    for line in lines:
        row = line.rows.get(source.label)
        if row is None or withheld(source, row) is not None:
            continue
        moved, flops, took = (
            finite(x) for x in (_moved(row), row.values.get("flops"), row.values.get("median_s"))
        )
        name = line.key.partition("/")[2]
        if not moved or not took:
            continue
        if row.values.get("in_cache") is True:
            cached += 1
        elif not flops:
            idle.append(name)
        else:
            spots.append((moved, charts.Spot(flops / moved, flops / took, numbers[line.key], name)))
    chosen = _largest(spots) if len(spots) > _MOST_SPOTS else [spot for _, spot in spots]
    note = _left_out(len(spots) - len(chosen), cached, idle)
    title = (
        f"Roofline of {source.label}: {source.title}"
        if len(joined.sources) > 1
        else f"Roofline: {source.title}"
    )
    says = "; ".join(
        f"{s.label} {show('flops_per_s', s.achieved)} at {digits(s.intensity)} FLOP per byte" for s in chosen
    )
    roofs = _roofs(source)
    narrow = charts.roofline(title, says, roofs, chosen)
    if not narrow:
        return (
            [Text(f"No roofline of {source.label}: it has no ceilings, or no op larger than the caches.")]
            if cached
            else []
        )
    short = [charts.Spot(s.intensity, s.achieved, s.number, s.label.partition("/")[0]) for s in chosen]
    wide = charts.roofline(title, says, roofs, short, charts.WIDE)
    return [
        Figures((Figure(title, narrow, wide, cells.commands(lines)[:1] and (source.record.command,), note),))
    ]


def _left_out(smaller: int, cached: int, idle: Sequence[str]) -> str:
    note = "Numbers are those of the table below."
    if smaller:
        note += f" The largest case of each op is drawn, {smaller} smaller ones are not."
    if cached:
        note += f" Not drawn: {cached} cases whose data fit the caches, for which memory sets no floor."
    if idle:
        note += f" Not drawn, because they compute nothing: {', '.join(idle)}."
    return note


def _roofs(source: Source) -> list[charts.Roof]:
    """The best of each ceiling; it is measured before and after."""
    best: dict[str, charts.Roof] = {}
    for c in source.record.ceilings:
        value, name = finite(c.get("value")), str(c.get("name"))
        if value and value > 0 and (name not in best or value > best[name].value):
            best[name] = charts.Roof(name, value, str(c.get("unit", "")).startswith("bytes"))
    return list(best.values())


def _moved(row: Row) -> float | None:
    known = [part for name in _BYTES if (part := finite(row.values.get(name))) is not None]
    return sum(known) if known else None


def _largest(spots: Sequence[tuple[float, charts.Spot]]) -> list[charts.Spot]:
    best: dict[str, tuple[float, charts.Spot]] = {}
    for moved, spot in spots:
        op = spot.label.partition("/")[0]
        if op not in best or moved > best[op][0]:
            best[op] = (moved, spot)
    return [spot for _, spot in best.values()]


def _table(joined: Joined, lines: Sequence[Line], numbers: dict[str, int]) -> Table:
    rows = []
    for line, source, row in cells.each(joined, lines):
        rows.append(
            (
                _name(line, numbers[line.key]),
                *cells.tag(joined, source),
                Cell(show("_bytes", _moved(row)), numeric=True),
                cells.value(row, "flops"),
                _floor(source, row),
                cells.speed(source, row, "median_s"),
                _spread(source, row),
                _share(source, row),
                Cell(row.evidence, "mute"),
            )
        )
    heads = ("bytes", "FLOPs", "floor", "median", "spread", "of the ceiling", "evidence")
    return Table(
        "Ops", ("op", *cells.tag_column(joined), *heads), tuple(rows), cells.commands(lines), folded=True
    )


def _name(line: Line, number: int) -> Cell:
    _, op, *case = line.key.split("/")
    return Cell(f"{number} {op}", note="/".join(case))


def _floor(source: Source, row: Row) -> Cell:
    found = finite(row.values.get("floor_s"))
    bound = row.values.get("bound") or row.setting.get("bound")
    if found is None or withheld(source, row) is not None:
        return Cell("in cache", "mute") if row.values.get("in_cache") is True else cells.MISSING
    return Cell(show("floor_s", found), note=f"by {bound}" if bound else "", numeric=True)


def _spread(source: Source, row: Row) -> Cell:
    median = finite(row.values.get("median_s"))
    low, high = ends(row, "median_s")
    if not median or withheld(source, row) is not None or low >= high:
        return cells.MISSING
    return Cell(percent((high - low) / median), numeric=True)


def _share(source: Source, row: Row) -> Cell:
    name = next((name for name in row.values if name.endswith("_of_ceiling")), None)
    if name is None or withheld(source, row) is not None:
        return Cell(ABSENT, "mute", numeric=True)
    return Cell(show(name, row.values[name]), numeric=True)
