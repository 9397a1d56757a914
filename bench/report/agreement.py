"""Parity in a report: how much of its limit each op, layer and bucket uses, whole-model agreement, invariances, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined, Line
from v4sdk_bench.report.heat import heat
from v4sdk_bench.report.numbers import finite, name_of, show
from v4sdk_bench.report.page import Block, Cell, Section, Table
from v4sdk_bench.report.sources import Source

_METRICS = (
    "kl_mean", "kl_mean_everywhere", "kl_p99", "kl_max", "top1", "top5", "relative_l2", "max_abs", "cosine_min", "positions",
)  # fmt: skip


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
    summed = [line for line in whole if line not in buckets and _has_metrics(line)]
    others = [line for line in whole if line not in buckets and line not in summed]
    if summed:
        blocks.append(replace(_agreement(joined, summed, "Whole-model agreement"), folded=bool(buckets)))
    if buckets:
        blocks.append(
            replace(_agreement(joined, buckets, "Whole-model agreement by position"), folded=bool(summed))
        )
    if others:
        blocks.append(
            cells.by_record(
                "Experts, picked entries and greedy tokens",
                joined,
                _bad_first(others),
                cells.plain,
                folded=True,
            )
        )
    invariances = joined.take("parity/invariance/")
    if invariances:
        blocks.append(_invariances(joined, invariances))
    lines = joined.take("parity/task")
    if lines:
        asked = cells.by_record("Task accuracy of the bundled model", joined, _bad_first(lines), _task)
        blocks.append(replace(asked, form="brief"))
    lines = joined.take("parity/onnx/")
    if lines:
        title = "Third witness: the exported graph in another runtime"
        blocks.append(cells.by_record(title, joined, _bad_first(lines), cells.plain, folded=True))
    lines = joined.take("parity/calibration/")
    if lines:
        told = "Roundings and mistakes planted in a trained model: do the words above tell them apart?"
        blocks.append(
            cells.by_record(
                "Calibration of the words", joined, _bad_first(lines), cells.plain, note=told, folded=True
            )
        )
    lines = joined.take("parity/")
    if lines:
        golden = all(line.key.startswith("parity/golden/") for line in lines)
        title = "Recorded activations of the official forward pass" if golden else "Other comparisons"
        blocks.append(cells.by_record(title, joined, _bad_first(lines), cells.plain, folded=True))
    if not blocks:
        return None
    lead = "Each value is compared with its reference before any speed is told. A limit that is broken turns its row red."
    return Section("parity", "Is it the same model?", tuple(blocks), lead, nav="Parity")


def _bucket(key: str) -> str | None:
    """The bucket of positions at the end of a key."""
    last = key.rpartition("/")[2]
    return last if last[:1].isdigit() or last in ("beyond", "to-the-top-k-limit") else None


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


def _has_metrics(line: Line) -> bool:
    return any(
        finite(row.values.get("kl_mean")) is not None and "positions" in row.values
        for row in line.rows.values()
    )


def _invariances(joined: Joined, lines: Sequence[Line]) -> Table:
    """One row per invariance, one column per numerics option and record."""
    options = list(dict.fromkeys(line.key.split("/")[2] for line in lines))
    # lines of one key differ in model or setting: each set of records has rows of its own
    groups: dict[tuple[str, tuple[str, ...]], dict[str, Line]] = {}
    for line in lines:
        option, *name = line.key.split("/")[2:]
        groups.setdefault((" ".join(name), tuple(line.rows)), {})[option] = line
    rows = []
    for (name, _), same in groups.items():
        found = []
        for option in options:
            for label in joined.labels:
                row = same[option].rows.get(label) if option in same else None
                found.append(cells.MISSING if row is None else _invariance(joined.source(label), row))
        rows.append((Cell(next(iter(same.values())).what.partition(";")[0], note=name), *found))
    rows.sort(key=lambda row: all(cell.tone != "bad" for cell in row))
    heads = [
        f"{option} {label}" if len(joined.sources) > 1 else option
        for option in options
        for label in joined.labels
    ]
    caption = "Invariances: the same tokens by another way"
    return Table(caption, ("what", *heads), tuple(rows), cells.commands(lines), form="stack", folded=True)


def _invariance(source: Source, row: Row) -> Cell:
    if row.state == "not run":
        return Cell("not run", "mute", row.note)
    told = [name.removeprefix(">=") for name in row.limits] or ["max_abs"]
    values = "; ".join(f"{name_of(name)} {show(name, row.values.get(name))}" for name in told)
    return Cell(str(row.values.get("verdict") or _state(row)), cells.TONES[row.state], values)


def _task(source: Source, row: Row) -> Cell:
    share, right, asked = (row.values.get(name) for name in ("accuracy", "right", "asked"))
    if finite(share) is None or row.state == "not run":
        told: Cell = cells.plain(source, row)
        return told
    counted = f"{show('right', right)} of {show('asked', asked)}" if asked is not None else ""
    return Cell(
        show("accuracy", share),
        cells.TONES[row.state],
        "; ".join(part for part in (counted, row.note) if part),
    )


def _state(row: Row) -> str:
    return {"ok": "within limits", "info": "no limit"}.get(row.state, str(row.state))


def _agreement(joined: Joined, lines: Sequence[Line], caption: str, note: str = "") -> Table:
    told = [row for line in lines for row in line.rows.values()]
    used = [name for name in _METRICS if any(finite(row.values.get(name)) is not None for row in told)]
    more = any(_others(row, used) for row in told)
    rows = []
    for line, source, row in cells.each(joined, _bad_first(lines)):
        metrics = (cells.value(row, name) for name in used)
        also = (Cell(_others(row, used)),) if more else ()
        rows.append((_pair(line, row), *cells.tag(joined, source), _word(source, row), *metrics, *also))
    columns = (
        "comparison",
        *cells.tag_column(joined),
        "verdict",
        *(name_of(name) for name in used),
        *(("also",) if more else ()),
    )
    return Table(caption, columns, tuple(rows), cells.commands(lines), note)


def _pair(line: Line, row: Row) -> Cell:
    """The two sides; the verdict has its own column."""
    return Cell(line.what.removesuffix(f": {row.values.get('verdict')}"), note=line.key)


def _word(source: Source, row: Row) -> Cell:
    return Cell(str(row.values.get("verdict") or _state(row)), cells.TONES[row.state], row.note)


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
