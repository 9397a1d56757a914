"""Tables on stdout: drawn to the terminal's width, plain and unbroken when read by another program."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

_PIPE_WIDTH = 200
_STYLES = {
    "available": "green",
    "ok": "green",
    "passed": "green",
    "unavailable": "yellow",
    "missing": "yellow",
    "known gap": "yellow",
    "broken": "red",
    "failed": "red",
    "unexpected pass": "red",
}


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print rows under a header; known state words are coloured on a terminal."""
    # rich costs a tenth of a second to import, which a run that prints no table must not pay
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(
        *columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)
