"""Routed and shared experts by torch_npu.

Rows are gathered by expert, multiplied group by group, and brought back. The routing weight enters before the second matrix, so
rows are weighted there, and the summing at the end has weights of one, in float32, over experts in ascending id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.linear import linear
from v4sdk.ops.moe import routed_experts as routed_experts_op
from v4sdk.ops.precision import activation_dtype, between_dtype, wide
from v4sdk.weights import ExpertWeights, Weight

from ..chip import Family
from . import Calls, rounded
from .dense import FLOAT4_E2M1, FLOAT8_E8M0, is_int8, is_mx, mx_input, paired
from .layout import halves

_BY_COUNT, _BY_ROWS, _ONE_RESULT = 1, 0, 3
_DYNAMIC, _NO_QUANT = 1, -1
# the model's clamp with plain halves; 1 is the same with interleaved channels
_CLAMPED_HALVES = 2
_ALPHA, _BIAS = 1.0, 0.0
_WIDEST = 10496
# any matrix of a routed expert
_EXPERT = "layers.0.ffn.experts.0.w1"


@dataclass(frozen=True)
class _Rows:
    """Rows gathered by expert.

    Attributes:
        rows: [T * K, N] BF16, or int8 with scale. counts: [E] int64 rows per expert. weights: [T * K] float32 in row order.
        places: [T * K] int32, row of each (token, choice). scale: [T * K] float32 or None.
    """

    rows: Tensor
    counts: Tensor
    weights: Tensor
    places: Tensor
    scale: Tensor | None


def routed_experts(
    to: Calls,
    u: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    limit: float,
    numerics: Numerics,
) -> Tensor:
    """As the op, for stacks in int8 with a scale per channel, BF16, and on the 950 MXFP4; others run the reference.

    Inputs of int8 products are rounded to int8 with a scale per row, inputs of MX products to FP8 with a scale per 32.
    """
    packed = experts.packed
    if packed is None:
        return routed_experts_op(u, ids, weights, experts, limit, numerics)
    w1, w2, w3 = packed
    if is_int8(to, w1) and is_int8(to, w2):
        way = _int8
    elif w1.encoding == "fp4" and is_mx(to, w1, numerics) and is_mx(to, w2, numerics):
        way = _mx
    elif w1.encoding == "float" and w1.data.dtype == u.dtype == torch.bfloat16:
        way = _bf16
    else:
        return routed_experts_op(u, ids, weights, experts, limit, numerics)
    gathered = _gather(to, u, ids, weights, w1, way is _int8)
    return _sum(to, way(to, gathered, w1, w2, w3, limit), gathered.places, *ids.shape)


def _gather(to: Calls, u: Tensor, ids: Tensor, weights: Tensor, w1: Weight, quantise: bool) -> _Rows:
    count = w1.data.shape[0]
    ordered, by_id = torch.sort(ids.long(), dim=-1, stable=True)
    rows, places, counts, scale = to(
        "npu.npu_moe_init_routing_v2", u.to(torch.bfloat16).contiguous(), ordered.to(torch.int32), active_num=ids.numel(),
        expert_num=count, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        quant_mode=_DYNAMIC if quantise else _NO_QUANT, active_expert_range=[0, count], row_idx_type=0,
    )  # fmt: skip
    in_order = torch.gather(weights.float(), 1, by_id).flatten()
    spread = torch.empty_like(in_order).scatter_(0, places.long(), in_order)
    return _Rows(rows, counts, spread, places, scale if quantise else None)


def _grouped(
    to: Calls, x: Tensor, matrix: Tensor, counts: Tensor, dtype: torch.dtype, **scales: object
) -> Tensor:
    """Rows of each group times its matrix: x [R, in], matrix [E, in, out] -> [R, out]."""
    out: list[Tensor] = to(
        "npu.npu_grouped_matmul", [x], [matrix], group_list=counts, split_item=_ONE_RESULT, group_type=_BY_ROWS,
        group_list_type=_BY_COUNT, output_dtype=dtype, **scales,
    )  # fmt: skip
    return out[0]


def _gate_and_up(to: Calls, found: _Rows, w1: Weight, w3: Weight, dtype: torch.dtype) -> Tensor:
    """Both first products side by side: one where the matrices are halves of one tensor, which `layout.experts` makes them."""
    joint = halves(w1.data, w3.data)
    matrices = (w1.data, w3.data) if joint is None else (joint,)
    parts = [_grouped(to, found.rows, m.transpose(1, 2), found.counts, dtype) for m in matrices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _int8(to: Calls, found: _Rows, w1: Weight, w2: Weight, w3: Weight, limit: float) -> Tensor:
    assert w1.scale is not None
    assert w2.scale is not None
    assert w3.scale is not None
    assert found.scale is not None
    sums = _gate_and_up(to, found, w1, w3, torch.int32)
    scales = halves(w1.scale, w3.scale)
    scales = torch.cat((w1.scale, w3.scale), 1) if scales is None else scales
    inner, scale = to(
        "npu.npu_dequant_swiglu_quant", sums, weight_scale=scales[..., 0].contiguous(),
        activation_scale=found.scale, group_index=found.counts, activate_left=True, quant_mode=_DYNAMIC,
        swiglu_mode=_CLAMPED_HALVES, clamp_limit=limit, glu_alpha=_ALPHA, glu_bias=_BIAS,
    )  # fmt: skip
    # a positive factor of a whole row leaves its int8 codes as they are. float32 scales go with FP16 results, which hold what
    # clamped gates times a row of the matrix can give; with BF16 results the scales would be BF16 too
    return _grouped(
        to, inner, w2.data.transpose(1, 2), found.counts, torch.float16, scale=[w2.scale[..., 0].contiguous()],
        per_token_scale=[scale.flatten() * found.weights],
    )  # fmt: skip


def _bf16(to: Calls, found: _Rows, w1: Weight, w2: Weight, w3: Weight, limit: float) -> Tensor:
    both = _gate_and_up(to, found, w1, w3, torch.bfloat16)
    inner = (_gated(to, both, limit) * found.weights[:, None]).to(torch.bfloat16)
    return _grouped(to, inner, w2.data.transpose(1, 2), found.counts, torch.bfloat16)


def _mx(to: Calls, found: _Rows, w1: Weight, w2: Weight, w3: Weight, limit: float) -> Tensor:
    codes, scales = mx_input(to, found.rows)
    both = torch.cat([_mx_product(to, codes, scales, w, found.counts) for w in (w1, w3)], -1)
    inner = (_gated(to, both, limit) * found.weights[:, None]).to(torch.bfloat16)
    return _mx_product(to, *mx_input(to, inner), w2, found.counts)


def _mx_product(to: Calls, codes: Tensor, scales: Tensor, weight: Weight, counts: Tensor) -> Tensor:
    return _grouped(
        to, codes, weight.data.view(torch.uint8).transpose(1, 2), counts, torch.bfloat16, antiquant_scale=[paired(weight)],
        per_token_scale=[scales], weight_dtype=FLOAT4_E2M1, per_token_scale_dtype=FLOAT8_E8M0,
    )  # fmt: skip


def _gated(to: Calls, both: Tensor, limit: float) -> Tensor:
    """silu(min(g, limit)) * clamp(v, -limit, limit) of [R, 2 * I], in float32; the defaults are another model's."""
    out: Tensor = to(
        "npu.npu_clipped_swiglu",
        both.float(),
        dim=-1,
        alpha=_ALPHA,
        limit=limit,
        bias=_BIAS,
        interleaved=False,
    )
    return out


def _sum(to: Calls, rows: Tensor, places: Tensor, tokens: int, choices: int) -> Tensor:
    """Sum the rows of each token in float32, in the order of its choices."""
    # this mode reads the places choice by choice: those of all first choices, then of all second ones
    by_choice = places.view(tokens, choices).T.flatten().contiguous()
    ones = torch.ones(tokens, choices, device=rows.device)
    out: Tensor = to(
        "npu.npu_moe_finalize_routing", rows.float(), None, None, None, ones, by_choice, None, drop_pad_mode=0
    )
    return out


def shared_expert(
    to: Calls, u: Tensor, routed: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float, numerics: Numerics
) -> Tensor:
    """As the op, with the chosen products and one call for the gate."""
    between = between_dtype(numerics)
    both = torch.cat([to.ops[linear](u, w, numerics, between) for w in (w1, w3)], -1)
    a = _gated(to, both, limit).to(between)
    return (routed + wide(to.ops[linear](a, w2, numerics, between))).to(activation_dtype(numerics))


def unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """No int4 experts; on 910B and 910C widths of a multiple of 64 to 10496, for the gate of int8 products."""
    if config.integers is not None and config.integers.encoding(_EXPERT) == "int4":
        return "experts are int4, of which its grouped products read a packing that no folder of ours has"
    inner = config.moe_intermediate_size
    if family != "950" and (inner % 64 or inner > _WIDEST):
        return f"experts are {inner} wide, and its document knows multiples of 64 to {_WIDEST}"
    return rounded(config, engine, family)
