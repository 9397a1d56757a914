"""Cache rows: how a KV row or an index key is stored, told apart by the dtype of the cache tensor; and where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.ops.batch import Batch
from v4sdk.quant import index_pack, index_unpack, kv_pack, kv_unpack


def store_kv(rows: Tensor, like: Tensor, rope_dim: int) -> Tensor:
    """Encode KV rows for a cache tensor: uint8 is the native layout, else its float dtype."""
    return kv_pack(rows, rope_dim) if like.dtype == torch.uint8 else rows.to(like.dtype)


def load_kv(stored: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """Decode stored KV rows to float32 [..., head_dim]."""
    return kv_unpack(stored, head_dim, rope_dim) if stored.dtype == torch.uint8 else stored.float()


def store_index(keys: Tensor, like: Tensor) -> Tensor:
    """Encode index keys for a cache tensor: uint8 is the native layout, else its float dtype."""
    return index_pack(keys) if like.dtype == torch.uint8 else keys.to(like.dtype)


def load_index(stored: Tensor, index_head_dim: int) -> Tensor:
    """Decode stored index keys to float32 [..., index_head_dim]."""
    return index_unpack(stored, index_head_dim) if stored.dtype == torch.uint8 else stored.float()


def entry_rows(block_table: Tensor, entries: Tensor, rows_per_page: int, num_pages: int) -> Tensor:
    """Flat cache rows of compressed entries.

    The last page belongs to nobody: absent entries (-1) and absent pages point there.

    Shapes:
        block_table [.., P], entries [.., n] int (same leading dims) -> [.., n] int64 rows of a cache
        [num_pages, rows_per_page, ...] seen as [num_pages * rows_per_page, ...]
    """
    entry = entries.long()
    page_at = (entry // rows_per_page).clamp(0, block_table.shape[-1] - 1)
    page = torch.gather(block_table.long(), -1, page_at)
    present = (entry >= 0) & (page >= 0)
    return torch.where(present, page * rows_per_page + entry % rows_per_page, (num_pages - 1) * rows_per_page)


def last_rows(batch: Batch, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` packed rows of every sequence.

    Returns:
        rows [B * count] int64 (clamped to a legal row), valid [B * count] bool.
    """
    ends = batch.cu_seqlens[1:].long()
    starts = batch.cu_seqlens[:-1].long()
    rows = ends[:, None] - 1 - torch.arange(count, device=ends.device)
    valid = rows >= starts[:, None]
    return rows.clamp_min(0).flatten(), valid.flatten()


def ring_write(ring: Tensor, rows: Tensor, batch: Batch, length: int) -> None:
    """Keep the last `length` rows of every sequence in its ring, row of position p at slot p mod length.

    The last slot of the ring tensor belongs to nobody and takes what must not be kept.

    Shapes:
        ring [slots + 1, length, ...], rows [T, ...] in the ring's dtype
    """
    if batch.is_decode:
        ring[batch.slots.long(), batch.positions.long() % length] = rows.to(ring.dtype)
        return
    picked, valid = last_rows(batch, length)
    slot = batch.slots.long().repeat_interleave(length)
    slot = torch.where(valid, slot, ring.shape[0] - 1)
    ring[slot, batch.positions.long()[picked] % length] = rows[picked].to(ring.dtype)
