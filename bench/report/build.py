"""Puts a report together: the answer first, then identity, parity, speed, what others said, and what was not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from v4sdk_bench.record import SUITES
from v4sdk_bench.report import agreement, cells, frontiers, identity, ops, outside, peers, ratios, verdicts
from v4sdk_bench.report.compare import Incomparable, Joined, compare
from v4sdk_bench.report.page import Block, Page, Section, Text
from v4sdk_bench.report.sources import Source


def page(
    sources: Sequence[Source], notes: Sequence[str] = (), command: str = ""
) -> tuple[Page, list[Incomparable]]:
    """The report of some records, and everything that was not put in relation."""
    joined = Joined(sources)
    words = tuple(verdicts.verdict(source) for source in sources)
    found, unrelated = compare(joined)
    refused = [*joined.refused, *unrelated] if len(sources) > 1 else []
    parts = [
        agreement.section(joined), ratios.across(joined, found, refused), frontiers.section(joined), ops.section(joined),
        ratios.section(joined), peers.section(joined), outside.claims(joined), outside.expert_parallel(joined),
        identity.not_run(joined), identity.section(joined), _rest(joined), outside.cited(),
    ]  # fmt: skip
    sections = [part for part in parts if part is not None]
    if notes:
        sections.insert(0, Section("notes", "About these files", tuple(Text(note, "warn") for note in notes)))
    answer = verdicts.answer(words, sources, len(refused))
    return Page(verdicts.subject(sources), answer, words, tuple(sections), command, len(refused)), refused


def _rest(joined: Joined) -> Section | None:
    """Rows that no section understood, and what the stages cost: nothing in a record is left out."""
    blocks: list[Block] = list(_by_suite(joined))
    cost = identity.stages(joined)
    if cost is not None:
        blocks.append(cost)
    return Section("rest", "Everything else in the records", tuple(blocks), nav="Rest") if blocks else None


def _by_suite(joined: Joined) -> Iterator[Block]:
    for suite in SUITES:
        lines = joined.take(f"{suite}/")
        if lines:
            yield cells.by_record(f"Further rows of the suite {suite}", joined, lines, cells.plain)
