"""The projections around attention, written from their parts with a vendor's rotation, norm and products inside."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import index_query as index_query_op
from v4sdk.ops import kv_project_store as kv_project_store_op
from v4sdk.ops.batch import Batch
from v4sdk.ops.linear import linear, matmul
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.op import OpTable
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.quant import split_last
from v4sdk.weights import Weight

from ..contract import Pack
from . import EVERYWHERE, Calls, Provider, narrow
from .rotary import Rotate


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
    """As the op."""
    return kv_project_store_op.build(_rotating(rotate, to))(
        x, wkv, kv_norm, rope_table, batch, window, eps, numerics
    )


def index_query(
    rotate: Rotate, to: Calls, x: Tensor, qr: Tensor, wq_b: Weight, weights_proj: Weight, rope_table: Tensor,
    num_heads: int, numerics: Numerics,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the op."""
    return index_query_op.build(_rotating(rotate, to))(
        x, qr, wq_b, weights_proj, rope_table, num_heads, numerics
    )


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


def _rotating(rotate: Rotate, to: Calls) -> OpTable:
    """The ops of this run, whose rotation a pack makes."""
    return to.ops.rotating(partial(rotate, to))


def providers(pack: Pack, key: str, rotate: Rotate) -> tuple[Provider, ...]:
    """The projections with the rotation of one pack.

    Args:
        key: of the rotation in the contract.
    """
    return tuple(
        Provider(function.__name__, pack, (key,), EVERYWHERE, partial(function, rotate), narrow)
        for function in (q_project, kv_project_store, index_query, grouped_out)
    )
