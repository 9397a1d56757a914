"""Attention by torch_npu's `npu_sparse_flash_attention`: every query over the rows that a list names.

It reads one pool of keys, which are values too: 512 plain channels, and 64 rotary ones that this model leaves at zero. What a
query may see lies in two caches, so the rows of a step, and no others, are gathered into a pool: the window and the picked or
whole entries.

On 910B and 910C it has no sinks. A sink is a key of no content there: row 0 of the pool is zero but for two rotary channels of
one, against which the query holds the sink as the sum of two BF16 numbers, divided by the scale. Its logit is then the sink,
its value nothing. (One channel would cost accuracy: a BF16 number has 8 bits.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.rows import entry_rows, load_kv

from ..chip import Family
from . import Calls, rounded

_WORKSPACE_BYTES = 64 << 20
_MAX_QUERIES = 256
_ROPE = 64


@dataclass(frozen=True)
class Pool:
    """Rows that groups of queries share, and which of them each query sees: a run of near ones and a run of far ones.

    Attributes:
        rows: [G, S, D] BF16. near, num_near: [G, Q] first row and count. far, num_far: likewise. widest: most rows one sees.
    """

    rows: Tensor
    near: Tensor
    num_near: Tensor
    far: Tensor
    num_far: Tensor
    widest: int


def sparse_attn(
    to: Calls, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
    ratio: int, rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """As the op; prefill in blocks of queries whose gathered rows fit into 64 MB."""
    picks = None if picks is None else valid_first(picks)
    cached = _Cached(entries, picks, batch, ratio, rope_dim, q.shape[-1])
    if batch.is_decode:
        return attend(to, q[:, None], _decode_pool(window, cached), sink)[:, 0]
    length, rings = window.shape[1], batch.num_sequences * window.shape[1]
    bounds, positions = batch.cu_seqlens.tolist(), batch.positions.tolist()
    outs = []
    for b, (lo, hi) in enumerate(pairwise(bounds)):
        start = positions[lo]
        kept = min(start, length - 1)
        ring = torch.arange(start - kept, start, device=q.device) % length
        rows = torch.cat((kv[b * length + ring], kv[rings + lo : rings + hi])).to(torch.bfloat16)
        whole = cached.whole(b, start + hi - lo)
        per_query = 2 * q.shape[-1] * (picks.shape[1] if picks is not None else 1)
        step = max(1, min(_MAX_QUERIES, _WORKSPACE_BYTES // per_query))
        for i in range(lo, hi, step):
            j = min(i + step, hi)
            # rows of positions left..p of the last query
            left = max(start - kept, start + i - lo - length + 1)
            near = rows[left - (start - kept) : start + j - lo - (start - kept)]
            pool = cached.prefill_pool(near, left, whole, b, i, j, length)
            outs.append(attend(to, q[None, i:j], pool, sink)[0])
    return torch.cat(outs)


def valid_first(picks: Tensor) -> Tensor:
    """Picks [T, K] with absent ones (-1) behind the others, which keep their order."""
    seen = picks >= 0
    last = picks.shape[1]
    place = torch.where(seen, seen.cumsum(-1) - 1, last)
    return picks.new_full((len(picks), last + 1), -1).scatter_(1, place, picks)[:, :last]


@dataclass(frozen=True)
class _Cached:
    entries: Tensor | None
    picks: Tensor | None
    batch: Batch
    ratio: int
    rope_dim: int
    head_dim: int

    def rows(self, table: Tensor, numbers: Tensor) -> Tensor:
        """Entries by number, -1 giving rows that nobody is to see: [.., n, D] BF16."""
        assert self.entries is not None
        at = entry_rows(table, numbers, self.entries.shape[1], self.entries.shape[0])
        stored = self.entries.flatten(0, 1)[at]
        return (
            stored
            if stored.dtype == torch.bfloat16
            else load_kv(stored, self.head_dim, self.rope_dim).to(torch.bfloat16)
        )

    def whole(self, b: int, end: int) -> Tensor | None:
        """All entries of a sequence of `end` tokens, where none are picked."""
        if self.entries is None or self.picks is not None or end < self.ratio:
            return None
        numbers = torch.arange(end // self.ratio, device=self.entries.device)
        return self.rows(self.batch.block_table[b], numbers)

    def prefill_pool(
        self, near: Tensor, left: int, whole: Tensor | None, b: int, i: int, j: int, length: int
    ) -> Pool:
        """The pool of queries i..j of one sequence; `near` begins at position `left`."""
        pos = self.batch.positions[i:j].long()[None]
        first = (pos - length + 1).clamp_min(left) - left
        parts, count, most = [near], torch.zeros_like(pos), 0
        far = torch.full_like(pos, len(near))
        if whole is not None:
            parts, count, most = [near, whole], (pos + 1) // self.ratio, len(whole)
        elif self.picks is not None:
            picks = self.picks[i:j]
            table = self.batch.block_table[b].expand(j - i, -1)
            parts, count, most = (
                [near, self.rows(table, picks).flatten(0, 1)],
                (picks >= 0).sum(-1)[None],
                picks.shape[1],
            )
            far = far + torch.arange(j - i, device=pos.device) * most
        return Pool(
            torch.cat(parts)[None], first, pos - left - first + 1, far, count, min(length, len(near)) + most
        )


def _decode_pool(window: Tensor, cached: _Cached) -> Pool:
    """A group per sequence: its ring, then its picked or whole entries; lengths stay on the device."""
    batch, length = cached.batch, window.shape[1]
    stored = window[batch.slots.long()]
    if stored.dtype != torch.bfloat16:
        stored = load_kv(stored, cached.head_dim, cached.rope_dim).to(torch.bfloat16)
    pos = batch.positions.long()[:, None]
    zero = torch.zeros_like(pos)
    # until a ring is full its rows are those of positions 0..p
    near = (pos + 1).clamp_max(length)
    if cached.entries is None:
        return Pool(stored, zero, near, zero, zero, length)
    if cached.picks is not None:
        numbers, count = cached.picks, (cached.picks >= 0).sum(-1, keepdim=True)
    else:
        most = batch.block_table.shape[1] * cached.entries.shape[1]
        numbers = torch.arange(most, device=window.device).expand(batch.num_sequences, -1)
        count = (pos + 1) // cached.ratio
    rows = torch.cat((stored, cached.rows(batch.block_table, numbers)), 1)
    return Pool(rows, zero, near, zero + length, count, length + numbers.shape[1])


def attend(to: Calls, q: Tensor, pool: Pool, sink: Tensor) -> Tensor:
    """Attend from queries [G, Q, H, D] to the rows of their group's pool, with a sink per head."""
    groups, queries, heads, dim = q.shape
    scale = dim**-0.5
    keys = pool.rows[:, :, None]
    native = to.family == "950"
    shift = 0 if native else 1
    if not native:
        keys = torch.cat((keys.new_zeros(groups, 1, 1, dim), keys), 1)
    key_rope = keys.new_zeros(*keys.shape[:3], _ROPE)
    query_rope = q.new_zeros(heads, _ROPE)
    if not native:
        key_rope[:, 0, :, :2] = 1
        wanted = sink.float() / scale
        high = wanted.to(q.dtype)
        query_rope[:, 0], query_rope[:, 1] = high, (wanted - high.float()).to(q.dtype)
    more = {"sinks": sink.float()} if native else {}
    out: Tensor = to(
        "npu.npu_sparse_flash_attention", q.contiguous(), keys.contiguous(), keys.contiguous(), _indices(pool, shift), scale,
        query_rope=query_rope.expand(groups, queries, -1, -1).contiguous(), key_rope=key_rope, sparse_block_size=1,
        layout_query="BSND", layout_kv="BSND", sparse_mode=0, attention_mode=2, **more,
    )[0]  # fmt: skip
    return out


def _indices(pool: Pool, shift: int) -> Tensor:
    """What each query sees as row numbers, valid ones first: [G, Q, 1, n] int32. With a shift, row 0 is seen by all."""
    column = torch.arange(pool.widest + shift, device=pool.near.device)
    near, far = (t[..., None] for t in (pool.near, pool.far))
    num_near, num_far = (t[..., None] for t in (pool.num_near, pool.num_far))
    behind = column - shift
    row = torch.where(behind < num_near, near + behind, far + behind - num_near) + shift
    row = torch.where(behind < 0, 0, row)
    return torch.where(behind < num_near + num_far, row, -1).to(torch.int32)[:, :, None].contiguous()


def unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Heads of 512, on 910B and 910C a power of two of them to 128."""
    heads = config.num_attention_heads
    if config.head_dim != 512:
        return f"head dim {config.head_dim}, and its document knows 512"
    if family != "950" and (heads > 128 or heads & (heads - 1)):
        return f"{heads} heads, and its document knows powers of two to 128"
    return rounded(config, engine, family)
