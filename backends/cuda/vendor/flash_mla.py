"""Attention of a prompt by FlashMLA's sparse forward pass; `sgl-flash-mla` keeps the kernels for compute capability 9.0.

It takes BF16 rows and, for every query, the rows it attends to. Rows of the window are there already; entries of this step's
pages are decoded once for all queries. Decode steps, other shapes and very long contexts stay with our kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.rows import entry_rows, load_kv

MODULE, DISTRIBUTION = "flash_mla", "sgl-flash-mla"
# it asks for a later torch than it needs
INSTALL = "--no-deps sgl-flash-mla"
CHIPS = frozenset({90, 100, 103})
HEADS, HEAD_DIM = (64, 128), 512
# of entries decoded to BF16 beside the caches
_MOST_WORKSPACE_BYTES = 512 << 20
# indices of one query must come in whole blocks of this many
_BLOCK = 128


class FlashMla:
    """The op `sparse_attn`: FlashMLA for what it takes, ours for the rest.

    Raises:
        ImportError, OSError, AttributeError: where the library cannot be loaded; the caller keeps ours.
    """

    def __init__(self, ours: Callable[..., Tensor]) -> None:
        self._ours = ours
        self._forward = importlib.import_module(MODULE).flash_mla_sparse_fwd

    def sparse_attn(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.sparse_attn`."""
        if not takes(q, entries, picks, batch):
            return self._ours(q, kv, window, entries, picks, batch, sink, ratio, rope_dim, numerics, out=out)
        rows, at = _rows(q, kv, window.shape[1], entries, picks, batch, ratio, rope_dim)
        scale = q.shape[-1] ** -0.5
        y: Tensor = self._forward(
            q, rows[:, None], at[:, None], scale, HEAD_DIM, attn_sink=sink, use_legacy=True
        )[0]
        return y if out is None else out.copy_(y)


def takes(q: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch) -> bool:
    """Whether the library has a kernel for a call; from shapes alone."""
    if batch.is_decode or q.dtype != torch.bfloat16 or q.shape[1] not in HEADS or q.shape[2] != HEAD_DIM:
        return False
    if entries is None:
        return True
    every = batch.block_table.shape[1] * entries.shape[1]
    listed = 4 * q.shape[0] * every if picks is None else 0
    return 2 * batch.num_sequences * every * HEAD_DIM + listed <= _MOST_WORKSPACE_BYTES


def _rows(
    q: Tensor, kv: Tensor, length: int, entries: Tensor | None, picks: Tensor | None, batch: Batch, ratio: int, rope_dim: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All rows of the step [n, D] BF16 and the ones each query attends to [T, m] int32, -1 for none."""
    at = [_window_rows(batch, length)]
    rows = [kv.to(torch.bfloat16)]
    if entries is not None:
        per_sequence = batch.block_table.shape[1] * entries.shape[1]
        every = torch.arange(per_sequence, device=q.device).expand(batch.num_sequences, -1)
        stored = entries.flatten(0, 1)[
            entry_rows(batch.block_table, every, entries.shape[1], entries.shape[0])
        ]
        rows.append(load_kv(stored, q.shape[-1], rope_dim).to(torch.bfloat16).flatten(0, 1))
        if picks is None:
            seen = every[batch.seq_ids]
            picks = torch.where(seen < ((batch.positions.long() + 1) // ratio)[:, None], seen, -1)
        first = kv.shape[0] + batch.seq_ids[:, None] * per_sequence
        at.append(torch.where(picks >= 0, first + picks, -1))
    found = torch.cat(at, 1).to(torch.int32)
    padded = torch.nn.functional.pad(found, (0, -found.shape[1] % _BLOCK), value=-1)
    return torch.cat(rows), padded


def _window_rows(batch: Batch, length: int) -> Tensor:
    """Rows of `kv` that hold positions p - W + 1 .. p of every token: the old ring's, or this step's own."""
    back = torch.arange(length - 1, -1, -1, device=batch.positions.device)
    position = batch.positions.long()[:, None] - back
    begin = batch.cu_seqlens.long()[:-1][batch.seq_ids]
    start = batch.positions.long()[begin]
    new = batch.num_sequences * length + begin[:, None] + position - start[:, None]
    old = batch.seq_ids[:, None] * length + position % length
    row = torch.where(position >= start[:, None], new, old)
    return torch.where(position >= 0, row, -1)
