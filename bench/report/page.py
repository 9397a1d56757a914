"""A report before it has a form: sections of tables, figures and sentences. HTML, Markdown and the terminal draw the same one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "near", "bad", "warn", "mute"]
_ONLY = re.compile(r"--only[= ]('[^']*'|\S+)")
_MOST_COMMANDS = 12
# colour is never the only carrier: every tone has its sign
SIGNS: dict[str, str] = {"good": "✓", "near": "✓", "bad": "✗", "warn": "!", "mute": "", "": ""}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: in words. tone: what it means. note: smaller, below. numeric: aligned to the right, never broken.
        link: an address it cites.
    """

    text: str
    tone: Tone = ""
    note: str = ""
    numeric: bool = False
    link: str = ""

    @property
    def sign(self) -> str:
        """The sign of its tone."""
        return SIGNS[self.tone]

    @property
    def plain(self) -> str:
        """Sign, text and note in one line."""
        words = f"{self.sign} {self.text}".strip()
        return f"{words} ({self.note})" if self.note else words


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header.

    Attributes:
        form: `wide` scrolls in its own box, `stack` becomes cards on a narrow screen, `brief` has a line for each row even
            there, `heat` is a map of tones.
        folded: shown on demand, for long lists. commands: what reproduces it.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    commands: tuple[str, ...] = ()
    note: str = ""
    form: Literal["wide", "stack", "brief", "heat"] = "wide"
    folded: bool = False

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, and stands to the right."""
        return column > 0 and any(row[column].numeric for row in self.rows if column < len(row))

    @property
    def bad(self) -> int:
        """Rows with something wrong in them."""
        return sum(any(cell.tone == "bad" for cell in row) for row in self.rows)

    @property
    def contents(self) -> str:
        """What a reader finds in it, before it is unfolded."""
        count = f"{len(self.rows):,} {'row' if len(self.rows) == 1 else 'rows'}"
        if self.bad:
            return f"{count}, {SIGNS['bad']} {self.bad}"
        good = sum(any(cell.tone in ("good", "near") for cell in row) for row in self.rows)
        return f"{count}, all {SIGNS['good']}" if good and good == len(self.rows) else count


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG text made by `charts.py`; `wide` is drawn for large screens where `narrow` would be too small."""

    caption: str
    narrow: str
    wide: str = ""
    commands: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Figures:
    """Drawings that stand side by side where there is room."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Text:
    """A sentence; with a tone it stands out."""

    text: str
    tone: Tone = ""


Block = Table | Figures | Text


@dataclass(frozen=True)
class Section:
    """A titled part. `foreign` sets it apart visibly: numbers that nobody measured here. `nav` is its short name."""

    id: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
    foreign: bool = False
    nav: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a record says, in words."""

    label: str
    machine: str
    headline: str
    tone: Tone
    facts: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    answer: str
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]
    command: str
    refused: int = 0


def unique(commands: Iterable[str]) -> tuple[str, ...]:
    """Commands in their order, each once, empty ones left out.

    Those that differ in their `--only` alone are led by one that reproduces them all; beyond a dozen it stands for them.
    """
    found = tuple(dict.fromkeys(command for command in commands if command))
    groups: dict[tuple[str, ...], list[str]] = {}
    for command in found:
        parts = _ONLY.split(command)
        groups.setdefault((parts[0], parts[2]) if len(parts) == 3 else (command,), []).append(command)
    leading = [_together(around, group) for around, group in groups.items()]
    singles = found if len(found) <= _MOST_COMMANDS else ()
    return tuple(dict.fromkeys([command for lead in leading for command in lead] + list(singles)))


def _together(around: tuple[str, ...], commands: list[str]) -> list[str]:
    """One command for a group, or the group itself."""
    if len(commands) == 1:
        return commands
    keys = [_ONLY.split(command)[1].strip("'\"") for command in commands]
    shared = _shared(keys)
    # a key that is itself the beginning of the others reproduces all of them
    whole = all(key[len(shared) :][:1] in ("", "/") for key in keys)
    prefix = shared if whole else shared.rpartition("/")[0]
    if not prefix or ("/" not in prefix and len(commands) <= 3):
        return commands
    return [f"{around[0]}--only {prefix}{around[1]}"]


def _shared(words: Sequence[str]) -> str:
    """What all of them begin with, letter by letter."""
    least, most = min(words), max(words)
    same = (i for i, letter in enumerate(least) if most[i : i + 1] != letter)
    return least[: next(same, len(least))]
