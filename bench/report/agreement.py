"""Parity in a report: how much of its limit each op, layer and bucket uses, whole-model agreement, invariances, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined, Line
from v4sdk_bench.report.numbers import ABSENT, digits, finite, name_of, show
from v4sdk_bench.report.page import Block, Cell, Section, Table, Tone
from v4sdk_bench.report.sources import Source

_MAP_COLUMNS = 9
_METRICS = (
    "kl_mean",
    "kl_p99",
    "kl_max",
    "top1",
    "top5",
    "relative_l2",
    "max_abs",
    "cosine_min",
    "positions",
)
_HEADS = (
    "KL mean",
    "KL p99",
    "KL max",
    "top-1",
    "top-5",
    "relative L2",
    "max abs",
    "least cosine",
    "positions",
)


def section(joined: Joined) -> Section | None:
    """Everything below `parity/`."""
    blocks: list[Block] = []
    for prefix, what, noun in (
        ("parity/op/", "Ops against their reference", "op"),
        ("parity/layer/", "Layers", "layer"),
    ):
        lines = joined.take(prefix)
        if lines:
            blocks += [heat(joined, lines, what, noun), _cases(joined, lines, f"{what}: every comparison")]
    whole = joined.take("parity/model/")
    buckets = [line for line in whole if _bucket(line.key) is not None]
    if buckets:
        blocks.append(heat(joined, buckets, "Whole model by position", "comparison"))
    summed = [line for line in whole if line not in buckets]
    if summed:
        blocks.append(_agreement(joined, summed, "Whole-model agreement"))
    if buckets:
        blocks.append(
            replace(_agreement(joined, buckets, "Whole-model agreement by position"), folded=bool(summed))
        )
    for prefix, title, note in (
        ("parity/invariance/", "Invariances: the same tokens by another way", ""),
        ("parity/task", "Task accuracy of the bundled model", ""),
        ("parity/onnx/", "Third witness: the exported graph in another runtime", ""),
    ):
        lines = joined.take(prefix)
        if lines:
            blocks.append(cells.by_record(title, joined, _bad_first(lines), cells.plain, note=note))
    lines = joined.take("parity/calibration/")
    if lines:
        told = "Roundings and mistakes planted in a trained model: where on the scale of words they fall."
        blocks.append(_agreement(joined, lines, "Calibration of the words", told))
    lines = joined.take("parity/")
    if lines:
        blocks.append(cells.by_record("Other comparisons", joined, _bad_first(lines), cells.plain))
    if not blocks:
        return None
    lead = "Each value is compared with its reference before any speed is told. A limit that is broken turns its row red."
    return Section("parity", "Is it the same model?", tuple(blocks), lead, nav="Parity")


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
        return rest[0], rest[1].split("-")[0] if len(rest) > 1 else ""
    if kind == "layer" and len(rest) == 4:
        return f"{rest[1]}, {rest[0]}", rest[2]
    if len(rest) > 1:
        return " ".join(rest[:-1]), rest[-1]
    return rest[0] if rest else kind, ""


def _bucket(key: str) -> str | None:
    """The bucket of positions at the end of a key."""
    last = key.rpartition("/")[2]
    return last if last[:1].isdigit() or last in ("beyond", "to-the-top-k-limit") else None


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


def _cases(joined: Joined, lines: Sequence[Line], caption: str) -> Table:
    rows = []
    for line, source, row in cells.each(joined, _bad_first(lines)):
        metrics = [cells.value(row, name) for name in ("max_abs", "relative_l2")]
        rest = {k: v for k, v in row.values.items() if k not in ("max_abs", "relative_l2", "verdict")}
        more = "; ".join(f"{name_of(k)} {show(k, v)}" for k, v in rest.items() if not cells.is_speed(k))
        rows.append((Cell(line.key.partition("/")[2].partition("/")[2]), *cells.tag(joined, source), *metrics, _limits(row),
                     cells.state(row), Cell(row.evidence, "mute"), Cell(more)))  # fmt: skip
    columns = (
        "case",
        *cells.tag_column(joined),
        "max abs",
        "relative L2",
        "limits",
        "state",
        "evidence",
        "also",
    )
    return Table(caption, columns, tuple(rows), cells.commands(lines), folded=True)


def _limits(row: Row) -> Cell:
    said = []
    for name, limit in row.limits.items():
        sign, plain = ("≥", name[2:]) if name.startswith(">=") else ("≤", name)
        said.append(f"{plain.replace('_', ' ')} {sign} {show(plain, limit)}")
    return Cell(", ".join(said) or "none", numeric=False)


def _agreement(joined: Joined, lines: Sequence[Line], caption: str, note: str = "") -> Table:
    used = [
        name
        for name in _METRICS
        if any(finite(r.values.get(name)) is not None for ln in lines for r in ln.rows.values())
    ]
    rows = []
    for line, source, row in cells.each(joined, _bad_first(lines)):
        rows.append((Cell(line.what, note=line.key), *cells.tag(joined, source), _word(source, row),
                     *(cells.value(row, name) for name in used), Cell(_others(row, used))))  # fmt: skip
    heads = [_HEADS[_METRICS.index(name)] for name in used]
    columns = ("comparison", *cells.tag_column(joined), "verdict", *heads, "also")
    return Table(caption, columns, tuple(rows), cells.commands(lines), note)


def _word(source: Source, row: Row) -> Cell:
    word = str(
        row.values.get("verdict") or {"ok": "within limits", "info": "no limit"}.get(row.state, row.state)
    )
    return Cell(word, cells.TONES[row.state], row.note)


def _others(row: Row, used: Sequence[str]) -> str:
    """Values that are no metric: the first differing token and its margin, route and index sets."""
    rest = {
        k: v
        for k, v in row.values.items()
        if k not in (*used, "verdict") and v is not None and not cells.is_speed(k)
    }
    return "; ".join(f"{name_of(k)} {show(k, v)}" for k, v in rest.items())


def _bad_first(lines: Sequence[Line]) -> list[Line]:
    order = {"failed": 0, "ok": 1, "info": 1, "not run": 2}
    return sorted(lines, key=lambda line: min(order[row.state] for row in line.rows.values()))
