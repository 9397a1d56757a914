"""Whole-model speed in a report: TTFT, TPOT and memory over context, then every other measurement of models and layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from v4sdk_bench.report import cells, charts
from v4sdk_bench.report.compare import Joined, Line, ends, signature, withheld
from v4sdk_bench.report.numbers import finite, show
from v4sdk_bench.report.page import Block, Cell, Figure, Figures, Section, Table, Text
from v4sdk_bench.report.ratios import is_ratio
from v4sdk_bench.report.sources import Source


@dataclass(frozen=True)
class Subject:
    """A model of one fingerprint, with the lines of its frontiers in ascending context."""

    name: str
    fingerprint: str
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Name and the first digits of the fingerprint."""
        return f"{self.name} ({self.fingerprint[:8]})" if self.fingerprint else self.name


def section(joined: Joined) -> Section | None:
    """TTFT, TPOT and memory over context, a chart each; then every other whole-model speed."""
    subjects = list(_subjects(joined))
    blocks: list[Block] = []
    for subject in subjects:
        if len(subjects) > 1:
            blocks.append(
                Text(f"{subject.title}: its own charts, because models of different values are not compared.")
            )
        of = f" of {subject.title}" if len(subjects) > 1 else ""
        drawn = tuple(f for f in (_chart(joined, subject, of, *which) for which in _CHARTS) if f is not None)
        if drawn:
            blocks.append(Figures(drawn))
        blocks.append(_frontiers(joined, subject))
    rest = [line for line in joined.take("model/", without=("model/peers/",)) if not is_ratio(line)]
    if rest:
        blocks.append(
            cells.by_record(
                "Other measurements of whole models and layers", joined, rest, cells.plain, folded=True
            )
        )
    if not blocks:
        return None
    lead = "TTFT is the time until the first token, TPOT that of every further one. Ranges are the 10th to the 90th percentile."
    return Section(
        "model", "How fast is the whole model, and what does it need?", tuple(blocks), lead, nav="Whole model"
    )


def _subjects(joined: Joined) -> Iterator[Subject]:
    found: dict[tuple[str, str], list[Line]] = {}
    for line in (ln for ln in joined.peek("model/") if "/frontier/" in ln.key):
        label, row = next(iter(line.rows.items()))
        mark = signature(joined.source(label), row).get("model fingerprint", '""')
        found.setdefault((line.key.split("/")[1], str(json.loads(mark) or "")), []).append(line)
    for key in [line.key for lines in found.values() for line in lines]:
        joined.take(key)
    for (name, fingerprint), lines in found.items():
        yield Subject(name, fingerprint, tuple(sorted(lines, key=lambda ln: (_tokens(ln), _is_made_up(ln)))))


def _is_made_up(line: Line) -> bool:
    """Its KV rows were drawn, not read."""
    return str(line.key).endswith("/synthetic")


def _tokens(line: Line) -> float:
    last = line.key.rpartition("/")[2]
    return finite(line.setting.get("tokens")) or (float(last) if last.isdigit() else 0.0)


# value, its title, what it is in words, unit
_CHARTS = (
    ("tpot_s", "Time per output token", "s"),
    ("ttft_s", "Time to first token", "s"),
    ("peak_bytes", "Memory: measured, and KV cache by formula", "B"),
)


def _chart(joined: Joined, subject: Subject, of: str, name: str, title: str, unit: str) -> Figure | None:
    series = []
    told = []
    for source in joined.sources:
        label = f"{source.label} {source.backend}" if len(joined.sources) > 1 else source.backend
        if unit == "B":
            series += [
                charts.Series(f"{label}, peak", _points(subject, source, "peak_bytes")),
                charts.Series(f"{label}, KV allocated", _both(subject, source, "kv_bytes")),
                charts.Series(
                    f"{label}, KV by formula", _both(subject, source, "kv_formula_bytes"), faint=True
                ),
            ]
        else:
            series.append(charts.Series(label, _points(subject, source, name)))
        if name == "tpot_s":
            series.append(
                charts.Series(f"{label}, made-up KV rows", _points(subject, source, name, made_up=True))
            )
    for one in series:
        if one.points and not one.faint:
            first, last = one.points[0], one.points[-1]
            said = (f"{show(name, p[1])} at {charts.tokens(p[0])}" for p in (first, last))
            told.append(f"{one.label}: {', '.join(dict.fromkeys(said))}")
    svg = charts.lines(f"{title}{of}", "; ".join(told), series, "context, tokens", unit)
    return (
        Figure(f"{title}{of}", svg, commands=cells.commands(subject.lines), note="; ".join(told))
        if svg
        else None
    )


def _both(subject: Subject, source: Source, name: str) -> tuple[tuple[float, float, float, float], ...]:
    """What the rows of so many tokens take, whether they were read or made up."""
    both = (_points(subject, source, name, made_up) for made_up in (True, False))
    return tuple(sorted({p[0]: p for points in both for p in points}.values()))


def _points(
    subject: Subject, source: Source, name: str, made_up: bool = False
) -> tuple[tuple[float, float, float, float], ...]:
    found = []
    for line in subject.lines:
        row = line.rows.get(source.label)
        if (
            _is_made_up(line) != made_up
            or row is None
            or row.state == "not run"
            or (cells.is_speed(name) and withheld(source, row))
        ):
            continue
        value = finite(row.values.get(name))
        if value and value > 0 and _tokens(line) > 0:
            low, high = ends(row, name) if name.endswith("_s") else (value, value)
            found.append((_tokens(line), value, low, high))
    return tuple(found)


def _frontiers(joined: Joined, subject: Subject) -> Table:
    rows = []
    for line, source, row in cells.each(joined, subject.lines):
        context = Cell(f"{int(_tokens(line)):,}", note="made-up KV rows" * _is_made_up(line), numeric=True)
        rows.append((context, *cells.tag(joined, source),
                     *cells.speeds(source, row, ("ttft_s", "tpot_s", "prefill_tokens_per_s")),
                     *(cells.value(row, n) for n in ("kv_bytes", "kv_formula_bytes", "peak_bytes")),
                     Cell(row.evidence, "mute")))  # fmt: skip
    columns = (
        "context",
        *cells.tag_column(joined),
        "TTFT",
        "TPOT",
        "prefill",
        "KV allocated",
        "KV by formula",
        "peak memory",
        "evidence",
    )
    setting = {
        k: v
        for k, v in subject.lines[0].setting.items()
        if k not in ("tokens", "fingerprint", "state", "model")
    }
    note = ", ".join(f"{k.replace('_', ' ')} {show(k, v)}" for k, v in setting.items())
    return Table(f"By context, {subject.title}", columns, tuple(rows), cells.commands(subject.lines), note)
