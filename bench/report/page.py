"""A report before it has a form: sections of tables, figures and sentences. HTML, Markdown and the terminal draw the same one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "near", "bad", "warn", "mute"]
_ONLY = re.compile(r"--only[= ]('[^']*'|\S+)")
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
        form: `wide` scrolls in its own box, `stack` becomes cards on a narrow screen, `heat` is a map of tones.
        folded: shown on demand, for long lists. commands: what reproduces it.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    commands: tuple[str, ...] = ()
    note: str = ""
    form: Literal["wide", "stack", "heat"] = "wide"
    folded: bool = False


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
    """Commands in their order, each once, empty ones left out; where they differ in `--only` alone, one for all comes first."""
    found = tuple(dict.fromkeys(command for command in commands if command))
    if len(found) < 2:
        return found
    parts = [_ONLY.split(command) for command in found]
    if any(len(p) != 3 or (p[0], p[2]) != (parts[0][0], parts[0][2]) for p in parts):
        return found
    shared = _shared([p[1].strip("'\"") for p in parts])
    # a key that is itself the beginning of the others reproduces all of them
    whole = all(p[1].strip("'\"")[len(shared) :][:1] in ("", "/") for p in parts)
    prefix = shared if whole else shared.rpartition("/")[0]
    if not prefix or ("/" not in prefix and len(found) <= 3):
        return found
    together = f"{parts[0][0]}--only {prefix}{parts[0][2]}"
    return (together, *(command for command in found if command != together))


def _shared(words: Sequence[str]) -> str:
    """What all of them begin with, letter by letter."""
    least, most = min(words), max(words)
    same = (i for i, letter in enumerate(least) if most[i : i + 1] != letter)
    return least[: next(same, len(least))]
