"""What others said: the ledger of claims, expert parallelism beside it, and speeds that are only cited."""

from __future__ import annotations

from v4sdk.errors import V4Error
from v4sdk_bench.claims import STATUSES, Claim, Figure, Ledger, ledger
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
        heads = [head if head == "found" else f"found, {head}" for head in cells.headings(joined)]
        rows = tuple(row for claim in known.claims for row in _figures(joined, claim))
        columns = ("claim", "claimed", *heads, "answer")
        blocks.append(Table("Claims", columns, rows, cells.commands(lines), form="stack"))
        how = tuple((Cell(c.statement), Cell(c.compares), Cell(c.method)) for c in known.claims)
        blocks.append(
            Table(
                "How each claim is answered", ("claim", "compared", "method"), how, form="stack", folded=True
            )
        )
    rest = joined.take("claims/", without=(EXPERT_PARALLEL,))
    if rest:
        blocks.append(cells.by_record("Other rows of the suite", joined, rest, cells.plain))
    return Section("claims", "What was claimed, and what was found", tuple(blocks), nav="Claims")


def _figures(joined: Joined, claim: Claim) -> list[tuple[Cell, ...]]:
    """One row for each figure of a claim; the first says the claim."""
    where = ", ".join(part for part in (claim.source.document, claim.source.section) if part)
    found = []
    for at, figure in enumerate(claim.figures):
        said = Cell(figure.what, note="the same claim")
        if at == 0:
            said = Cell(claim.statement, note=f"{figure.what}; {where}", link=claim.source.url)
        status = Cell(
            claim.status,
            "mute" if claim.needs else "",
            f"{figure.key}; needs {claim.needs}" if claim.needs and at == 0 else figure.key,
        )
        here = [_found(joined, label, figure) for label in joined.labels]
        found.append((said, Cell(_claimed(figure), numeric=True), *here, status))
    return found


def _claimed(figure: Figure) -> str:
    if isinstance(figure.claimed, tuple):
        return f"{_quantity(figure.claimed[0], figure.unit)} to {_quantity(figure.claimed[1], figure.unit)}"
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
    table = Table("Published by others, not measured by us", columns, rows, form="stack")
    return Section(
        "cited", "Published by others, not measured by us", (table,), lead, True, "Published by others"
    )
