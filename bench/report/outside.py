"""What others said and built: the ledger of claims, peers in the same run, expert parallelism, and speeds that are only cited."""

from __future__ import annotations

from collections.abc import Sequence

from v4sdk.errors import V4Error
from v4sdk_bench.claims import Claim, Figure, Ledger, ledger
from v4sdk_bench.record import Row
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined, Line, withheld
from v4sdk_bench.report.numbers import ABSENT, digits, show
from v4sdk_bench.report.page import Block, Cell, Section, Table, Text, Tone
from v4sdk_bench.report.sources import Source

EXPERT_PARALLEL = "claims/expert-parallel"
PEERS = "model/peers/"
_STATUS_TONES: dict[str, Tone] = {
    "measured here": "good",
    "reproduced by arithmetic": "good",
    "not testable here": "mute",
}


def read_ledger() -> tuple[Ledger | None, str]:
    """The ledger, or why there is none."""
    try:
        return ledger(), ""
    except V4Error as exc:
        return None, exc.message


def peers(joined: Joined) -> Section | None:
    """Other engines of the same run: with speed where they computed the same, else the reason and no speed."""
    lines = joined.take(PEERS)
    rows_of = cells.each(joined, lines)
    good = [(ln, s, r) for ln, s, r in rows_of if _not_comparable(s, r) is None]
    bad = [(ln, s, r) for ln, s, r in rows_of if _not_comparable(s, r) is not None]
    if not rows_of:
        return None
    blocks: list[Block] = []
    if good:
        rows = tuple(
            (Cell(ln.what, note=ln.key), *cells.tag(joined, s), Cell(str(r.values.get("verdict") or "measured"), cells.TONES[r.state]),
             Cell(cells.facts(s, r, 30), note=_how(r)))
            for ln, s, r in good
        )  # fmt: skip
        columns = ("engine and task", *cells.tag_column(joined), "parity", "found")
        blocks.append(
            Table("Comparable", columns, rows, cells.commands([ln for ln, _, _ in good]), form="stack")
        )
    if bad:
        rows = tuple(
            (Cell(ln.what, note=ln.key), *cells.tag(joined, s), Cell("not comparable", "bad" if r.state == "failed" else "mute"),
             Cell(_not_comparable(s, r) or "", note=_parity_only(r)))
            for ln, s, r in bad
        )  # fmt: skip
        columns = ("engine and task", *cells.tag_column(joined), "", "reason")
        blocks.append(
            Table(
                "Not comparable, so without speed",
                columns,
                rows,
                cells.commands([ln for ln, _, _ in bad]),
                form="stack",
            )
        )
    lead = "Other engines on the same machine, threads and token ids, each at the best of its documented settings. An engine whose logits are not those of the same model gets no speed."
    return Section("peers", "Beside other engines", tuple(blocks), lead)


def _not_comparable(source: Source, row: Row) -> str | None:
    if row.values.get("comparable") is False:
        return str(
            row.values.get("reason") or row.note or "the engine's result is not that of the same model"
        )
    if row.values.get("verdict") in ("different model",):
        return row.note or "the engine computes a different model"
    why = withheld(source, row)
    if why is None:
        return None
    return f"{why}: {row.note}" if row.note and row.note not in why else why


def _parity_only(row: Row) -> str:
    """What is left to say of a peer without speed."""
    return "; ".join(
        f"{k.replace('_', ' ')} {show(k, v)}"
        for k, v in row.values.items()
        if not cells.is_speed(k) and v is not None
    )


def _how(row: Row) -> str:
    return "; ".join(
        part
        for part in (
            ", ".join(f"{k.replace('_', ' ')} {show(k, v)}" for k, v in row.setting.items()),
            row.note,
        )
        if part
    )


def claims(joined: Joined) -> Section | None:
    """Every published claim of the ledger beside what was found."""
    known, why = read_ledger()
    blocks: list[Block] = []
    if known is None and joined.peek("claims/"):
        blocks.append(
            Text(f"The ledger of claims could not be read: {why}. Rows are listed without it.", "warn")
        )
    if known is not None and joined.peek("claims/"):
        shown = [row for claim in known.claims for row in _claim_rows(joined, claim)]
        counts = {status: sum(c.status == status for c in known.claims) for status in _STATUS_TONES}
        blocks.append(
            Text(
                f"{len(known.claims)} claims: "
                + ", ".join(f"{n} {status}" for status, n in counts.items())
                + "."
            )
        )
        columns = (
            "claim",
            "status",
            "claimed",
            *(f"found, {h}" if h != "found" else h for h in cells.headings(joined)),
            "how",
        )
        lines = joined.take(
            *(key for claim in known.claims for key in claim.keys), without=(EXPERT_PARALLEL,)
        )
        blocks.append(Table("Claims", columns, tuple(shown), cells.commands(lines), form="stack"))
    rest = joined.take("claims/", without=(EXPERT_PARALLEL,))
    if rest:
        blocks.append(cells.by_record("Other rows of the suite", joined, rest, cells.plain))
    if not blocks:
        return None
    return Section("claims", "What was claimed, and what was found", tuple(blocks))


def _claim_rows(joined: Joined, claim: Claim) -> list[tuple[Cell, ...]]:
    found = []
    for at, figure in enumerate(claim.figures):
        where = ", ".join(part for part in (claim.source.document, claim.source.section) if part)
        said = Cell(
            claim.statement if at == 0 else "the same claim",
            note=f"{figure.what}; {where}",
            link=claim.source.url,
        )
        status = Cell(
            claim.status, _STATUS_TONES.get(claim.status, ""), f"needs {claim.needs}" if claim.needs else ""
        )
        here = [_found(joined, label, figure) for label in joined.labels]
        how = Cell(f"{claim.compares}. {claim.method}" if at == 0 else "as above", note=figure.key)
        found.append((said, status, Cell(_claimed(figure), numeric=True), *here, how))
    return found


def _claimed(figure: Figure) -> str:
    if isinstance(figure.claimed, tuple):
        return f"{digits(figure.claimed[0])} to {digits(figure.claimed[1])} {figure.unit}"
    return f"{digits(figure.claimed)} {figure.unit}"


def _found(joined: Joined, label: str, figure: Figure) -> Cell:
    row = joined.source(label).record.row(figure.key)
    if row is None:
        return Cell("not in this record", "mute")
    if row.state == "not run":
        return Cell("not run", "mute", row.note)
    value = row.values.get("found")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        words = {"ok": "as claimed", "failed": "not as claimed", "info": "for information"}[row.state]
        return Cell(
            f"{digits(value)} {figure.unit}",
            cells.TONES[row.state],
            "; ".join(p for p in (words, row.note) if p),
        )
    return Cell(row.state, cells.TONES[row.state], row.note)


def expert_parallel(joined: Joined) -> Section | None:
    """Rows of the exchange between ranks, under the names they have: none of them is the published ratio."""
    lines: Sequence[Line] = joined.take(EXPERT_PARALLEL)
    if not lines:
        return None
    lead = "Our own schedules against each other on this machine. The published ratios compare other things on other hardware; they stand in the claims above."
    table = cells.by_record("Expert parallelism", joined, lines, cells.plain)
    return Section("expert-parallel", "Expert parallelism", (table,), lead)


def cited() -> Section | None:
    """Speeds that others published, apart from everything measured."""
    known, _ = read_ledger()
    if known is None or not known.cited:
        return None
    rows = tuple(
        (
            Cell(c.engine), Cell(c.hardware), Cell(c.model), Cell(c.setting),
            Cell("; ".join(f"{k.replace('_', ' ')} {show(k, v)}" for k, v in c.figures.items()) or ABSENT),
            Cell(", ".join(p for p in (c.source.document, c.source.section) if p), link=c.source.url),
        )
        for c in known.cited
    )  # fmt: skip
    columns = ("engine", "hardware", "model", "setting", "published", "source")
    lead = "Published by others, not measured by us, and not reproduced here. Nothing on this page is a ratio to any of them."
    table = Table("Published by others, not measured by us", columns, rows, form="stack")
    return Section("cited", "Published by others, not measured by us", (table,), lead, foreign=True)
