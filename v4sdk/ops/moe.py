"""Mixture of experts: learned and hashed routing, routed experts, the shared expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import cost, inputs
from v4sdk.ops.linear import gemm_input, linear
from v4sdk.ops.op import ROUNDING, OpTable, Tolerance, fused_op, op
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.weights import DEQUANT_LIMIT_BYTES, ExpertWeights, Weight, pick


def _scores(u: Tensor, gate: Tensor) -> Tensor:
    # float32 end to end: routing flips dominate every other divergence
    return torch.sqrt(F.softplus(wide(u) @ gate.to(wide(u).dtype).T))


def _weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    w = torch.gather(scores, 1, ids)
    return w / w.sum(-1, keepdim=True) * scale


@op(
    sensitivity="selection",
    inputs=inputs.edges(inputs.cases(inputs.route), ties=inputs.route_ties),
    tolerances=ROUNDING,
    cost=cost.route,
)
def route(
    u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts by learned scores; the bias moves the choice, never the weight.

    s = sqrt(softplus(u . gate^T)); ids = the K largest of s + bias; w = s[ids] / sum(s[ids]) * scale. All float32.

    Shapes:
        u [T, N], gate [E, N], bias [E] f32 -> ids [T, K] int32 by descending s + bias, weights [T, K] f32
    Edge rules:
        ties go to the lowest expert id
    Source:
        official model.py, Gate
    """
    scores = _scores(u, gate)
    order = torch.sort(scores.detach() + bias, dim=-1, descending=True, stable=True).indices
    ids = order[:, :num_experts_per_tok]
    return ids.to(torch.int32), _weights(scores, ids, scale)


@op(inputs=inputs.cases(inputs.route_hash), tolerances=ROUNDING, cost=cost.route_hash)
def route_hash(
    u: Tensor, gate: Tensor, tid2eid: Tensor, token_ids: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts by token id; weights still come from the gate's scores.

    Shapes:
        u [T, N], gate [E, N], tid2eid [V, K] int, token_ids [T] -> ids [T, K] int32, weights [T, K] f32
    Source:
        official model.py, Gate with `hash`
    """
    ids = tid2eid[token_ids].long()
    return ids.to(torch.int32), _weights(_scores(u, gate), ids, scale)


# inner values of up to 100 enter w2 in BF16 or in float32: half a step of each, over sums of unit weights
_INNER = "the values between the expert's parts may keep the reference's BF16 rounding"
_KEPT = {
    torch.float32: Tolerance(0.03, 2**-6, _INNER),
    torch.bfloat16: Tolerance(0.06, 2**-6, _INNER),
}


def _gated(g: Tensor, v: Tensor, limit: float) -> Tensor:
    g, v = wide(g).clamp(max=limit), wide(v).clamp(-limit, limit)
    return F.silu(g) * v


@op(
    inputs=inputs.edges(
        inputs.variants(mapped=inputs.routed_experts(False), packed=inputs.routed_experts(True)),
        twice=inputs.same_expert_twice,
    ),
    tolerances=ROUNDING,
    cost=cost.routed_experts,
    kept_roundings=_KEPT,
)
def routed_experts(
    u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics
) -> Tensor:
    """Run the chosen experts and sum them, in float32, in ascending expert id.

    g = W1 u, v = W3 u; a = weight * silu(min(g, limit)) * clamp(v, -limit, limit); y += W2 a. The routing weight enters
    before W2. In reference numerics g, v, a and each expert's output are rounded to BF16 and GEMM inputs to FP8.

    Shapes:
        u [T, N], ids [T, K] int, weights [T, K] f32 -> [T, N] float32
    Edge rules:
        an expert listed twice for a token contributes twice
    Source:
        official model.py, MoE and Expert
    """
    if experts.packed is not None and not (torch.is_grad_enabled() and u.requires_grad):
        per_token = ids.shape[1] * experts.packed[0].data[0].numel() * 8 * 3
        if u.shape[0] * per_token <= DEQUANT_LIMIT_BYTES or not experts.w1:
            step = max(1, DEQUANT_LIMIT_BYTES // per_token)
            spans = [slice(at, at + step) for at in range(0, u.shape[0], step)]
            return torch.cat(
                [_chosen_on_device(u[s], ids[s], weights[s], experts.packed, limit, numerics) for s in spans]
            )
    return _expert_by_expert(u, ids, weights, experts, limit, numerics)


def _expert_by_expert(
    u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics
) -> Tensor:
    # reads ids on the host, so only the experts that are asked for are ever touched on disk
    y = torch.zeros_like(wide(u))
    between = between_dtype(numerics)
    for e in torch.unique(ids).tolist():
        w1, w2, w3 = experts.expert(e)
        token, choice = torch.nonzero(ids == e, as_tuple=True)
        rows = u[token]
        a = _gated(linear(rows, w1, numerics, between), linear(rows, w3, numerics, between), limit)
        a = (a * weights[token, choice][:, None]).to(between)
        y = y.index_add(0, token, wide(linear(a, w2, numerics, between)))
    return y


def _each(rows: Tensor, chosen: Weight) -> Tensor:
    """Rows [T, K or 1, 1, in] times the matrix of each choice [T, K, out, in]: [T, K, out]."""
    parts = [
        (rows @ chosen.dequantize(i, j).to(rows.dtype).transpose(-1, -2))[:, :, 0]
        for i, j in chosen.row_blocks()
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _chosen_on_device(
    u: Tensor,
    ids: Tensor,
    weights: Tensor,
    packed: tuple[Weight, Weight, Weight],
    limit: float,
    numerics: Numerics,
) -> Tensor:
    between = between_dtype(numerics)
    ordered, by_id = torch.sort(ids.long(), dim=-1, stable=True)
    w = torch.gather(weights, 1, by_id)
    w1, w2, w3 = (pick(stack, ordered) for stack in packed)  # [T, K, ...]
    rows = gemm_input(u, w1, numerics)[:, None, None]
    g, v = (_each(rows, m).to(between) for m in (w1, w3))
    a = (_gated(g, v, limit) * w[..., None]).to(between)
    out = wide(_each(gemm_input(a, w2, numerics)[:, :, None], w2).to(between))
    y = torch.zeros_like(wide(u))
    for k in range(ids.shape[1]):
        y = y + out[:, k]
    return y


@fused_op(
    parts=(linear,),
    inputs=inputs.cases(inputs.shared_expert),
    tolerances=ROUNDING,
    cost=cost.shared_expert,
    kept_roundings=_KEPT,
)
def shared_expert(
    ops: OpTable,
    u: Tensor,
    routed: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float,
    numerics: Numerics,
) -> Tensor:
    """Run the shared expert and add it to the routed sum in float32; the clamp applies here too.

    Shapes:
        u [T, N], routed [T, N] f32, w1 and w3 [I, N], w2 [N, I] -> [T, N] in the activation dtype
    Source:
        official model.py, MoE, with the clamp of the corrected revision
    """
    between = between_dtype(numerics)
    a = _gated(ops[linear](u, w1, numerics, between), ops[linear](u, w3, numerics, between), limit).to(
        between
    )
    y = routed + wide(ops[linear](a, w2, numerics, between))
    return y.to(activation_dtype(numerics))
