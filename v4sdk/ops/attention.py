"""Attention over a sliding window and compressed entries: projections, the sparse softmax, the grouped output."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import cost, inputs
from v4sdk.ops.batch import Batch
from v4sdk.ops.linear import linear, matmul
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.op import ROUNDING, OpTable, Tolerance, fused_op, op
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.ops.rope import rotated
from v4sdk.ops.rows import entry_rows, load_kv, ring_write, store_kv
from v4sdk.quant import q8_round, split_last
from v4sdk.weights import Weight

_WORKSPACE_BYTES = 64 << 20
_MAX_QUERY_BLOCK = 256
KV_Q8_BLOCK = 64
_NORM = (
    "values around one; a norm that rounds in BF16 moves a whole head when its factor falls on the other side"
)
# a second BF16 rounding of inputs to sums of a few units
_BETWEEN = "the values between the two products may keep the reference's BF16 rounding"


@fused_op(
    parts=(linear, rms_norm),
    inputs=inputs.cases(inputs.q_project),
    tolerances={**ROUNDING, torch.bfloat16: Tolerance(2**-6, 2**-6, _NORM)},
    cost=cost.q_project,
)
def q_project(
    ops: OpTable, x: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, rope_table: Tensor, num_heads: int,
    eps: float, numerics: Numerics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Project to queries through the low-rank bottleneck, normalise each head, rotate.

    qr = RMSNorm(wq_a x); q = wq_b qr; q = q * rsqrt(mean(q**2 over D) + eps) per head, no weight; q = RoPE(q).

    Shapes:
        x [T, N], wq_a [R, N], q_norm [R], wq_b [H * D, R], rope_table [T, r]
        -> q [T, H, D], qr [T, R], both in the activation dtype
    Source:
        official model.py, Attention
    """
    act, between = activation_dtype(numerics), between_dtype(numerics)
    qr = ops[rms_norm](ops[linear](x, wq_a, numerics, between), q_norm, eps, act)
    q = split_last(ops[linear](qr, wq_b, numerics, between), wq_b.out_features // num_heads)
    if numerics.bf16_q_norm:
        # every operation rounds: square, mean, sum with eps, rsqrt and product
        q = q.to(torch.bfloat16)
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    else:
        q = wide(q) * torch.rsqrt(wide(q).square().mean(-1, keepdim=True) + eps)
    return rotated(ops, q.to(between), rope_table).to(act), qr


@fused_op(
    parts=(linear, rms_norm),
    mutates=("window",),
    inputs=inputs.cases(inputs.kv_project_store),
    tolerances=ROUNDING,
    cost=cost.kv_project_store,
)
def kv_project_store(
    ops: OpTable, x: Tensor, wkv: Weight, kv_norm: Tensor, rope_table: Tensor, batch: Batch, window: Tensor,
    eps: float, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """Project to the one latent that is both key and value, rotate, round, and keep the last rows in the window ring.

    kv = RoPE(RMSNorm(wkv x)); kv[:, :D - r] is rounded to FP8 in groups of 64; the rotary part keeps its precision.

    Shapes:
        x [T, N], wkv [D, N], kv_norm [D], rope_table [T, r], window [slots + 1, W, row]
        -> on the decode step (T == B) the new rows [T, D], already in the ring;
           otherwise [B * W + T, D]: each ring as it stood before (slot order), then the new rows
    Edge rules:
        the last ring slot is scratch. Ring rows carry no gradient.
    Source:
        official model.py, Attention
    """
    act, between = activation_dtype(numerics), between_dtype(numerics)
    rope_dim = rope_table.shape[-1]
    kv = ops[rms_norm](ops[linear](x, wkv, numerics, between), kv_norm, eps, act)
    kv = rotated(ops, kv, rope_table)
    if numerics.q8_kv:
        plain = kv.shape[-1] - rope_dim
        kv = torch.cat((q8_round(kv[:, :plain], KV_Q8_BLOCK), kv[:, plain:]), -1)
    rows = kv
    if not batch.is_decode:
        history = load_kv(window[batch.slots.long()].flatten(0, 1), kv.shape[-1], rope_dim)
        rows = torch.cat((history.to(act), kv), 0)
    ring_write(window, store_kv(kv.detach(), window, rope_dim), batch, window.shape[1])
    return rows


@op(
    inputs=inputs.variants(
        swa=inputs.sparse_attn("swa"), csa=inputs.sparse_attn("csa"), hca=inputs.sparse_attn("hca")
    ),
    tolerances=ROUNDING,
    cost=cost.sparse_attn,
)
def sparse_attn(
    q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
    ratio: int, rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """Attend to the sliding window and to compressed entries, with a per-head sink in the denominator.

    logit_e = q . k_e / sqrt(D); out = sum_e exp(logit_e - M) v_e / (sum_e exp(logit_e - M) + exp(sink - M)), k_e = v_e,
    M the largest logit without the sink. The query at p sees rows p-W+1..p and, of entries j < floor((p+1) / ratio),
    those picked, or all where `picks` is None. float32; in reference numerics the numerators are rounded to BF16 for the
    weighted sum only.

    Shapes:
        q [T, H, D]; kv as `kv_project_store` returns it; window [slots + 1, W, row], read on the decode step;
        entries [pages, rows, row] or None; picks [T, K] int32, -1 absent, or None; sink [H] f32 -> [T, H, D] like q
    Edge rules:
        nothing of size T x S is held: queries run in blocks of about 64 MB of workspace, or one at a time. Without picks
        the entries of one sequence are held at once (16.8 MB for 1M tokens at ratio 128 and D = 512)
    Source:
        official kernel.py, sparse_attn
    """
    if batch.is_decode:
        return _decode_attention(q, window, entries, picks, batch, sink, ratio, rope_dim, numerics)
    return _prefill_attention(q, kv, window.shape[1], entries, picks, batch, sink, ratio, rope_dim, numerics)


def _attend(
    q: Tensor, logits: Tensor, values: list[tuple[Tensor, Tensor]], sink: Tensor, bf16_p: bool
) -> Tensor:
    """Softmax over concatenated logits [T, H, n], then the weighted sums over shared [n, D] or own [T, n, D] rows."""
    top = logits.amax(-1, keepdim=True)
    p = torch.exp(logits - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink[None, :, None] - top)
    if bf16_p:
        p = p.to(torch.bfloat16).float()
    out, at = torch.zeros((), device=q.device), 0
    for stored, _ in values:
        n, rows = stored.shape[-2], stored.to(q.dtype)
        part = p[..., at : at + n]
        out = out + (part.flatten(0, 1) @ rows).view_as(q) if rows.dim() == 2 else out + part @ rows
        at += n
    return out / total


def _logits(q: Tensor, values: list[tuple[Tensor, Tensor]]) -> Tensor:
    parts = []
    for stored, seen in values:
        rows = stored.to(q.dtype)
        s = (q.flatten(0, 1) @ rows.T).view(*q.shape[:2], -1) if rows.dim() == 2 else q @ rows.transpose(1, 2)
        parts.append(torch.where(seen[:, None], s * q.shape[-1] ** -0.5, -torch.inf))
    return torch.cat(parts, -1)


def _picked_rows(
    entries: Tensor, block_table: Tensor, picks: Tensor, head_dim: int, rope_dim: int
) -> tuple[Tensor, Tensor]:
    rows = entry_rows(block_table, picks, entries.shape[1], entries.shape[0])
    loaded = load_kv(entries.flatten(0, 1)[rows], head_dim, rope_dim)
    seen = picks >= 0
    # absent rows point at scratch memory: whatever lies there must not reach the weighted sum
    return torch.where(seen[..., None], loaded, 0.0), seen


def _decode_attention(
    q: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor, ratio: int,
    rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    length, head_dim = window.shape[1], q.shape[-1]
    if entries is not None and picks is None:
        # every entry of every sequence at once may be large: sequences take turns, as many as the workspace holds
        step = max(1, _WORKSPACE_BYTES // (4 * batch.block_table.shape[1] * entries.shape[1] * head_dim))
        if step < batch.num_sequences:
            spans = [(i, min(i + step, batch.num_sequences)) for i in range(0, batch.num_sequences, step)]
            return torch.cat(
                [
                    _decode_attention(
                        q[i:j],
                        window,
                        entries,
                        picks,
                        batch.decode_rows(i, j),
                        sink,
                        ratio,
                        rope_dim,
                        numerics,
                    )
                    for i, j in spans
                ]
            )
    pos = batch.positions.long()[:, None]
    slot = torch.arange(length, device=q.device)
    seen = pos - (pos - slot) % length >= 0
    rows = load_kv(window[batch.slots.long()], head_dim, rope_dim)
    values = [(torch.where(seen[..., None], rows, 0.0), seen)]
    if entries is not None:
        if picks is None:
            n = batch.block_table.shape[1] * entries.shape[1]
            every = torch.arange(n, device=q.device, dtype=torch.int32)
            picks = torch.where(every < (pos + 1) // ratio, every, -1)
        values.append(_picked_rows(entries, batch.block_table, picks, head_dim, rope_dim))
    qf = wide(q)
    return _attend(qf, _logits(qf, values), values, sink, numerics.bf16_between).to(q.dtype)


def _prefill_attention(
    q: Tensor, kv: Tensor, length: int, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
    ratio: int, rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    num_rings = batch.num_sequences * length
    bounds, positions = batch.cu_seqlens.tolist(), batch.positions.tolist()
    head_dim, num_heads = q.shape[-1], q.shape[1]
    outs = []
    for b, (lo, hi) in enumerate(pairwise(bounds)):
        start = positions[lo]
        kept = min(start, length - 1)
        ring = torch.arange(start - kept, start, device=q.device) % length
        rows = wide(torch.cat((kv[b * length + ring], kv[num_rings + lo : num_rings + hi])))
        first = start - kept
        dense = None
        num_entries = (start + hi - lo) // ratio if ratio else 0
        if entries is not None and picks is None and num_entries:
            every = torch.arange(num_entries, device=q.device)
            at = entry_rows(batch.block_table[b], every, entries.shape[1], entries.shape[0])
            dense = load_kv(entries.flatten(0, 1)[at], head_dim, rope_dim)
        num_picks = picks.shape[1] if picks is not None else 0
        for i, j in _query_blocks(
            lo, hi, num_heads * (2 * length + num_entries * (picks is None)), num_picks * head_dim
        ):
            pos = batch.positions[i:j].long()[:, None]
            left = max(first, start + i - lo - length + 1)
            right = start + j - lo
            key_pos = torch.arange(left, right, device=q.device)
            values = [(rows[left - first : right - first], (key_pos <= pos) & (key_pos > pos - length))]
            if dense is not None:
                values.append((dense, torch.arange(num_entries, device=q.device) < (pos + 1) // ratio))
            if entries is not None and picks is not None:
                table = batch.block_table[b].expand(j - i, -1)
                values.append(_picked_rows(entries, table, picks[i:j], head_dim, rope_dim))
            qf = wide(q[i:j])
            outs.append(_attend(qf, _logits(qf, values), values, sink, numerics.bf16_between).to(q.dtype))
    return torch.cat(outs)


def _query_blocks(
    lo: int, hi: int, logits_per_query: int, gathered_per_query: int
) -> Iterator[tuple[int, int]]:
    per_query = 4 * max(logits_per_query, gathered_per_query, 1)
    step = max(1, min(_MAX_QUERY_BLOCK, _WORKSPACE_BYTES // per_query))
    for i in range(lo, hi, step):
        yield i, min(i + step, hi)


@fused_op(
    parts=(linear,),
    inputs=inputs.cases(inputs.grouped_out),
    tolerances=ROUNDING,
    cost=cost.grouped_out,
    kept_roundings={torch.bfloat16: Tolerance(0.06, 2**-6, _BETWEEN)},
)
def grouped_out(
    ops: OpTable, o: Tensor, wo_a: Weight, wo_b: Weight, rope_table: Tensor, groups: int, numerics: Numerics
) -> Tensor:
    """Rotate the attention output back by the query's position, then project it, group by group, to the hidden size.

    o = RoPE^-1(o); z_g = wo_a[g] o_g, never with rounded inputs; y = wo_b concat(z).

    Shapes:
        o [T, H, D], wo_a [groups * L, H / groups * D], wo_b [N, groups * L], rope_table [T, r]
        -> [T, N] in the activation dtype
    Source:
        official model.py, Attention
    """
    act, between = activation_dtype(numerics), between_dtype(numerics)
    back = split_last(
        rotated(ops, o, rope_table, inverse=True).flatten(1), wo_a.in_features
    )  # [T, g, H/g * D]
    rank = wo_a.out_features // groups
    z = [matmul(wide(back[:, g]), wo_a, g * rank, (g + 1) * rank) for g in range(groups)]
    return ops[linear](torch.cat(z, -1).to(between), wo_b, numerics, act)
