"""What others said: the ledger of claims, expert parallelism beside it, and speeds that are only cited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from v4sdk.errors import V4Error
from v4sdk_bench.claims.ledger import STATUSES, Claim, Figure, Ledger, ledger
from v4sdk_bench.report import cells
from v4sdk_bench.report.compare import Joined
from v4sdk_bench.report.numbers import ABSENT, digits, name_of, percent, show
from v4sdk_bench.report.page import Block, Cell, Section, Table, Text

EXPERT_PARALLEL = "claims/expert-parallel"


def read_ledger() -> tuple[Ledger | None, str]:
    """The ledger, or why there is none."""
    try:
        return ledger(), ""
    except V4Error as exc:
        return None, exc.message


def claims(joined: Joined) -> Section | None:
    """Every published claim of the ledger beside what was found."""
    known, why = read_ledger()
    if not joined.peek("claims/"):
        return None
    blocks: list[Block] = []
    if known is None:
        blocks.append(
            Text(f"The ledger of claims could not be read: {why}. Rows are listed without it.", "warn")
        )
    else:
        counts = {status: sum(c.status == status for c in known.claims) for status in STATUSES}
        blocks.append(
            Text(
                f"{len(known.claims)} claims: "
                + ", ".join(f"{n} {status}" for status, n in counts.items())
                + "."
            )
        )
        lines = joined.take(
            *(key for claim in known.claims for key in claim.keys), without=(EXPERT_PARALLEL,)
        )
        commands = cells.commands(lines)
        for status in STATUSES:
            of = [claim for claim in known.claims if claim.status == status]
            blocks.append(_brief(joined, f"Claims {status}", of, commands, folded=all(c.needs for c in of)))
        details = tuple(row for claim in known.claims for row in _details(joined, claim))
        columns = ("claim", "said", "compared", "method", *_found_heads(joined), "row")
        blocks.append(Table("Claims in full: words, source, method, keys", columns, details, commands, form="stack",
                            folded=True))  # fmt: skip
    rest = joined.take("claims/", without=(EXPERT_PARALLEL,))
    if rest:
        blocks.append(cells.by_record("Other rows of the suite", joined, rest, cells.plain, folded=True))
    return Section("claims", "What was claimed, and what was found", tuple(blocks), nav="Claims")


def _brief(
    joined: Joined, caption: str, of: Sequence[Claim], commands: tuple[str, ...], folded: bool
) -> Table:
    """A line for each figure: what, claimed, found; the reason only where a figure is not as claimed."""
    rows = tuple(
        (
            Cell(figure.what),
            Cell(_claimed(figure)),
            *(_short(_found(joined, at, figure)) for at in joined.labels),
        )
        for claim in of
        for figure in claim.figures
    )
    return Table(
        caption, ("figure", "claimed", *_found_heads(joined)), rows, commands, form="brief", folded=folded
    )


def _short(cell: Cell) -> Cell:
    return cell if cell.tone == "bad" else replace(cell, note="for information" if cell.tone == "" else "")


def _found_heads(joined: Joined) -> list[str]:
    return [head if head == "found" else f"found, {head}" for head in cells.headings(joined)]


def _details(joined: Joined, claim: Claim) -> list[tuple[Cell, ...]]:
    """One row for each figure of a claim, the first with all that is to say of the claim."""
    where = ", ".join(part for part in (claim.source.document, claim.source.section) if part)
    found = []
    for at, figure in enumerate(claim.figures):
        here = [_found(joined, label, figure) for label in joined.labels]
        about = ("", "", "")
        if at == 0:
            about = (claim.statement, claim.compares, claim.method)
        said = Cell(about[0], note=where if at == 0 else "", link=claim.source.url if at == 0 else "")
        note = f"needs {claim.needs}" if claim.needs and at == 0 else ""
        found.append((Cell(f"{figure.what}: {_claimed(figure)}"), said, Cell(about[1]), Cell(about[2]), *here,
                      Cell(f"{figure.key}, {claim.status}", note=note)))  # fmt: skip
    return found


def _claimed(figure: Figure) -> str:
    if isinstance(figure.claimed, tuple):
        low, high = (_quantity(end, figure.unit) for end in figure.claimed)
        number, _, unit = low.partition(" ")
        return f"{number} to {high}" if unit and high.endswith(f" {unit}") else f"{low} to {high}"
    return _quantity(figure.claimed, figure.unit)


def _quantity(value: float, unit: str) -> str:
    return (
        percent(value)
        if unit == "share"
        else digits(value)
        if unit == "absolute"
        else f"{digits(value)} {unit}"
    )


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
            _quantity(value, figure.unit),
            cells.TONES[row.state],
            "; ".join(p for p in (words, row.note) if p),
        )
    return Cell(row.state, cells.TONES[row.state], row.note)


def expert_parallel(joined: Joined) -> Section | None:
    """Rows of the exchange between ranks, under the names they have: none of them is the published ratio."""
    lines = joined.take(EXPERT_PARALLEL)
    if not lines:
        return None
    lead = (
        "Our own schedules against each other on this machine. The published ratios compare other things on other hardware; "
        "they stand among the claims."
    )
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
            Cell("; ".join(f"{name_of(k)} {show(k, v)}" for k, v in c.figures.items()) or ABSENT),
            Cell(", ".join(p for p in (c.source.document, c.source.section) if p), link=c.source.url),
        )
        for c in known.cited
    )  # fmt: skip
    columns = ("engine", "hardware", "model", "setting", "published", "source")
    lead = "Published by others, not measured by us, and not reproduced here. Nothing on this page is a ratio to any of them."
    table = Table("Published speeds with their sources", columns, rows, form="stack", folded=True)
    return Section(
        "cited", "Published by others, not measured by us", (table,), lead, True, "Published by others"
    )
