"""Which of two is faster: interleaved ratios of one process with their noise, and records against records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import NOISE_LIMIT, Comparison, Incomparable, Joined, Line, withheld
from v4sdk_bench.report.numbers import digits, finite, name_of, percent, show
from v4sdk_bench.report.page import Block, Cell, Section, Table, Text
from v4sdk_bench.report.sources import Source


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
    rows = []
    for line, source, row in cells.each(joined, lines):
        for ratio, low, high, noise in _ratios_of(row):
            word = ratio_verdict(source, row, ratio, low, high, noise)
            telling = withheld(source, row) is None
            rows.append((Cell(line.what, note=line.key), *cells.tag(joined, source),
                         Cell(show("_ratio", ratio), numeric=True) if telling else Cell("no ratio", "bad"),
                         Cell(f"{digits(low)} to {digits(high)}", numeric=True) if telling else cells.MISSING,
                         Cell(show("noise", noise), "bad" if noise > NOISE_LIMIT else "", numeric=True), Cell(word),
                         Cell(row.evidence, "mute")))  # fmt: skip
    if not rows:
        return None
    columns = (
        "a against b",
        *cells.tag_column(joined),
        "ratio",
        "10th to 90th percentile",
        "noise floor",
        "verdict",
        "evidence",
    )
    lead = (
        "Both sides ran in turns in one process. The noise floor is the same build against itself in the same rounds; a difference "
        "below it is no difference, and above 10% of noise there is no verdict."
    )
    table = Table("Ratios", columns, tuple(rows), cells.commands(lines))
    return Section("ratios", "Which of two is faster?", (table,), lead)


def _ratios_of(row: Row) -> Iterator[tuple[float, float, float, float]]:
    for name, found in row.values.items():
        ratio = finite(found)
        prefix = name.removesuffix("speed_ratio")
        if ratio is None or prefix == name:
            continue
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
    return (
        str(told)
        if told
        else f"b is {digits(ratio)} times faster"
        if ratio > 1
        else f"a is {digits(1 / ratio)} times faster"
    )


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
        note = "From separate runs, so the interval is the widest that both spreads allow. Interleaved ratios of one process are above."
        commands = tuple(dict.fromkeys(s.record.command for s in joined.sources))
        blocks.append(Table("Speeds of comparable rows", columns, rows, commands, note))
    else:
        blocks.append(Text("No two speeds of these records can be compared.", "warn"))
    if refused:
        rows = tuple(_refusals(refused))
        blocks.append(Table("Not compared, and why", ("what", "records", "reason"), rows, form="stack"))
    lead = "Rows are compared only if they have the same setting and model, and both sides are right."
    return Section("across", "Record against record", tuple(blocks), lead)


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
