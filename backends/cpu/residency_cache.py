"""The bounded cache of experts: the compiled one, and the same in Python where nothing was compiled."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from v4sdk.backend import PagingUsage

from .arguments import int64, pointer, structure
from .kernels import Library
from .residency_layout import PAGE, Layout

# of <sys/mman.h>
_WILLNEED, _DONTNEED = 3, 4

_Layout = structure(
    "_Layout",
    ("layers experts page_bytes budget_bytes reads owns edges unit_edges files", int64),
    ("read own edge first_read first_own first_edge edge_of held_bytes file_bytes file", pointer),
)
_Counters = structure(
    "_Counters",
    ("hits misses evictions read_bytes resident_bytes budget_bytes", int64),
    ("read_s", ctypes.c_double),
)


class ExpertCache(Protocol):
    """Makes experts resident and counts."""

    def need(self, layer: int, ids: Sequence[int]) -> None:
        """Have these experts of a layer in memory."""

    def usage(self) -> PagingUsage:
        """What has happened so far."""


class NativeCache:
    """The cache in the shared library, which a recorded step can call.

    Attributes:
        handle: address of the cache, for argument blocks.
    """

    def __init__(self, native: Library, layout: Layout, experts: int, budget_bytes: int) -> None:
        self._lib, units = native.functions, layout.units
        self._lib.v4_residency_new.restype = pointer
        reads = [r for u in units for r in u.read]
        owns = [(p.address, p.nbytes, p.file, p.offset) for u in units for p in u.own]
        edges = [
            (e.address, e.file, e.offset, int(kept))
            for e, kept in zip(layout.edges, layout.foreign, strict=True)
        ]
        unit_edges = [e for u in units for e in u.edges]
        arrays = [
            _array(x)
            for x in (
                _flat(reads), _flat(owns), _flat(edges), _starts(len(u.read) for u in units),
                _starts(len(u.own) for u in units), _starts(len(u.edges) for u in units), unit_edges,
                [u.held_bytes for u in units], [u.file_bytes for u in units], _opened(layout),
            )
        ]  # fmt: skip
        counts = (len(reads), len(owns), len(edges), len(unit_edges), len(layout.paths))
        block = _Layout(
            len(units) // experts,
            experts,
            PAGE,
            budget_bytes,
            *counts,
            *(ctypes.addressof(a) for a in arrays),
        )
        self.handle: int = self._lib.v4_residency_new(ctypes.byref(block))
        if not self.handle:
            raise MemoryError("no memory for the table of experts")
        weakref.finalize(self, self._lib.v4_residency_delete, pointer(self.handle))

    def need(self, layer: int, ids: Sequence[int]) -> None:
        """Have these experts of a layer in memory."""
        array = (ctypes.c_int32 * len(ids))(*ids)
        self._lib.v4_residency_need(pointer(self.handle), int64(layer), array, int64(len(ids)))

    def usage(self) -> PagingUsage:
        """What has happened so far."""
        c: Any = _Counters()
        self._lib.v4_residency_counters(pointer(self.handle), ctypes.byref(c))
        return PagingUsage(
            c.hits, c.misses, c.evictions, c.read_bytes, c.read_s, c.resident_bytes, c.budget_bytes
        )


class PlainCache:
    """The same without the library: a page that is missing is met by the computation."""

    def __init__(self, layout: Layout, experts: int, budget_bytes: int) -> None:
        self._layout, self._experts, self._budget = layout, experts, budget_bytes
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._files = _opened(layout)
        weakref.finalize(self, _close, self._files)
        self._users = [int(kept) for kept in layout.foreign]
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._hits = self._misses = self._evictions = self._read_bytes = self._held = 0
        self._read_s = 0.0

    def need(self, layer: int, ids: Sequence[int]) -> None:
        """Have these experts of a layer in memory."""
        wanted = {layer * self._experts + e for e in ids if 0 <= e < self._experts}
        missing = [u for u in wanted if u not in self._resident]
        self._hits += len(wanted) - len(missing)
        self._misses += len(missing)
        for u in wanted:
            self._resident[u] = None
            self._resident.move_to_end(u)
        for u in missing:
            self._held += self._layout.units[u].held_bytes
            for e in self._layout.units[u].edges:
                self._users[e] += 1
        while self._held > self._budget and (oldest := next(iter(self._resident))) not in wanted:
            self._evict(oldest)
        self._fetch(missing)

    def _fetch(self, missing: list[int]) -> None:
        start = time.perf_counter()
        spans = [span for u in missing for span in self._layout.units[u].read]
        for address, nbytes in spans:
            self._madvise(address, nbytes, _WILLNEED)
        for address, nbytes in spans:
            # a byte of every page: it is here when this returns
            bytes(memoryview((ctypes.c_char * nbytes).from_address(address))[::PAGE])
        self._read_bytes += sum(self._layout.units[u].file_bytes for u in missing)
        self._read_s += time.perf_counter() - start

    def _evict(self, u: int) -> None:
        unit = self._layout.units[u]
        del self._resident[u]
        self._held -= unit.held_bytes
        self._evictions += 1
        gone = list(unit.own)
        for e in unit.edges:
            self._users[e] -= 1
            if not self._users[e]:
                gone.append(self._layout.edges[e])
        for pages in gone:
            self._madvise(pages.address, pages.nbytes, _DONTNEED)
            if self._files[pages.file] >= 0:
                os.posix_fadvise(self._files[pages.file], pages.offset, pages.nbytes, os.POSIX_FADV_DONTNEED)

    def usage(self) -> PagingUsage:
        """What has happened so far."""
        return PagingUsage(
            self._hits,
            self._misses,
            self._evictions,
            self._read_bytes,
            self._read_s,
            self._held,
            self._budget,
        )


def _opened(layout: Layout) -> list[int]:
    """Descriptors of the mapped files; -1 where the path now names another file."""
    found = []
    for path, inode in layout.paths:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            file = -1
        if file >= 0 and os.fstat(file).st_ino != inode:
            os.close(file)
            file = -1
        found.append(file)
    return found


def _close(files: list[int]) -> None:
    for file in files:
        if file >= 0:
            os.close(file)


def _flat(rows: Sequence[tuple[int, ...]]) -> list[int]:
    return [x for row in rows for x in row]


def _starts(counts: Iterable[int]) -> list[int]:
    found = [0]
    for count in counts:
        found.append(found[-1] + count)
    return found


def _array(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * max(1, len(values)))(*values)
