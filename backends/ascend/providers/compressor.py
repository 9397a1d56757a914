"""Compressed entries by vllm-ascend's `compressor`; and why that of cann_ops_transformer is passed over.

Its state cache holds K then z of a position, as ours does, in pages found by position; page 0 stands for none, and is never
written. Our rings begin at slot 0, so the rings of the step's sequences, and no others, are copied behind an empty page and
back. Positions are shifted by whole rings, which changes neither a block's place in them nor which tokens belong to it, so the
page table stays small however long the context.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.compressor import compress as compress_op
from v4sdk.ops.compressor import index_rounded
from v4sdk.ops.rope import rope_table
from v4sdk.ops.rows import entry_rows, store_index, store_kv
from v4sdk.quant import q8_round
from v4sdk.weights import Weight

from ..chip import Family
from . import Calls, rounded
from .rotary import pairs

_KV_Q8_BLOCK = 64
_INTERLEAVE, _CONTIGUOUS = 2, 1


def compress(
    to: Calls, x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch,
    state: Tensor, entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
) -> None:  # fmt: skip
    """As the op: pooling, norm and rotation in one call; rounding and storing as everywhere."""
    matrices = (wkv.data, wgate.data)
    if any(m.dtype != torch.bfloat16 for m in matrices):
        compress_op.build(to.ops)(
            x, wkv, wgate, ape, norm, inv_freq, batch, state, entries, ratio, is_index, eps, numerics
        )
        return
    tokens, done, block = _closing(batch, ratio)
    cos, sin = pairs(rope_table(block * ratio, inv_freq))
    pages = _decode_pages(state, batch) if batch.is_decode else _prefill_pages(state, batch)
    pooled: Tensor = to(
        "_C_ascend.compressor", x.to(torch.bfloat16).contiguous(), *matrices, pages.cache, ape, norm.to(torch.bfloat16), sin,
        cos, pages.table, batch.cu_seqlens, None, pages.starts, 2 * inv_freq.shape[0], ratio,
        ape.shape[1] // norm.shape[0], eps, _INTERLEAVE, _CONTIGUOUS,
    )  # fmt: skip
    if is_index:
        row = store_index(index_rounded(pooled, numerics), entries)
    else:
        plain = norm.shape[0] - 2 * inv_freq.shape[0]
        if numerics.q8_kv:
            pooled = torch.cat((q8_round(pooled[:, :plain], _KV_Q8_BLOCK), pooled[:, plain:]), -1)
        row = store_kv(pooled, entries, 2 * inv_freq.shape[0])
    table = batch.block_table[batch.seq_ids[tokens]]
    at = entry_rows(table, torch.where(done, block, -1)[:, None], entries.shape[1], entries.shape[0])[:, 0]
    # writes come last, that of the state last of all: whoever serves after a failure finds it as it was
    entries.flatten(0, 1)[at] = row
    pages.keep(state)


def _closing(batch: Batch, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the call's rows are: tokens that complete a block in packed order, then rows without meaning; as many as it gives.

    Returns:
        packed row, whether it completes a block, block number; all [min(T, T // ratio + B)].
    """
    count = min(batch.num_tokens, batch.num_tokens // ratio + batch.num_sequences)
    closes = (batch.positions + 1) % ratio == 0
    tokens = torch.argsort((~closes).to(torch.uint8), stable=True)[:count]
    return tokens, closes[tokens], batch.positions.long()[tokens] // ratio


class _Pages:
    """The state of a step's sequences as the call reads it.

    Args:
        cache: [pages, L, 2 * w] float32, page 0 none. table: [B, n] int32. starts: [B] int32, shifted.
        rows: of the cache seen as [pages * L, ..]. slots, places: where in the state each of them is kept.
    """

    def __init__(
        self, cache: Tensor, table: Tensor, starts: Tensor, rows: Tensor, slots: Tensor, places: Tensor
    ) -> None:
        self.cache, self.table, self.starts = cache, table, starts
        self._rows, self._slots, self._places = rows, slots, places

    def keep(self, state: Tensor) -> None:
        """Copy the last positions of every sequence back into its ring."""
        state[self._slots, self._places] = self.cache.flatten(0, 1)[self._rows].view(-1, *state.shape[2:])


def _decode_pages(state: Tensor, batch: Batch) -> _Pages:
    length, count, device = state.shape[1], batch.num_sequences, state.device
    held = state[batch.slots.long()].flatten(2)
    cache = torch.cat((held.new_zeros(1, *held.shape[1:]), held))
    # a ring stands for all pages of its sequence: a step writes one position of it
    table = torch.arange(1, count + 1, dtype=torch.int32, device=device)[:, None].expand(-1, 2).contiguous()
    rows = torch.arange(length, length * (count + 1), device=device)
    slots = batch.slots.long().repeat_interleave(length)
    places = torch.arange(length, device=device).repeat(count)
    pos = batch.positions
    # the same place in a ring, below two rings; at least one ring where there was one before it
    starts = torch.where(pos < length, pos, pos % length + length).to(torch.int32)
    return _Pages(cache, table, starts, rows, slots, places)


def _prefill_pages(state: Tensor, batch: Batch) -> _Pages:
    """Pages for every position of the chunk, so that no two positions share a row; as large as the chunk's own K and z."""
    length, device = state.shape[1], state.device
    bounds, slots = batch.cu_seqlens.tolist(), batch.slots.tolist()
    positions = batch.positions.tolist()
    begin = [p if p < length else p % length + length for p in (positions[lo] for lo in bounds[:-1])]
    starts = torch.tensor(begin, dtype=torch.int32, device=device)
    ends = [s + hi - lo for s, (lo, hi) in zip(begin, pairwise(bounds), strict=True)]
    counts = [-(-end // length) for end in ends]
    table = torch.zeros(len(ends), max(counts), dtype=torch.int32)
    page, into, before, after, places, kept = 1, [], [], [], [], []
    for b, (start, end, n) in enumerate(zip(begin, ends, counts, strict=True)):
        table[b, :n] = torch.arange(page, page + n, dtype=torch.int32)
        old = torch.arange(max(0, start - length), start)
        into.append(old + page * length)
        before.append(torch.stack((torch.full_like(old, slots[b]), old % length)))
        new = torch.arange(max(0, end - length), end)
        after.append(new + page * length)
        places.append(new % length)
        kept.append(torch.full_like(new, slots[b]))
        page += n
    cache = state.new_zeros(page, length, state.shape[2] * state.shape[3])
    slot, place = torch.cat(before, 1).to(device)
    cache.flatten(0, 1)[torch.cat(into).to(device)] = state[slot, place].flatten(1)
    rows, kept_slots, kept_places = (torch.cat(t).to(device) for t in (after, kept, places))
    return _Pages(cache, table.to(device), starts, rows, kept_slots, kept_places)


def unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Entries of 512 and 128, ratios 4 and 128, rotary parts of 64, hidden sizes of 1K to 10K in steps of 512."""
    if (config.head_dim, config.index_head_dim, config.qk_rope_head_dim) != (512, 128, 64):
        return (
            f"entries of {config.head_dim} and {config.index_head_dim} with {config.qk_rope_head_dim} rotary channels, "
            "and its document knows 512 and 128 with 64"
        )
    ratios = {layer.ratio for layer in config.layers if layer.ratio}
    if not ratios <= {4, 128}:
        return f"ratios {sorted(ratios)}, and its document knows 4 and 128"
    if config.hidden_size % 512 or not 1024 <= config.hidden_size <= 10240:
        return f"hidden size {config.hidden_size}, and its document knows multiples of 512 from 1024 to 10240"
    return rounded(config, engine, family)


def private(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Why the transformer pack's compressor serves nothing yet."""
    return (
        "it is registered under a private name only, writes its state in place without declaring it, and gives another number "
        "of results per release"
    )
