"""What each op must move and compute, from its own arguments: the floor that benchmarks compare with.

Bytes are counted once, at stored width: weights and cache rows as stored, activations in their dtype. FLOPs are 2 per
multiply-add of the matrix products; element-wise work is left out, since bytes bound it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.op import Cost
from v4sdk.weights import ExpertWeights, Weight

_F32 = 4


def _act(numerics: Numerics) -> int:
    return 2 if numerics.bf16_activations else 4


def _macs(*weights: Weight) -> int:
    return sum(w.out_features * w.in_features for w in weights)


def _nbytes(*weights: Weight) -> int:
    return sum(w.nbytes for w in weights)


def embed(token_ids: Tensor, weight: Tensor, hc_mult: int, numerics: Numerics) -> Cost:
    """One table row per token, written once per stream."""
    t, n = token_ids.shape[0], weight.shape[1]
    return Cost(t * (n * weight.itemsize + 8), t * hc_mult * n * _act(numerics), 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Cost:
    """Read and write once."""
    return Cost(x.nbytes + weight.nbytes, x.numel() * dtype.itemsize, 0)


def linear(x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype) -> Cost:
    """One product."""
    t = x.shape[0]
    return Cost(x.nbytes + weight.nbytes, t * weight.out_features * dtype.itemsize, 2 * t * _macs(weight))


def logits(h: Tensor, head: Weight) -> Cost:
    """One product into float32."""
    t = h.shape[0]
    return Cost(h.nbytes + head.nbytes, t * head.out_features * _F32, 2 * t * _macs(head))


def hc_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float
) -> Cost:
    """Streams read once, one hidden row written."""
    t, m, n = x.shape
    small = t * (m + m * m) * _F32
    return Cost(x.nbytes + fn.nbytes, t * n * x.itemsize + small, 2 * t * m * n * (fn.shape[0] + 1))


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Cost:
    """Streams read and written once."""
    t, m, n = x.shape
    return Cost(y.nbytes + x.nbytes + post.nbytes + comb.nbytes, x.nbytes, 2 * t * n * m * (m + 1))


def hc_post_pre(
    y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor,
    iterations: int, norm_eps: float, hc_eps: float,
) -> Cost:  # fmt: skip
    """Both halves with the streams read once and written once."""
    after, before = hc_post(y, x, post, comb), hc_pre(x, fn, base, scale, iterations, norm_eps, hc_eps)
    read = after.read_bytes + fn.nbytes + norm_weight.nbytes
    return Cost(read, after.write_bytes + before.write_bytes, after.flops + before.flops)


def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float) -> Cost:
    """Streams read once, one hidden row written."""
    t, m, n = x.shape
    return Cost(x.nbytes + fn.nbytes, t * n * x.itemsize, 2 * t * m * n * (m + 1))


def q_project(
    x: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, rope_table: Tensor, num_heads: int, eps: float,
    numerics: Numerics,
) -> Cost:  # fmt: skip
    """Two products; queries and their low-rank form written."""
    t = x.shape[0]
    out = t * (wq_b.out_features + wq_a.out_features) * _act(numerics)
    return Cost(x.nbytes + _nbytes(wq_a, wq_b) + rope_table.nbytes, out, 2 * t * _macs(wq_a, wq_b))


def kv_project_store(
    x: Tensor, wkv: Weight, kv_norm: Tensor, rope_table: Tensor, batch: Batch, window: Tensor, eps: float,
    numerics: Numerics,
) -> Cost:  # fmt: skip
    """One product; new rows go to the ring, and, outside the decode step, with the old rings to the result."""
    t, b = x.shape[0], batch.num_sequences
    row = window.shape[2] * window.itemsize
    history = 0 if batch.is_decode else b * window.shape[1]
    stored = min(t, b * window.shape[1]) * row
    out = (t + history) * wkv.out_features * _act(numerics)
    return Cost(x.nbytes + wkv.nbytes + history * row, stored + out, 2 * t * _macs(wkv))


def compress(
    x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch, state: Tensor,
    entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
) -> Cost:  # fmt: skip
    """Two products; on average T / ratio entries written, each from its block's rows; new rows kept in the ring."""
    t, width, span = x.shape[0], ape.shape[1], state.shape[1]
    closed = max(1, t // ratio)
    from_ring = min(closed, batch.num_sequences) * span * 2 * width * _F32
    kept = min(t, batch.num_sequences * span) * 2 * width * _F32
    row = entries.shape[2] * entries.itemsize
    return Cost(x.nbytes + _nbytes(wkv, wgate) + from_ring, closed * row + kept, 2 * t * _macs(wkv, wgate))


def index_query(
    x: Tensor,
    qr: Tensor,
    wq_b: Weight,
    weights_proj: Weight,
    rope_table: Tensor,
    num_heads: int,
    numerics: Numerics,
) -> Cost:
    """Two products."""
    t, act = x.shape[0], _act(numerics)
    out = t * (wq_b.out_features + num_heads) * act
    return Cost(x.nbytes + qr.nbytes + _nbytes(wq_b, weights_proj), out, 2 * t * _macs(wq_b, weights_proj))


def index_topk(
    q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
) -> Cost:
    """Every visible key read once per sequence and scored by every head."""
    seen, per_query = _visible(batch, ratio)
    row = keys.shape[2] * keys.itemsize
    flops = 2 * per_query * q.shape[1] * (q.shape[2] + 1)
    return Cost(q.nbytes + w.nbytes + seen * row, q.shape[0] * topk * 4, flops)


def sparse_attn(
    q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
    ratio: int, rope_dim: int, numerics: Numerics,
) -> Cost:  # fmt: skip
    """Window and entries read as stored, picked entries once per query; two products per visited row and head."""
    t, h, d = q.shape
    visited = t * window.shape[1]
    read = (
        batch.num_sequences * window.shape[1] * window.shape[2] * window.itemsize
        if batch.is_decode
        else kv.nbytes
    )
    if entries is not None:
        row = entries.shape[2] * entries.itemsize
        seen, per_query = _visible(batch, ratio)
        picked = per_query if picks is None else int((picks >= 0).sum())
        visited += picked
        read += (seen if picks is None else picked) * row
    return Cost(q.nbytes + read, q.nbytes, 4 * visited * h * d)


def grouped_out(
    o: Tensor, wo_a: Weight, wo_b: Weight, rope_table: Tensor, groups: int, numerics: Numerics
) -> Cost:
    """Two products, the first block-diagonal."""
    t = o.shape[0]
    out = t * wo_b.out_features * _act(numerics)
    return Cost(o.nbytes + _nbytes(wo_a, wo_b) + rope_table.nbytes, out, 2 * t * _macs(wo_a, wo_b))


def route(u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float) -> Cost:
    """One product in float32."""
    t, (e, n) = u.shape[0], gate.shape
    return Cost(u.nbytes + gate.nbytes + bias.nbytes, t * num_experts_per_tok * 8, 2 * t * e * n)


def route_hash(u: Tensor, gate: Tensor, tid2eid: Tensor, token_ids: Tensor, scale: float) -> Cost:
    """Only the chosen rows of the gate are needed."""
    t, k, n = u.shape[0], tid2eid.shape[1], gate.shape[1]
    rows = min(t * k, gate.shape[0]) * n * gate.itemsize
    return Cost(u.nbytes + rows + t * k * tid2eid.itemsize, t * k * 8, 2 * t * k * n)


def routed_experts(
    u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics
) -> Cost:
    """Each chosen expert's bytes once, however many tokens chose it."""
    t, k = ids.shape
    touched = torch.unique(ids).numel()
    one = experts.expert(0)
    return Cost(u.nbytes + touched * _nbytes(*one), t * u.shape[1] * _F32, 2 * t * k * _macs(*one))


def shared_expert(
    u: Tensor, routed: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float, numerics: Numerics
) -> Cost:
    """Three products."""
    t = u.shape[0]
    return Cost(u.nbytes + routed.nbytes + _nbytes(w1, w2, w3), u.nbytes, 2 * t * _macs(w1, w2, w3))


def _visible(batch: Batch, ratio: int) -> tuple[int, int]:
    """Entries that any query of a step sees, summed over sequences; and (query, entry) pairs."""
    counts = ((batch.positions.long() + 1) // ratio).tolist()
    ends = batch.cu_seqlens[1:].tolist()
    return sum(counts[end - 1] for end in ends), sum(counts)
