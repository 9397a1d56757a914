"""The two ops that training runs in its own form: whole packed sequences at once, with the indexer's lessons on the side.

Both compute what the references compute (a test compares them). They exist because the references walk over sequences
one by one, and because the indexer learns from attention logits that the references throw away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from v4sdk import ops as o
from v4sdk.numerics import EXACT, Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.compressor import index_scores
from v4sdk.ops.op import OpTable
from v4sdk.ops.rows import entry_rows
from v4sdk.weights import Weight

# queries that share one block of keys; at least the sliding window
CHUNK = 64


@dataclass(frozen=True)
class Entries:
    """All compressed entries of a packed step, sequence after sequence.

    Attributes:
        rows: [n] rows of the cache. seq: [n] sequence of each. number: [n] entry number inside it. first: [B + 1] bounds.
    """

    rows: Tensor
    seq: Tensor
    number: Tensor
    first: list[int]


@dataclass(frozen=True)
class Span:
    """Queries `lo..hi` and what they may see: window rows from `left`, entries `e0..e1`, masks by ratio."""

    lo: int
    hi: int
    left: int
    window: Tensor
    bounds: dict[int, tuple[int, int]]
    visible: dict[int, Tensor]


@dataclass
class Step:
    """Geometry of one packed step, and what the ops leave behind for the indexer's loss.

    Attributes:
        sparse: attend to the indexer's picks only; otherwise to every visible entry.
        weight: [T] how much each query counts in the indexer's loss.
        index_loss: one value per CSA layer. recall: share of dense attention that the picks hold, per CSA layer.
    """

    spans: list[Span]
    entries: dict[int, Entries]
    topk: int
    sparse: bool
    weight: Tensor
    index_loss: list[Tensor] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    pending: tuple[Tensor, Tensor, Tensor] | None = None


def make_step(batch: Batch, window: int, ratios: set[int], topk: int, sparse: bool, weight: Tensor) -> Step:
    """Work out once per step which rows every chunk of queries needs; sequences must start at position 0."""
    bounds = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    positions, seq = batch.positions.long(), batch.seq_ids
    entries = {r: _entries(batch, lengths, r) for r in ratios}
    spans = []
    for lo in range(0, bounds[-1], CHUNK):
        hi = min(lo + CHUNK, bounds[-1])
        head, tail = int(seq[lo]), int(seq[hi - 1])
        left = max(bounds[head], lo - window + 1)
        key = torch.arange(left, hi)
        query = torch.arange(lo, hi)[:, None]
        mask = (seq[key] == seq[lo:hi, None]) & (key <= query) & (key > query - window)
        span = Span(lo, hi, left, mask, {}, {})
        for r, e in entries.items():
            e0 = e.first[head]
            e1 = e.first[tail] + (hi - bounds[tail]) // r
            shown = (e.seq[e0:e1] == seq[lo:hi, None]) & (
                e.number[e0:e1] < ((positions[lo:hi] + 1) // r)[:, None]
            )
            span.bounds[r], span.visible[r] = (e0, e1), shown
        spans.append(span)
    return Step(spans, entries, topk, sparse, weight)


def _entries(batch: Batch, lengths: list[int], ratio: int) -> Entries:
    counts = torch.tensor([n // ratio for n in lengths])
    first = [0, *counts.cumsum(0).tolist()]
    seq = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    number = torch.arange(first[-1]) - torch.tensor(first)[seq]
    per_page = batch.page_tokens // ratio
    # the scratch page is never asked for, so any page count beyond the table's will do
    pages = int(batch.block_table.max()) + 2
    rows = entry_rows(batch.block_table[seq], number[:, None], per_page, pages)[:, 0]
    return Entries(rows, seq, number, first)


def table(step: Step) -> OpTable:
    """Ops for one training step; everything not named here is the reference."""

    def index_topk(
        q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
    ) -> Tensor | None:
        step.pending = (q, w, keys.flatten(0, 1)[step.entries[ratio].rows])
        return None

    def index_query(
        x: Tensor,
        qr: Tensor,
        wq_b: Weight,
        weights_proj: Weight,
        rope_table: Tensor,
        num_heads: int,
        numerics: Numerics,
    ) -> tuple[Tensor, Tensor]:
        # the indexer imitates attention and must not bend the stream it reads
        return o.index_query(x.detach(), qr.detach(), wq_b, weights_proj, rope_table, num_heads, numerics)

    def compress(
        x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch, state: Tensor,
        entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
    ) -> None:  # fmt: skip
        x = x.detach() if is_index else x
        o.compress(x, wkv, wgate, ape, norm, inv_freq, batch, state, entries, ratio, is_index, eps, numerics)

    def sparse_attn(
        q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
        ratio: int, rope_dim: int, numerics: Numerics,
    ) -> Tensor:  # fmt: skip
        fresh = kv[-q.shape[0] :]
        pool = entries.flatten(0, 1)[step.entries[ratio].rows] if entries is not None else None
        index, step.pending = step.pending, None
        return torch.cat(_chunks(step, q, fresh, pool, ratio, sink, index))

    replaced = (index_topk, index_query, compress, sparse_attn)
    return OpTable({fn.__name__: fn for fn in replaced})


def _chunks(
    step: Step, q: Tensor, kv: Tensor, pool: Tensor | None, ratio: int, sink: Tensor,
    index: tuple[Tensor, Tensor, Tensor] | None,
) -> list[Tensor]:  # fmt: skip
    outs, losses, held, total = [], [], [], torch.zeros(())
    scale = q.shape[-1] ** -0.5
    # pieces, not slices: the backward pass of a slice fills a tensor of the full size
    pieces, queries = kv.split(CHUNK), q.split(CHUNK)
    lessons = (
        list(zip(index[0].split(CHUNK), index[1].split(CHUNK), strict=True)) if index is not None else []
    )
    for i, s in enumerate(step.spans):
        rows, seen = pieces[i], s.window
        if s.left < s.lo:
            rows = torch.cat((pieces[i - 1][s.left - s.lo :], rows))
        e0, e1 = s.bounds[ratio] if pool is not None else (0, 0)
        if pool is not None and e1 > e0:
            rows, seen = torch.cat((rows, pool[e0:e1])), torch.cat((seen, s.visible[ratio]), 1)
        chunk = queries[i]
        logits = (chunk.flatten(0, 1) @ rows.T).view(*chunk.shape[:2], -1) * scale
        if index is not None and e1 > e0:
            shown, weight = s.visible[ratio], step.weight[s.lo : s.hi]
            loss, picked, recall = _imitate(
                logits.detach(), seen, sink, shown, (*lessons[i], index[2][e0:e1]), step.topk
            )
            losses.append((loss * weight).sum())
            held.append((recall * weight).sum())
            total = total + weight[shown.any(1)].sum()
            if step.sparse:
                seen = torch.cat((s.window, picked), 1)
        outs.append(_attend(chunk, logits, rows, seen, sink))
    if losses:
        step.index_loss.append(torch.stack(losses).sum() / total.clamp_min(1))
        step.recall.append(torch.stack(held).sum() / total.clamp_min(1))
    return outs


def _attend(q: Tensor, logits: Tensor, rows: Tensor, seen: Tensor, sink: Tensor) -> Tensor:
    p = _probabilities(logits, seen, sink)
    return (p.flatten(0, 1) @ rows).view_as(q)


def _probabilities(logits: Tensor, seen: Tensor, sink: Tensor) -> Tensor:
    """Softmax over visible columns and the sink, without the sink's column: [C, H, n]."""
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    column = sink[None, :, None].expand(logits.shape[0], -1, 1)
    return torch.softmax(torch.cat((logits, column), -1), -1)[..., :-1]


def _imitate(
    logits: Tensor, seen: Tensor, sink: Tensor, shown: Tensor, index: tuple[Tensor, Tensor, Tensor], topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance between index scores and dense attention over the entries, the picks, and what attention the picks hold.

    Shapes:
        -> KL [C], picks [C, e] bool, recall [C]
    """
    q, w, keys = index
    scores = index_scores(q, w, keys.float(), EXACT)
    scores = scores.masked_fill(~shown, -torch.inf)
    with torch.no_grad():
        p = _probabilities(logits, seen, sink.detach())[..., -keys.shape[0] :].sum(1)
        target = p / p.sum(-1, keepdim=True).clamp_min(1e-9)
        best = torch.topk(scores.detach(), min(topk, keys.shape[0]), -1).indices
        picked = torch.zeros_like(shown).scatter_(1, best, True) & shown
        recall = torch.where(picked, target, 0.0).sum(-1)
    # rows that see nothing would give nan in the backward pass
    safe = torch.where(shown.any(1, keepdim=True), scores, 0.0)
    log_q = F.log_softmax(safe, -1).masked_fill(~shown, 0.0)
    entropy = torch.special.entr(target).sum(-1)
    return -(target * log_q).sum(-1) - entropy, picked, recall
