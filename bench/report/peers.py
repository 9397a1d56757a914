"""Other engines of the same run: with speed where they computed the same model, else the reason and no speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined, Line, withheld
from v4sdk_bench.report.numbers import interval, name_of, show
from v4sdk_bench.report.page import Block, Cell, Section, Table
from v4sdk_bench.report.ratios import is_ratio
from v4sdk_bench.report.ratios import table as ratio_table
from v4sdk_bench.report.sources import Source

PREFIX = "model/peers/"
_LEAD = (
    "Other engines on the same machine, threads and token ids, each at the best of the settings that were tried; its row names "
    "them, and a quick run tries only the defaults. An engine whose logits are not those of the same model is not comparable "
    "and gets no speed."
)
# values of a speed row that say how it was measured rather than how fast it was
_HOW = ("tried", "settings", "environment", "chosen", "setting", "version", "load", "rounds", "spread")


def section(joined: Joined) -> Section | None:
    """Everything below `model/peers/`."""
    lines = joined.take(PREFIX)
    if not lines:
        return None
    ratios = [line for line in lines if is_ratio(line)]
    rest = cells.each(joined, [line for line in lines if not is_ratio(line)])
    wrong = {(s.label, engine(line)): row for line, s, row in rest if row.state == "failed"}
    good = [
        x
        for x in rest
        if x[2].state != "not run"
        and (x[1].label, engine(x[0])) not in wrong
        and withheld(x[1], x[2]) is None
    ]
    bad = [x for x in rest if x not in good]
    blocks: list[Block] = []
    timed = [x for x in good if _task(x[0]) is not None]
    if timed:
        blocks.append(_speeds(joined, timed, good))
    usable = [line for line in ratios if not any((label, _peer(line)) in wrong for label in line.rows)]
    if usable:
        blocks.append(ratio_table(joined, usable, "v4sdk beside each of them, in turns"))
    silenced = [line for line in ratios if line not in usable]
    if bad or silenced:
        blocks.append(_refused(joined, bad, wrong))
    if good:
        blocks.append(replace(_comparable(joined, good), folded=bool(timed)))
    return Section("peers", "Beside other engines", tuple(blocks), _LEAD, nav="Peers")


def _task(line: Line) -> str | None:
    """`prefill 512` of a key `model/peers/<model>/<engine>/prefill/512`, None for other rows."""
    parts = line.key.split("/")
    return f"{parts[4]} {parts[5]}" if len(parts) == 6 and parts[5].isdigit() else None


def _speeds(
    joined: Joined, timed: Sequence[tuple[Line, Source, Row]], good: Sequence[tuple[Line, Source, Row]]
) -> Table:
    """Engines by task: the rate, its interval below."""
    tasks = list(dict.fromkeys(task for line, _, _ in timed if (task := _task(line)) is not None))
    rows = []
    for name, label in dict.fromkeys((engine(line), source.label) for line, source, _ in timed):
        own = {
            _task(line): (source, row)
            for line, source, row in timed
            if (engine(line), source.label) == (name, label)
        }
        words = [
            r for line, s, r in good if (engine(line), s.label) == (name, label) and r.values.get("verdict")
        ]
        parity = (
            Cell(str(words[0].values["verdict"]), cells.TONES[words[0].state])
            if words
            else Cell("no parity row", "warn")
        )
        version = next(
            (str(row.values["version"]) for _, row in own.values() if row.values.get("version")), ""
        )
        who = Cell(
            name.rpartition("/")[2],
            note=" on ".join(part for part in (version, name.partition("/")[0]) if part),
        )
        rates = [_rate(*own[task]) if task in own else cells.MISSING for task in tasks]
        rows.append((who, *cells.tag(joined, joined.source(label)), parity, *rates))
    columns = ("engine", *cells.tag_column(joined), "parity", *tasks)
    note = (
        "Tokens per second of reading a prompt (prefill) and after as many tokens of context (decode). Each engine runs in a "
        "process of its own whose threads sleep between calls, so v4sdk's rates are not those of the section above."
    )
    return Table(
        "Speed beside other engines",
        columns,
        tuple(rows),
        cells.commands([line for line, _, _ in timed]),
        note,
    )


def _rate(source: Source, row: Row) -> Cell:
    low, high = row.values.get("low_tokens_per_s"), row.values.get("high_tokens_per_s")
    rate = Cell(
        show("tokens_per_s", row.values.get("tokens_per_s")),
        note=interval("tokens_per_s", low, high),
        numeric=True,
    )
    return rate if withheld(source, row) is None else cells.MISSING


def engine(line: Line) -> str:
    """Model and engine of a key `model/peers/<model>/<engine>/...`."""
    parts = line.key.split("/")
    return "/".join(parts[2:4])


def _peer(line: Line) -> str:
    """The same of a ratio, `model/peers/<model>/ratio/<engine>/...`."""
    parts = line.key.split("/")
    return "/".join([parts[2], *parts[4:5]])


def _comparable(joined: Joined, found: Sequence[tuple[Line, Source, Row]]) -> Table:
    rows = tuple(
        (
            Cell(line.what, note=line.key),
            *cells.tag(joined, source),
            Cell(
                str(row.values.get("verdict") or ""),
                cells.TONES[row.state] if row.values.get("verdict") else "",
            ),
            Cell(_facts(source, row), note=row.note),
            Cell(_how(row)),
        )
        for line, source, row in found
    )
    columns = ("engine and task", *cells.tag_column(joined), "parity", "found", "how")
    return Table(
        "Comparable, every row", columns, rows, cells.commands([line for line, _, _ in found]), form="stack"
    )


def _facts(source: Source, row: Row) -> str:
    kept = Row(
        row.key, row.what, row.state, row.evidence, {k: v for k, v in row.values.items() if k not in _HOW}
    )
    return str(cells.facts(source, kept))


def _how(row: Row) -> str:
    """Version and chosen setting; what else was tried is in the record."""
    said = [
        f"{name_of(n)} {show(n, row.values[n])}"
        for n in ("version", "chosen", "precision", "rounds", "load")
        if row.values.get(n)
    ]
    return "; ".join(said)


def _refused(
    joined: Joined, found: Sequence[tuple[Line, Source, Row]], wrong: dict[tuple[str, str], Row]
) -> Table:
    rows = []
    for line, source, row in found:
        blame = wrong.get((source.label, engine(line)))
        if row.state == "not run":
            said = Cell("not run", "mute"), Cell(row.note or "no reason given")
        else:
            reason = row.note or "its result is wrong"
            if blame is not None and row.state != "failed":
                reason = f"{blame.what}: {blame.note or 'wrong'}"
            said = Cell("not comparable", "bad"), Cell(reason, note=_parity(row))
        rows.append((Cell(line.what, note=line.key), *cells.tag(joined, source), *said))
    columns = ("engine and task", *cells.tag_column(joined), "state", "reason")
    commands = cells.commands([line for line, _, _ in found])
    return Table("Not comparable or not run, so without speed", columns, tuple(rows), commands, form="stack")


def _parity(row: Row) -> str:
    """What is left to say of an engine without speed."""
    told = {
        k: v
        for k, v in row.values.items()
        if not cells.is_speed(k) and k not in (*_HOW, "verdict") and v is not None
    }
    return "; ".join(f"{name_of(k)} {show(k, v)}" for k, v in told.items())
