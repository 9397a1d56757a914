"""A report as Markdown: the same sections and tables; a figure is the sentence that says what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from v4sdk_bench.report.page import Block, Cell, Figures, Page, Section, Table, Text

# what would otherwise become markup, or break a table
_ESCAPED = {ord(c): f"\\{c}" for c in "\\`*_[]<>|#~"} | {ord("\n"): " ", ord("\r"): " "}


def render(page: Page) -> str:
    """The whole report."""
    return "\n".join(_lines(page)).rstrip() + "\n"


def _lines(page: Page) -> Iterator[str]:
    yield from (f"# {text(page.title)}", "", f"**{text(page.answer)}**", "")
    for verdict in page.verdicts:
        yield from (f"- **{text(verdict.label)}: {text(verdict.headline)}**  ", f"  {text(verdict.machine)}")
        yield from (f"  - {text(_said(fact))}" for fact in verdict.facts)
    yield ""
    for section in page.sections:
        yield from _section(section)
    if page.command:
        yield from ("Made by", "", _code(page.command), "")


def _section(section: Section) -> Iterator[str]:
    yield from (f"## {text(section.title)}", "")
    if section.lead:
        yield from (text(section.lead), "")
    for block in section.blocks:
        yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield from (text(_said(block)), "")
    elif isinstance(block, Table) and block.folded:
        # what a page folds, a viewer of Markdown folds too; the blank line lets the table be one
        yield from (f"<details><summary>{escape(f'{block.caption} ({block.contents})')}</summary>", "")
        yield from (*_table(block), "</details>", "")
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Figures):
        for figure in block.figures:
            yield from (f"*{text(figure.caption)}*" + (f": {text(figure.note)}" if figure.note else ""), "")


def _table(table: Table) -> Iterator[str]:
    yield from (f"### {text(table.caption)}", "")
    numeric = [table.is_numeric(i) for i in range(len(table.columns))]
    yield "| " + " | ".join(text(column) or " " for column in table.columns) + " |"
    yield "| " + " | ".join("---:" if right else "---" for right in numeric) + " |"
    for row in table.rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
    yield ""
    if table.note:
        yield from (text(table.note), "")
    for command in table.commands:
        yield _code(command)
    if table.commands:
        yield ""


def _cell(cell: Cell) -> str:
    words = text(cell.plain)
    return (
        f"{words} ([source](<{cell.link}>))"
        if cell.link.startswith("https://") and not set(cell.link) & set("<>\n")
        else words
    )


def _said(block: Text) -> str:
    return str(block.text)


def _code(command: str) -> str:
    return "    " + " ".join(command.split("\n"))


def text(words: str) -> str:
    """Words that stay words in Markdown."""
    return words.translate(_ESCAPED)
