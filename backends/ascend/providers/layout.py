"""Weights as the adapters read them: laid out once at load, still legal `Weight`s that every other reader understands.

Matrices are multiplied from the right, so int8 and BF16 stacks of experts are stored [E, in, out] and seen [E, out, in]; gate and
up matrices are halves of one tensor, so that both are one grouped product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4sdk.quant import ue8m0_ceil
from v4sdk.weights import ExpertWeights, Weight, stack

_MX_BLOCK = 32


def mx_scales(weight: Weight) -> Weight:
    """An FP8 matrix whose scales are powers of two with one scale per 32 columns of each row, which is the same matrix.

    Others are given back as they are: float32 scales of any value have no such form.
    """
    b0, b1 = weight.block
    scale = weight.scale
    if weight.encoding != "fp8" or scale is None or b1 % _MX_BLOCK or weight.in_features % _MX_BLOCK:
        return weight
    if scale.dtype == torch.float32:
        exact = ue8m0_ceil(scale)
        # a power of two has no mantissa bits
        if bool((scale.contiguous().view(torch.int32) & 0x7FFFFF).any()):
            return weight
        scale = exact
    rows, columns = weight.out_features, weight.in_features // _MX_BLOCK
    wide = (
        scale.view(torch.uint8)
        .repeat_interleave(b0, -2)[..., :rows, :]
        .repeat_interleave(b1 // _MX_BLOCK, -1)
    )
    return replace(weight, scale=wide[..., :columns].contiguous(), block=(1, _MX_BLOCK))


def experts(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """The routed experts of one layer, stacked in the device's memory."""
    if weights.packed is not None and not weights.w1:
        return weights.to(device)
    # laid out there: the host may have room for one copy only
    w1, w2, w3 = (stack(w).to(device) for w in (weights.w1, weights.w2, weights.w3))
    if w1.encoding not in ("float", "int8"):
        return ExpertWeights(packed=(w1, w2, w3))
    both = torch.cat((w1.data, w3.data), 1).transpose(1, 2).contiguous().transpose(1, 2)
    scale = torch.cat((w1.scale, w3.scale), 1) if w1.scale is not None and w3.scale is not None else None
    inner = w1.out_features
    gate, up = (
        replace(w, data=both[:, part], scale=None if scale is None else scale[:, part])
        for w, part in ((w1, slice(None, inner)), (w3, slice(inner, None)))
    )
    down = replace(w2, data=w2.data.transpose(1, 2).contiguous().transpose(1, 2))
    return ExpertWeights(packed=(gate, down, up))


def halves(gate: Tensor, up: Tensor) -> Tensor | None:
    """Two tensors [E, I, ..] that are halves of one as that one, [E, 2 * I, ..]; None if they are not."""
    same = gate.untyped_storage()._cdata == up.untyped_storage()._cdata
    if not same or gate.stride() != up.stride():
        return None
    if up.storage_offset() - gate.storage_offset() != gate.shape[1] * gate.stride(1):
        return None
    shape = (gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
    return gate.as_strided(shape, gate.stride(), gate.storage_offset())
