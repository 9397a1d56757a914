"""A report on a terminal: the verdicts, what failed, and one table for each question; everything else is in the page."""

from __future__ import annotations

import sys
from typing import IO

from v4sdk_bench.report.page import Block, Figures, Page, Table, Text

_STYLES = {"good": "green", "near": "green", "bad": "bold red", "warn": "yellow", "mute": "dim", "": ""}
_PIPE_WIDTH = 160
# a cell of prose is cut where a table would otherwise push its numbers off the screen
_LONGEST_NOTE = 60
_MOST_ROWS = 24


def render(page: Page, out: IO[str] | None = None, whole: bool = False) -> None:
    """Print it.

    Args:
        whole: also folded tables, and all rows of long ones.
    """
    from rich.console import Console

    stream = out or sys.stdout
    console = Console(
        file=stream,
        width=None if stream.isatty() else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(page.title, style="bold")
    for verdict in page.verdicts:
        console.print(f"{verdict.label}  {verdict.headline}", style=_STYLES[verdict.tone])
        console.print(f"   {verdict.machine}", style="dim")
        for fact in verdict.facts:
            console.print(f"   {fact.text}", style=_STYLES[fact.tone])
    for section in page.sections:
        blocks = [
            block for block in section.blocks if whole or not (isinstance(block, Table) and block.folded)
        ]
        if whole or not section.foreign:
            console.print()
            console.print(section.title, style="bold")
            for block in blocks:
                _block(console, block, whole)
            hidden = [b for b in section.blocks if b not in blocks and isinstance(b, Table)]
            if hidden:
                told = "; ".join(f"{table.caption} ({table.contents})" for table in hidden)
                console.print(f"with --all: {told}", style="dim", soft_wrap=True)


def _block(console: object, block: Block, whole: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text as Styled

    assert isinstance(console, Console)
    if isinstance(block, Text):
        console.print(block.text, style=_STYLES[block.tone])
    if isinstance(block, (Text, Figures)):
        return
    drawn = Drawn(
        box=box.SIMPLE_HEAD, pad_edge=False, title=block.caption, title_justify="left", title_style="italic"
    )
    for at, column in enumerate(block.columns):
        right = any(at < len(row) and row[at].numeric for row in block.rows)
        drawn.add_column(Styled(column), justify="right" if right else "left", overflow="fold")
    shown = block.rows if whole else block.rows[:_MOST_ROWS]
    for row in shown:
        # below the subject stands its key, which only a look at everything needs
        words = [
            cell.plain if at or whole or not _is_key(cell.note) else f"{cell.sign} {cell.text}".strip()
            for at, cell in enumerate(row)
        ]
        drawn.add_row(
            *(
                Styled(_cut(said, whole), style=_STYLES[cell.tone])
                for said, cell in zip(words, row, strict=True)
            )
        )
    console.print(drawn)
    if len(shown) < len(block.rows):
        console.print(f"and {len(block.rows) - len(shown)} more; --all shows them", style="dim")
    if block.commands:
        more = f"   (and {len(block.commands) - 1} more in the page)" if len(block.commands) > 1 else ""
        console.print(f"$ {block.commands[0]}{more}", style="dim", soft_wrap=True)


def _is_key(note: str) -> bool:
    return "/" in note and " " not in note


def _cut(words: str, whole: bool) -> str:
    room = 4 * _LONGEST_NOTE if whole else _LONGEST_NOTE * 2
    return words if len(words) <= room else words[: room - 1] + "…"
