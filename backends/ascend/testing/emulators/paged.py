"""Where rows of a sequence lie: batches of equal length, packed tokens, or pages found through a block table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .documented import Refused, refuse, want_dtype


@dataclass(frozen=True)
class Rows:
    """The rows of one side (queries, keys, ..), each sequence of which may be asked for.

    Attributes:
        data: [N, ..] rows in memory order. lengths: valid rows per sequence.
        starts: first row of each sequence, or None if pages are used.
        table: [B, P] int pages. block: rows per page.
    """

    data: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None
    table: Tensor | None = None
    block: int = 0

    def at(self, sequence: int, positions: Tensor) -> Tensor:
        """Rows at logical positions [...] of a sequence: [.., ..]."""
        if self.starts is not None:
            return self.data[self.starts[sequence] + positions]
        assert self.table is not None
        page = self.table[sequence].long()[positions // self.block]
        refuse(
            bool((page < 0).any()) or bool((page * self.block >= len(self.data)).any()),
            "a page in use is out of range",
        )
        return self.data[page * self.block + positions % self.block]


def packed(name: str, data: Tensor, bounds: Tensor | None, used: Tensor | None = None) -> Rows:
    """TND: [T, ..] rows with int32 prefix sums [B + 1] that begin with 0."""
    if bounds is None:
        raise Refused(f"{name} is packed, so its prefix sums are required")
    refuse(
        bounds.dtype != torch.int32 or bounds.dim() != 1,
        f"the prefix sums of {name} are {bounds.dtype} {list(bounds.shape)}",
    )
    ends = bounds.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    refuse(ends[0] != 0 or min(lengths, default=0) < 0, f"the prefix sums of {name} are {ends}")
    refuse(ends[-1] > len(data), f"the prefix sums of {name} end at {ends[-1]}, it has {len(data)} rows")
    return Rows(data, _used(name, lengths, used), tuple(ends[:-1]))


def equal(name: str, data: Tensor, used: Tensor | None = None) -> Rows:
    """BSND: [B, S, ..]."""
    refuse(data.dim() < 3, f"{name} has {data.dim()} dims")
    b, s = data.shape[:2]
    return Rows(data.flatten(0, 1), _used(name, [s] * b, used), tuple(range(0, b * s, s)))


def paged(
    name: str, data: Tensor, table: Tensor | None, used: Tensor | None, listed: Sequence[int] | None = None
) -> Rows:
    """Pages [P, block, ..], a block table [B, ..] int32 and lengths [B] int32; blocks are multiples of 16 up to 1024."""
    if table is None or used is None:
        raise Refused(f"{name} is in pages, so a block table and lengths are required")
    refuse(
        table.dtype != torch.int32 or table.dim() != 2,
        f"the block table of {name} is {table.dtype} {list(table.shape)}",
    )
    refuse(
        used.dtype != torch.int32 or used.shape != table.shape[:1],
        f"the lengths of {name} are {used.dtype} {list(used.shape)}",
    )
    block = data.shape[1]
    refuse(
        block % 16 != 0 or block > 1024,
        f"pages of {name} have {block} rows, documented are multiples of 16 to 1024",
    )
    lengths = tuple(int(n) for n in (used if listed is None else listed))
    widest = -(-max(lengths, default=0) // block)
    refuse(
        table.shape[1] < widest,
        f"the block table of {name} has {table.shape[1]} columns, {widest} are needed",
    )
    return Rows(data.flatten(0, 1), lengths, None, table, block)


def _used(name: str, lengths: Sequence[int], used: Tensor | None) -> tuple[int, ...]:
    if used is None:
        return tuple(lengths)
    refuse(
        used.dtype != torch.int32 or used.shape != (len(lengths),),
        f"the lengths of {name} are {used.dtype} {list(used.shape)}",
    )
    taken = used.tolist()
    refuse(
        any(not 0 <= u <= n for u, n in zip(taken, lengths, strict=True)),
        f"the lengths of {name} are {taken}",
    )
    return tuple(taken)


def by_layout(lengths: Tensor | None, layout: str) -> tuple[Tensor | None, Tensor | None]:
    """(prefix sums from 0, lengths): for packed rows torch_npu takes prefix sums without the 0, for others plain lengths."""
    if lengths is None:
        return None, None
    want_dtype("sequence lengths", lengths, torch.int32)
    return (torch.cat((lengths.new_zeros(1), lengths)), None) if layout == "TND" else (None, lengths)


def query_blocks(queries: Rows, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(sequence, local query numbers) in blocks of a size that keeps the workspace small."""
    for b, n in enumerate(queries.lengths):
        for first in range(0, n, rows):
            yield b, torch.arange(first, min(first + rows, n))
