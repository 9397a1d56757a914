"""Compressed entries and the lightning indexer: pooling tokens into entries, scoring them, picking the best."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import cost, inputs
from v4sdk.ops.batch import Batch
from v4sdk.ops.linear import linear, matmul
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.op import ROUNDING, OpTable, fused_op, op
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.ops.rope import rope, rope_table, rotated
from v4sdk.ops.rows import entry_rows, load_index, ring_write, store_index, store_kv
from v4sdk.quant import hadamard, q4_round, q8_round, split_last
from v4sdk.weights import Weight

# scores of one block stay in a core's share of the cache: three times faster here than 64 MB blocks
_WORKSPACE_BYTES = 8 << 20
_KV_Q8_BLOCK = 64
_LOWEST = torch.iinfo(torch.int64).min


@fused_op(
    parts=(rms_norm,),
    mutates=("state", "entries"),
    inputs=inputs.variants(
        csa=inputs.compress(4, False), index=inputs.compress(4, True), hca=inputs.compress(128, False)
    ),
    tolerances=ROUNDING,
    cost=cost.compress,
)
def compress(
    ops: OpTable, x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch,
    state: Tensor, entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
) -> None:  # fmt: skip
    """Pool every block of `ratio` tokens that this step completes into one entry, and keep what later blocks need.

    K_t = wkv x_t, z_t = wgate x_t + ape[t mod ratio], float32. Without overlap E_j = sum over the block of
    softmax(z) K per channel. With overlap (ape twice as wide as an entry) the previous block's first halves join the
    block's second halves; block 0 has no predecessor. Then RMSNorm, RoPE at the block's first position, and FP8 rounding
    of the plain part (attention) or Hadamard and FP4 rounding (index).

    Shapes:
        x [T, N], wkv and wgate [w, N], ape [ratio, w] f32, norm [e], inv_freq [r / 2] f32,
        state [slots + 1, L, 2, w] f32: the last L = 2 * ratio (overlap) or ratio positions, K then z at position mod L;
        entries [pages, rows, row]. w = 2e with overlap, else e.
    Edge rules:
        an entry is written by the token that completes its block, so that token already sees it. Nothing of an earlier
        sequence in the same slot is ever read. The last page and slot are scratch. `state` carries no gradient.
    Source:
        DeepSeek-V4 report, compressed attention; official model.py, Compressor
    """
    act = activation_dtype(numerics)
    xf = wide(x)
    pair = torch.stack(
        (matmul(xf, wkv), matmul(xf, wgate) + ape[batch.positions.long() % ratio]), 1
    )  # [T, 2, w]
    width, length = norm.shape[0], state.shape[1]
    tokens, done, block = _closing(batch, ratio)
    values, gate = _gather_blocks(pair, state, batch, tokens, length)
    if ape.shape[1] == 2 * width:
        values = torch.cat((values[:, :ratio, :width], values[:, ratio:, width:]), 1)
        gate = torch.cat((gate[:, :ratio, :width], gate[:, ratio:, width:]), 1)
    pooled = (torch.softmax(gate, 1) * values).sum(1).to(act)
    pooled = ops[rms_norm](pooled, norm, eps, act)
    pooled = rope(pooled, rope_table(block * ratio, inv_freq))
    if is_index:
        row = store_index(index_rounded(pooled, numerics), entries)
    else:
        rope_dim = 2 * inv_freq.shape[0]
        if numerics.q8_kv:
            plain = width - rope_dim
            pooled = torch.cat((q8_round(pooled[:, :plain], _KV_Q8_BLOCK), pooled[:, plain:]), -1)
        row = store_kv(pooled, entries, rope_dim)
    table = batch.block_table[batch.seq_ids[tokens]]
    at = entry_rows(table, torch.where(done, block, -1)[:, None], entries.shape[1], entries.shape[0])[:, 0]
    entries.flatten(0, 1)[at] = row
    ring_write(state, pair.detach(), batch, length)


def _closing(batch: Batch, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that complete a block, as many as shapes allow: (packed row, does complete, block number), all [C]."""
    count = min(batch.num_tokens, batch.num_tokens // ratio + batch.num_sequences)
    closes = (batch.positions + 1) % ratio == 0
    tokens = torch.argsort((~closes).to(torch.uint8), stable=True)[:count]
    return tokens, closes[tokens], batch.positions.long()[tokens] // ratio


def _gather_blocks(
    pair: Tensor, state: Tensor, batch: Batch, tokens: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """K and z of the `length` positions that end at each token, from this step or from the saved ring: [C, length, w]."""
    seq = batch.seq_ids[tokens]
    back = torch.arange(length - 1, -1, -1, device=tokens.device)
    row = tokens[:, None] - back
    pos = batch.positions.long()[tokens][:, None] - back
    here = row >= batch.cu_seqlens.long()[seq][:, None]
    saved = state[batch.slots.long()].flatten(0, 1)
    at = torch.where(here, row.clamp_min(0) + saved.shape[0], seq[:, None] * length + pos % length)
    gathered = torch.cat((saved, pair))[at]
    exists = (pos >= 0)[..., None]
    values, gate = gathered.unbind(2)
    return torch.where(exists, values, 0.0), torch.where(exists, gate, -torch.inf)


def index_rounded(x: Tensor, numerics: Numerics) -> Tensor:
    """Index queries and keys as they are compared: Hadamard-rotated, rounded to FP4; both only where values are rounded."""
    # the rotation alone changes no score, so it is skipped where nothing is rounded
    return q4_round(hadamard(x).to(x.dtype)) if numerics.q4_index else x


@fused_op(
    parts=(linear,), inputs=inputs.cases(inputs.index_query), tolerances=ROUNDING, cost=cost.index_query
)
def index_query(
    ops: OpTable, x: Tensor, qr: Tensor, wq_b: Weight, weights_proj: Weight, rope_table: Tensor, num_heads: int,
    numerics: Numerics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Project index queries and head weights: q = Q4(Hadamard(RoPE(wq_b qr))), w = weights_proj x / sqrt(e * heads).

    Shapes:
        x [T, N], qr [T, R], wq_b [heads * e, R], weights_proj [heads, N], rope_table [T, r]
        -> q [T, heads, e] in the activation dtype, w [T, heads]
    Source:
        official model.py, Indexer
    """
    between = between_dtype(numerics)
    q = split_last(ops[linear](qr, wq_b, numerics, between), wq_b.out_features // num_heads)
    q = index_rounded(rotated(ops, q, rope_table).to(activation_dtype(numerics)), numerics)
    w = ops[linear](x, weights_proj, numerics, between)
    return q, w * (q.shape[-1] ** -0.5 * num_heads**-0.5)


def index_scores(q: Tensor, w: Tensor, keys: Tensor, numerics: Numerics) -> Tensor:
    """I[t, j] = sum_h w[t, h] relu(q[t, h] . k[j]).

    Shapes:
        q [T, heads, e], w [T, heads], keys [n, e] or [T, n, e] float32 -> [T, n] float32
    """
    qf, keys = wide(q), keys.to(torch.promote_types(q.dtype, torch.float32))
    dot = (qf.flatten(0, 1) @ keys.T).view(*q.shape[:2], -1) if keys.dim() == 2 else qf @ keys.transpose(1, 2)
    if numerics.bf16_index_scores:
        weighted = dot.to(torch.bfloat16).relu() * w.to(torch.bfloat16)[..., None]
        return weighted.float().sum(1).to(torch.bfloat16).float()
    return (wide(w)[:, None] @ dot.relu())[:, 0]


@op(
    sensitivity="selection",
    inputs=inputs.edges(inputs.cases(inputs.index_topk), ties=inputs.index_ties),
    tolerances=ROUNDING,
    cost=cost.index_topk,
)
def index_topk(
    q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
) -> Tensor:
    """Pick the best-scoring visible entries of every token.

    Shapes:
        q [T, heads, e], w [T, heads], keys [pages, rows, row] -> [T, topk] int32 entry numbers, ascending, -1 at the end
    Edge rules:
        entry j is visible at position p iff j < floor((p + 1) / ratio). Ties go to the lowest entry. Fewer visible
        entries than `topk` are all picked. Entries are scored in blocks, so workspace does not grow with the context.
    Source:
        official model.py, Indexer
    """
    if batch.is_decode:
        return _pick(q, w, keys, batch.block_table, batch.positions, topk, ratio, numerics)
    bounds = batch.cu_seqlens.tolist()
    last = batch.positions[batch.cu_seqlens[1:].long() - 1].tolist()
    out = []
    for b, (lo, hi) in enumerate(pairwise(bounds)):
        pages = -(-((last[b] + 1) // ratio) // keys.shape[1])
        table = batch.block_table[b, : max(1, pages)]
        out.append(_pick(q[lo:hi], w[lo:hi], keys, table, batch.positions[lo:hi], topk, ratio, numerics))
    return torch.cat(out)


def _pick(
    q: Tensor,
    w: Tensor,
    keys: Tensor,
    table: Tensor,
    positions: Tensor,
    topk: int,
    ratio: int,
    numerics: Numerics,
) -> Tensor:
    rows_per_page, num_heads, e = keys.shape[1], q.shape[1], q.shape[2]
    visible = ((positions.long() + 1) // ratio)[:, None]
    shared = table.dim() == 1
    # a block of pages such that scores of one query block, and its keys, stay within the workspace
    query_block = q.shape[0] if not shared else min(q.shape[0], 256)
    per_page = 4 * rows_per_page * max(num_heads * query_block, e * (1 if shared else q.shape[0]))
    step = max(1, _WORKSPACE_BYTES // per_page)
    best = torch.full((q.shape[0], topk), _LOWEST, dtype=torch.int64, device=q.device)
    for first in range(0, table.shape[-1], step):
        pages = table[..., first : first + step]
        entry = torch.arange(
            first * rows_per_page, (first + pages.shape[-1]) * rows_per_page, device=q.device
        )
        page = torch.where(pages >= 0, pages, keys.shape[0] - 1).long()
        k = load_index(keys[page].flatten(-3, -2), e)
        parts = []
        for i in range(0, q.shape[0], query_block):
            span = slice(i, i + query_block)
            s = index_scores(q[span], w[span], k, numerics)
            rank = torch.where(entry < visible[span], _rank(s, entry), _LOWEST)
            parts.append(torch.topk(torch.cat((best[span], rank), -1), topk, sorted=False).values)
        best = torch.cat(parts)
    absent = best == _LOWEST
    picked = torch.where(absent, torch.iinfo(torch.int32).max, _entry(best)).sort(-1).values
    return torch.where(picked == torch.iinfo(torch.int32).max, -1, picked).to(torch.int32)


def _rank(scores: Tensor, entry: Tensor) -> Tensor:
    """Order by score, then by lowest entry, in one int64: ties cannot depend on the device's top-k."""
    bits = (scores.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - entry)


def _entry(rank: Tensor) -> Tensor:
    return 0xFFFFFFFF - (rank & 0xFFFFFFFF)
