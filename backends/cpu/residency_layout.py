"""Where experts lie in memory, page by page: which pages an expert has for itself, and which it shares."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAGE = mmap.PAGESIZE
# [begin, end) of bytes in memory
Interval = tuple[int, int]


@dataclass(frozen=True)
class FileMap:
    """A part of a file in this process's memory: [begin, end) holds the file from `offset` on."""

    begin: int
    end: int
    offset: int
    path: str
    inode: int


@dataclass(frozen=True)
class Pages:
    """Whole pages of a file in memory."""

    address: int
    nbytes: int
    file: int
    offset: int


@dataclass
class Unit:
    """One expert of one layer.

    Attributes:
        read: (address, bytes) of every page it touches. own: pages nobody else uses.
        edges: indices of the pages it shares. held_bytes: what it occupies; file_bytes: its tensors.
    """

    read: list[tuple[int, int]] = field(default_factory=list)
    own: list[Pages] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    held_bytes: int = 0
    file_bytes: int = 0


@dataclass
class Layout:
    """All experts of a model.

    Attributes:
        units: by layer, then expert. edges: pages that an expert shares, whether with others or with something else.
        foreign: of each edge, whether something lies in it that is no expert, so that it is never given back.
        paths: the files, by their number in `Pages`.
    """

    units: list[Unit]
    edges: list[Pages]
    foreign: list[bool]
    paths: list[tuple[str, int]]


def file_maps(text: str | None = None) -> list[FileMap]:
    """Read what this process has mapped from files, by address."""
    text = (
        Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        if text is None
        else text
    )
    found = []
    for line in text.splitlines():
        parts = line.split(None, 5)
        if len(parts) == 6 and int(parts[4]):
            begin, _, end = parts[0].partition("-")
            found.append(FileMap(int(begin, 16), int(end, 16), int(parts[2], 16), parts[5], int(parts[4])))
    return found


def lay_out(experts: Iterable[Sequence[Interval]], maps: Sequence[FileMap]) -> Layout:
    """Divide the pages of experts, each given by the intervals of its tensors.

    What is no mapped file is left alone: giving pages of other memory back would clear them.
    """
    begins = [one.begin for one in maps]
    paths: dict[tuple[str, int], int] = {}
    units: list[Unit] = []
    # of every page that is not one expert's alone: its place, its users, and how many of its bytes are experts'
    shared: dict[int, tuple[Pages, set[int], int]] = {}

    def mark(page: int, u: int, used: int, where: FileMap) -> None:
        file = paths.setdefault((where.path, where.inode), len(paths))
        place, users, covered = shared.get(page, (_pages(page, page + PAGE, where, file), set(), 0))
        users.add(u)
        shared[page] = place, users, covered + used

    for u, intervals in enumerate(experts):
        unit = Unit()
        units.append(unit)
        for begin, end in _merged(intervals):
            at = bisect_right(begins, begin) - 1
            if at < 0 or end > maps[at].end:
                continue
            where = maps[at]
            file = paths.setdefault((where.path, where.inode), len(paths))
            first, last = _down(begin), _down(end)
            unit.read.append((first, _up(end) - first))
            unit.file_bytes += end - begin
            unit.held_bytes += _up(end) - first
            if first == last:
                mark(first, u, end - begin, where)
                continue
            if begin != first:
                mark(first, u, first + PAGE - begin, where)
            if end != last:
                mark(last, u, end - last, where)
            if _up(begin) < last:
                unit.own.append(_pages(_up(begin), last, where, file))
    edges: list[Pages] = []
    foreign: list[bool] = []
    for page, (place, users, covered) in shared.items():
        for u in users:
            units[u].edges.append(len(edges))
        edges.append(place)
        at = bisect_right(begins, page) - 1
        foreign.append(covered < _file_bytes_of(page, maps[at]))
    return Layout(units, edges, foreign, list(paths))


def _file_bytes_of(page: int, where: FileMap) -> int:
    """Bytes of a page that the file fills; its last page may be less than full."""
    try:
        size = os.stat(where.path).st_size
    except OSError:
        return PAGE
    return max(0, min(PAGE, size - (where.offset + page - where.begin)))


def _pages(begin: int, end: int, where: FileMap, file: int) -> Pages:
    return Pages(begin, end - begin, file, where.offset + begin - where.begin)


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Join neighbours: most checkpoints store the tensors of an expert one after another."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if begin == end:
            continue
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _down(address: int) -> int:
    return address // PAGE * PAGE


def _up(address: int) -> int:
    return -(-address // PAGE) * PAGE
