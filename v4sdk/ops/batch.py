"""The packed step every op works on: which token belongs to which sequence, at which position, in which cache rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Packed tokens of B sequences, every sequence with at least one token. There is no padding.

    Attributes:
        token_ids: [T] int64. positions: [T] int32, consecutive inside a sequence.
        cu_seqlens: [B+1] int32, first packed row of each sequence and the end.
        slots: [B] int32, row of the fixed-size state (window ring, compressor state).
        block_table: [B, P] int32, page of each run of `page_tokens` source tokens; absent is -1.
        seq_ids: [T] int64, sequence of each packed row.
        page_tokens: source tokens per page, a multiple of 128 and of every compression ratio.
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    block_table: Tensor
    seq_ids: Tensor
    page_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[0]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.slots.shape[0]

    @property
    def is_decode(self) -> bool:
        """One token per sequence; known from shapes alone."""
        return self.num_tokens == self.num_sequences

    def decode_rows(self, first: int, last: int) -> Batch:
        """Sequences first..last of a decode step, as a decode step of their own."""
        pick = slice(first, last)
        rows = torch.arange(last - first, device=self.positions.device)
        bounds = torch.arange(last - first + 1, device=self.positions.device, dtype=torch.int32)
        return Batch(
            self.token_ids[pick], self.positions[pick], bounds, self.slots[pick], self.block_table[pick], rows,
            self.page_tokens,
        )  # fmt: skip


def make_batch(
    token_ids: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    slots: Tensor,
    block_table: Tensor,
    page_tokens: int,
) -> Batch:
    """Complete a `Batch` with the sequence of every row, computed on the device."""
    rows = torch.arange(token_ids.shape[0], device=token_ids.device, dtype=torch.int32)
    seq_ids = torch.bucketize(rows, cu_seqlens[1:], right=True)
    return Batch(token_ids, positions, cu_seqlens, slots, block_table, seq_ids, page_tokens)
