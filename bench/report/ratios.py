"""Which of two is faster: interleaved ratios of one process with their noise, and records against records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import NOISE_LIMIT, Comparison, Incomparable, Joined, Line, withheld
from v4sdk_bench.report.numbers import digits, finite, name_of, percent, show
from v4sdk_bench.report.page import Block, Cell, Section, Table, Text
from v4sdk_bench.report.sources import Source

# rows of a comparison beyond these fold below their summary
_MANY = 12


def is_ratio(line: Line) -> bool:
    """Two builds in the same rounds, with the noise of one against itself."""
    return any(name.endswith("_ratio") for row in line.rows.values() for name in row.values) and any(
        "noise" in name for row in line.rows.values() for name in row.values
    )


def section(joined: Joined) -> Section | None:
    """Interleaved A/B ratios of one process."""
    lines = [
        line
        for line in joined.peek("ops/", "model/", "device/")
        if is_ratio(line) and "/peers/" not in line.key
    ]
    for line in lines:
        joined.take(line.key)
    if not lines:
        return None
    lead = (
        "Both sides ran in turns in one process. The noise floor is the same build against itself in the same rounds; a "
        "difference below it is no difference, and above 10% of noise there is no verdict."
    )
    return Section("ratios", "Which of two is faster?", (table(joined, lines, "Ratios"),), lead, nav="Ratios")


def table(joined: Joined, lines: Sequence[Line], caption: str) -> Table:
    """Ratios with their spread, their noise floor, and what may be concluded."""
    rows = []
    for line, source, row in cells.each(joined, lines):
        for ratio, low, high, noise in _ratios_of(row):
            silent = withheld(source, row) is not None
            rows.append(
                (
                    Cell(line.what, note=line.key),
                    *cells.tag(joined, source),
                    Cell("no ratio", "bad" if row.state == "failed" else "warn", numeric=True)
                    if silent
                    else Cell(show("_ratio", ratio), numeric=True),
                    cells.MISSING if silent else Cell(f"{digits(low)} to {digits(high)}", numeric=True),
                    Cell(show("noise", noise), "warn" if noise > NOISE_LIMIT else "", numeric=True),
                    Cell(ratio_verdict(source, row, ratio, low, high, noise)),
                    Cell(row.evidence, "mute"),
                )
            )
    heads = ("ratio", "10th to 90th percentile", "noise floor", "verdict", "evidence")
    columns = ("a over b", *cells.tag_column(joined), *heads)
    return Table(caption, columns, tuple(rows), cells.commands(lines), form="stack")


def _ratios_of(row: Row) -> Iterator[tuple[float, float, float, float]]:
    """Every ratio of a row with its ends and its noise; `x_speed_ratio` has `x_low_ratio`, `x_high_ratio`, `x_noise`."""
    for name, found in row.values.items():
        ratio = finite(found)
        if ratio is None or not name.endswith("_ratio") or name.endswith(("low_ratio", "high_ratio")):
            continue
        prefix = name.removesuffix("speed_ratio") if name.endswith("speed_ratio") else ""
        low, high = (finite(row.values.get(f"{prefix}{end}_ratio")) for end in ("low", "high"))
        noise = finite(row.values.get(f"{prefix}noise"))
        yield (
            ratio,
            ratio if low is None else low,
            ratio if high is None else high,
            0.0 if noise is None else noise,
        )


def ratio_verdict(source: Source, row: Row, ratio: float, low: float, high: float, noise: float) -> str:
    """In words; a verdict in the record is taken only where the numbers carry it."""
    why = withheld(source, row)
    if noise > NOISE_LIMIT:
        return f"no verdict: the same build differs from itself by {percent(noise)}"
    if why:
        return f"no verdict: {why}"
    if abs(ratio - 1) <= noise or low <= 1 <= high:
        return f"no difference (noise {percent(noise)}, rounds from {digits(low)} to {digits(high)})"
    told = row.values.get("verdict")
    if told or ratio <= 0:
        return str(told or "no verdict: a ratio is above 0")
    return f"b is {digits(ratio)} times faster" if ratio > 1 else f"a is {digits(1 / ratio)} times faster"


def across(joined: Joined, found: Sequence[Comparison], refused: Sequence[Incomparable]) -> Section | None:
    """Records against each other, and what was refused."""
    if len(joined.sources) < 2:
        return None
    blocks: list[Block] = []
    if found:
        rows = tuple(
            (Cell(c.what, note=c.key), Cell(name_of(c.quantity)), _side(joined, c, c.left, c.left_value),
             _side(joined, c, c.right, c.right_value), Cell(f"{digits(c.ratio)}×", numeric=True), Cell(c.verdict))
            for c in found
        )  # fmt: skip
        columns = ("what", "quantity", "first", "second", "second against first", "verdict")
        note = "From separate runs, so the interval is the widest that both spreads allow; ratios within one process stand below."
        commands = tuple(dict.fromkeys(s.record.command for s in joined.sources))
        blocks.append(_summary(found, commands))
        blocks.append(
            Table("Speeds of comparable rows", columns, rows, commands, note, folded=len(rows) > _MANY)
        )
    else:
        blocks.append(Text("No two speeds of these records can be compared.", "warn"))
    if refused:
        rows = tuple(_refusals(refused))
        blocks.append(Table("Not compared, and why", ("what", "records", "reason"), rows, form="stack"))
    lead = "Rows are compared only if they have the same setting and model, and both sides are right."
    return Section("across", "Record against record", tuple(blocks), lead, nav="Records")


def _summary(found: Sequence[Comparison], commands: tuple[str, ...]) -> Table:
    """By pair, suite and quantity: how often which is faster, and by how much."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for c in found:
        groups.setdefault((c.left, c.right, c.key.partition("/")[0], c.quantity), []).append(c)
    rows = []
    for (left, right, suite, quantity), group in groups.items():
        ratios = [c.ratio for c in group]
        even = sum("no difference" in c.verdict for c in group)
        ahead = sum(c.ratio > 1 and "no difference" not in c.verdict for c in group)
        counts = (
            (ahead, f"{right} faster in"),
            (len(group) - ahead - even, f"{left} faster in"),
            (even, "no difference in"),
        )
        rows.append(
            (
                Cell(f"{right} against {left}, {suite}: {name_of(quantity)}"),
                Cell(str(len(group)), numeric=True),
                Cell(f"{digits(median(ratios))}×", numeric=True),
                Cell(f"{digits(min(ratios))} to {digits(max(ratios))}", numeric=True),
                Cell(", ".join(f"{words} {count}" for count, words in counts if count)),
            )
        )
    columns = ("records", "rows compared", "times as fast, median", "least to most", "verdicts")
    return Table("Which record is faster", columns, tuple(rows), commands)


def _side(joined: Joined, c: Comparison, label: str, value: float) -> Cell:
    source = joined.source(label)
    threads = source.record.machine.get("threads")
    beside = f", {threads} threads" if threads is not None else ""
    return Cell(f"{label} {show(c.quantity, value)}", note=f"{source.backend}{beside}", numeric=True)


def _refusals(refused: Sequence[Incomparable]) -> Iterator[tuple[Cell, ...]]:
    """One line per reason and pair; the subjects it holds for are named, the first few of them."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for one in refused:
        grouped.setdefault((one.left, one.right, one.reason), []).append(one.subject)
    for (left, right, reason), subjects in grouped.items():
        names = list(dict.fromkeys(subjects))
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield Cell(", ".join(names[:6]) + more), Cell(f"{left} and {right}"), Cell(reason, "warn")
