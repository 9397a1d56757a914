"""What was measured with: machine, versions, models, ceilings, words of evidence; and what is missing from a record."""

from __future__ import annotations

from typing import Any

from v4sdk_bench.record import SUITES, Record
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined
from v4sdk_bench.report.numbers import ABSENT, finite, interval, seconds, show
from v4sdk_bench.report.page import Cell, Section, Table, unique

# more of them fold below their number
_MANY = 8
EVIDENCE = {
    "reference": "the plain torch definition of the op computed it",
    "schema": "the vendor's op exists with these arguments",
    "meta": "its shapes and dtypes were accepted",
    "emulated": "its arithmetic ran on a CPU",
    "compiled": "a compiler for the device took it",
    "device": "it ran on the device, whose UUID, driver and kernel times are in the record",
    "none": "it was not run",
}


def section(joined: Joined) -> Section:
    """Machine, versions, models, ceilings, and the words of evidence."""
    blocks = [
        _who(joined), *([_models(joined)] if any(s.record.models for s in joined.sources) else []),
        *([_ceilings(joined)] if any(s.record.ceilings for s in joined.sources) else []), _legend(),
    ]  # fmt: skip
    return Section("identity", "What was measured, and on what", tuple(blocks), nav="Machine and versions")


def _who(joined: Joined) -> Table:
    names: list[tuple[str, list[str]]] = [
        ("file", [s.path for s in joined.sources]),
        ("backend", [s.backend for s in joined.sources]),
        ("started", [s.record.started for s in joined.sources]),
        ("finished", [s.record.finished or f"not finished ({s.record.status})" for s in joined.sources]),
        ("budgets", ["quick" if s.record.options.get("quick") else "full" for s in joined.sources]),
    ]
    for part, title in (("device", "device "), ("machine", ""), ("software", "")):
        dicts = [getattr(s.record, part) or {} for s in joined.sources]
        for key in dict.fromkeys(key for found in dicts for key in found):
            names.append(
                (title + key.replace("_", " ").removesuffix(" bytes"), [show(key, d.get(key)) for d in dicts])
            )
    for key in dict.fromkeys(key for s in joined.sources for key in s.record.options):
        if key not in ("backend", "quick"):
            said = [s.record.options.get(key) for s in joined.sources]
            names.append((f"option {key}", [ABSENT if v in (None, [], {}) else show(key, v) for v in said]))
    rows = []
    for name, values in names:
        differs = len(set(values)) > 1
        rows.append((Cell(name, note="differs" if differs and name not in ("file", "started", "finished") else ""),
                     *(Cell(v) for v in values)))  # fmt: skip
    heads = [s.label for s in joined.sources] if len(joined.sources) > 1 else ["value"]
    return Table(
        "Machine, software and options",
        ("", *heads),
        tuple(rows),
        unique(s.record.command for s in joined.sources),
        folded=len(joined.sources) == 1,
    )


def _models(joined: Joined) -> Table:
    rows = []
    for name in dict.fromkeys(name for s in joined.sources for name in s.record.models):
        for source in joined.sources:
            about = source.record.models.get(name)
            if about is not None:
                rest = ", ".join(
                    f"{k.replace('_', ' ')} {show(k, v)}" for k, v in about.items() if k != "fingerprint"
                )
                mark = Cell(str(about.get("fingerprint", ABSENT))[:16])
                rows.append((Cell(name), *cells.tag(joined, source), mark, Cell(rest)))
    note = "Rows of two records are put together only where the fingerprint of the model is the same."
    columns = ("model", *cells.tag_column(joined), "fingerprint", "about")
    return Table("Models", columns, tuple(rows), note=note, form="stack")


def _ceilings(joined: Joined) -> Table:
    """The best of each, and the range of all measurements of it: it is taken before and after what it judges."""
    rows: list[tuple[Cell, ...]] = []
    for source in joined.sources:
        for name in dict.fromkeys(str(c.get("name", ABSENT)) for c in source.record.ceilings):
            same = [c for c in source.record.ceilings if str(c.get("name", ABSENT)) == name]
            best = max(same, key=lambda c: finite(c.get("value")) or 0.0)
            unit = str(best.get("unit", ""))
            ends = [x for c in same for x in (finite(c.get("low")), finite(c.get("high"))) if x is not None]
            rows.append(
                (
                    Cell(name, note=str(best.get("how") or "")),
                    *cells.tag(joined, source),
                    Cell(show(unit, best.get("value")), numeric=True),
                    Cell(interval(unit, min(ends), max(ends)) if ends else ABSENT, numeric=True),
                    Cell(str(len(same)), numeric=True),
                    Cell(show("threads", best.get("threads")), numeric=True),
                    Cell(show("buffer_bytes", best.get("buffer_bytes")), numeric=True),
                    Cell(str(best.get("date", ABSENT))[:19]),
                )
            )
    heads = ("reached", "10th to 90th percentile", "measured", "threads", "buffer", "when, UTC")
    note = "Measured in the same run as everything that is given as a share of it, before and after."
    command = unique(s.record.command for s in joined.sources)
    return Table(
        "Ceilings of the machine", ("ceiling", *cells.tag_column(joined), *heads), tuple(rows), command, note
    )


def _legend() -> Table:
    rows = tuple((Cell(word), Cell(meaning)) for word, meaning in EVIDENCE.items())
    return Table(
        "Words of evidence, weakest first",
        ("word", "what stands behind a value"),
        rows,
        form="stack",
        folded=True,
    )


def not_run(joined: Joined) -> Section | None:
    """Everything that has no result, with the reason."""
    rows: list[tuple[Cell, ...]] = []
    for source in joined.sources:
        rows += [
            (Cell(row.what, note=row.key), *cells.tag(joined, source), Cell(row.note or "no reason given"))
            for row in source.record.rows
            if row.state == "not run"
        ]
        rows += [
            (
                Cell(f"stage {name}"),
                *cells.tag(joined, source),
                Cell(f"{stage.get('state')}: {stage.get('note') or 'no reason given'}"),
            )
            for name, stage in source.record.stages.items()
            if stage.get("state") != "done"
        ]
        begun = {name.partition("/")[0] for name in source.record.stages} | {
            row.suite for row in source.record.rows
        }
        suites = source.record.options.get("suites")
        chosen = suites if isinstance(suites, list) else []
        rows += [
            (
                Cell(f"suite {suite}"),
                *cells.tag(joined, source),
                Cell(_why_no_suite(source.record, suite, chosen)),
            )
            for suite in SUITES
            if suite not in begun
        ]
    if not rows:
        return None
    columns = ("what", *cells.tag_column(joined), "reason")
    table = Table("What was not run, and why", columns, tuple(rows), form="stack", folded=len(rows) > _MANY)
    return Section("not-run", "What was not run", (table,), nav="Not run")


def _why_no_suite(record: Record, suite: str, chosen: Any) -> str:
    if suite in chosen:
        return f"the run ended before it ({record.status})"
    return "not chosen" + (" (it needs an accelerator)" if suite == "device" else "")


def stages(joined: Joined) -> Table | None:
    """What each stage cost."""
    rows = [
        (
            Cell(name), *cells.tag(joined, source),
            Cell(str(stage.get("state", ABSENT)), "bad" if stage.get("state") == "broken" else ""),
            Cell(_time(stage.get("seconds")), numeric=True), Cell(_time(stage.get("budget_s")), numeric=True),
        )
        for source in joined.sources
        for name, stage in source.record.stages.items()
    ]  # fmt: skip
    columns = ("stage", *cells.tag_column(joined), "state", "took", "budget")
    return (
        Table("Stages", columns, tuple(rows), unique(s.record.command for s in joined.sources), folded=True)
        if rows
        else None
    )


def _time(value: Any) -> str:
    return str(ABSENT if finite(value) is None else seconds(value))
