"""Manifold-constrained hyper-connections: M residual streams, mixed before and after every sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.ops import cost, inputs
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.op import ROUNDING, OpTable, Tolerance, fused_op, op
from v4sdk.ops.precision import wide
from v4sdk.quant import split_last


def _mix(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = wide(x.flatten(1))
    # the norm is applied after the product, as the reference does
    return (flat @ fn.to(flat.dtype).T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Push a matrix towards doubly stochastic: row softmax, then alternate column and row normalisation, column last.

    Shapes:
        logits [T, M, M] float32, row j source stream, column k destination -> [T, M, M]
    Source:
        official kernel.py, hc_split_sinkhorn: `iterations` column and `iterations - 1` row normalisations
    """
    c = torch.softmax(logits, -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


@op(inputs=inputs.cases(inputs.hc_pre), tolerances=ROUNDING, cost=cost.hc_pre)
def hc_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a sub-layer input, and compute how its output will be written back.

    mix = (x . fn^T) * rsqrt(mean(x**2) + norm_eps); pre = sigmoid(mix * scale0 + base) + hc_eps;
    post = 2 * sigmoid(mix * scale1 + base); comb = sinkhorn(mix * scale2 + base); u = sum_j pre_j x_j. All in float32.

    Shapes:
        x [T, M, N], fn [(2 + M) * M, M * N] f32, base [(2 + M) * M] f32, scale [3] f32
        -> u [T, N] dtype of x, post [T, M] f32, comb [T, M, M] f32
    Source:
        DeepSeek-V4 report, hyper-connections; official model.py, Block.hc_pre
    """
    m = x.shape[1]
    mix = _mix(x, fn, norm_eps)
    pre = torch.sigmoid(mix[:, :m] * scale[0] + base[:m]) + hc_eps
    post = 2 * torch.sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = split_last(mix[:, 2 * m :] * scale[2] + base[2 * m :], m)
    u = torch.einsum("tm,tmn->tn", pre, wide(x)).to(x.dtype)
    return u, post, sinkhorn(comb, iterations, hc_eps)


@op(inputs=inputs.cases(inputs.hc_post), tolerances=ROUNDING, cost=cost.hc_post)
def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write a sub-layer's output back into the streams.

    x'[t, k] = post[t, k] * y[t] + sum_j comb[t, j, k] * x[t, j], in float32, rounded once. The sum runs over the first
    index of comb.

    Shapes:
        y [T, N], x [T, M, N], post [T, M] f32, comb [T, M, M] f32 -> [T, M, N] like x
    Edge rules:
        T == 0 gives an empty tensor. The result never aliases `x`.
    Source:
        DeepSeek-V4 report, hyper-connections; official model.py, Block.hc_post
    """
    mixed = comb.transpose(1, 2) @ wide(x)
    return (post[..., None] * wide(y)[:, None] + mixed).to(x.dtype)


# the mixes are computed from streams as stored: one BF16 stream value that fell on the other side moves them all a little
_AFTER_BF16 = Tolerance(
    2e-4, 2e-4, "float32 sums over values of which one may be rounded to the other BF16 neighbour"
)


@fused_op(
    parts=(hc_post, hc_pre, rms_norm),
    inputs=inputs.cases(inputs.hc_post_pre),
    tolerances={**ROUNDING, torch.float32: _AFTER_BF16},
    cost=cost.hc_post_pre,
)
def hc_post_pre(
    ops: OpTable, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    norm_weight: Tensor, iterations: int, norm_eps: float, hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross a sub-layer boundary: write the last output back, collapse for the next sub-layer, and normalise.

    Shapes:
        as `hc_post` then `hc_pre`; norm_weight [N]
        -> x' [T, M, N], normed input [T, N], post' [T, M] f32, comb' [T, M, M] f32
    """
    streams = ops[hc_post](y, x, post, comb)
    u, next_post, next_comb = ops[hc_pre](streams, fn, base, scale, iterations, norm_eps, hc_eps)
    return streams, ops[rms_norm](u, norm_weight, norm_eps, u.dtype), next_post, next_comb


@op(inputs=inputs.cases(inputs.hc_head), tolerances=ROUNDING, cost=cost.hc_head)
def hc_head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float) -> Tensor:
    """Collapse the streams for the output head: h = sum_j (sigmoid(mix_j * scale + base_j) + hc_eps) x_j.

    Shapes:
        x [T, M, N], fn [M, M * N] f32, base [M] f32, scale [1] f32 -> [T, N] dtype of x
    Source:
        official model.py, hc_head
    """
    pre = torch.sigmoid(_mix(x, fn, norm_eps) * scale + base) + hc_eps
    return torch.einsum("tm,tmn->tn", pre, wide(x)).to(x.dtype)
