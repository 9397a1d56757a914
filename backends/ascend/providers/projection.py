"""The projections around attention, written from their parts with a vendor's rotation, norm and products inside."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.linear import linear, matmul
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.ops.rows import load_kv, ring_write, store_kv
from v4sdk.quant import hadamard, q4_round, q8_round, split_last
from v4sdk.weights import Weight

from . import Calls
from .rotary import Rotate

_KV_Q8_BLOCK = 64


def q_project(
    rotate: Rotate, to: Calls, x: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, rope_table: Tensor, num_heads: int,
    eps: float, numerics: Numerics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op; the norm of each head is an RMS norm with a weight of ones, one call instead of five."""
    act, between = activation_dtype(numerics), between_dtype(numerics)
    qr = to.ops[rms_norm](to.ops[linear](x, wq_a, numerics, between), q_norm, eps, act)
    q = split_last(to.ops[linear](qr, wq_b, numerics, between), wq_b.out_features // num_heads)
    if numerics.bf16_q_norm:
        # every operation rounds, which no fused norm does
        q = q.to(torch.bfloat16)
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    else:
        ones = torch.ones(q.shape[-1], device=q.device)
        q = to.ops[rms_norm](q, ones, eps, torch.float32)
    return rotate(to, q.to(between), rope_table, False).to(act), qr


def kv_project_store(
    rotate: Rotate, to: Calls, x: Tensor, wkv: Weight, kv_norm: Tensor, rope_table: Tensor, batch: Batch, window: Tensor,
    eps: float, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """As the op: rows rounded and stored by the same functions as everywhere."""
    act, between = activation_dtype(numerics), between_dtype(numerics)
    rope_dim = rope_table.shape[-1]
    kv = to.ops[rms_norm](to.ops[linear](x, wkv, numerics, between), kv_norm, eps, act)
    kv = rotate(to, kv, rope_table, False)
    if numerics.q8_kv:
        plain = kv.shape[-1] - rope_dim
        kv = torch.cat((q8_round(kv[:, :plain], _KV_Q8_BLOCK), kv[:, plain:]), -1)
    rows = kv
    if not batch.is_decode:
        history = load_kv(window[batch.slots.long()].flatten(0, 1), kv.shape[-1], rope_dim)
        rows = torch.cat((history.to(act), kv), 0)
    ring_write(window, store_kv(kv.detach(), window, rope_dim), batch, window.shape[1])
    return rows


def index_query(
    rotate: Rotate, to: Calls, x: Tensor, qr: Tensor, wq_b: Weight, weights_proj: Weight, rope_table: Tensor,
    num_heads: int, numerics: Numerics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op."""
    between = between_dtype(numerics)
    q = split_last(to.ops[linear](qr, wq_b, numerics, between), wq_b.out_features // num_heads)
    q = index_rounded(rotate(to, q, rope_table, False).to(activation_dtype(numerics)), numerics)
    w = to.ops[linear](x, weights_proj, numerics, between)
    return q, w * (q.shape[-1] ** -0.5 * num_heads**-0.5)


def index_rounded(x: Tensor, numerics: Numerics) -> Tensor:
    """Index queries and keys as they are compared: Hadamard-rotated, rounded to FP4; both only where values are rounded."""
    return q4_round(hadamard(x).to(x.dtype)) if numerics.q4_index else x


def grouped_out(
    rotate: Rotate, to: Calls, o: Tensor, wo_a: Weight, wo_b: Weight, rope_table: Tensor, groups: int,
    numerics: Numerics,
) -> Tensor:  # fmt: skip
    """As the op; with BF16 matrices the groups are one batched product, whose result is BF16 as in the reference."""
    act, between = activation_dtype(numerics), between_dtype(numerics)
    back = split_last(rotate(to, o, rope_table, True).flatten(1), wo_a.in_features)  # [T, g, H/g * D]
    rank = wo_a.out_features // groups
    if wo_a.encoding == "float" and wo_a.data.dtype == back.dtype == torch.bfloat16:
        z = (
            torch.bmm(back.transpose(0, 1), wo_a.data.view(groups, rank, -1).transpose(1, 2))
            .transpose(0, 1)
            .flatten(1)
        )
    else:
        z = torch.cat([matmul(wide(back[:, g]), wo_a, g * rank, (g + 1) * rank) for g in range(groups)], -1)
    return to.ops[linear](z.to(between), wo_b, numerics, act)
