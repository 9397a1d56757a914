"""RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.ops import cost, inputs
from v4sdk.ops.op import ROUNDING, op
from v4sdk.ops.precision import wide


@op(inputs=inputs.cases(inputs.rms_norm), tolerances=ROUNDING, cost=cost.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise the last dimension to unit root mean square, then scale.

    y = weight * x / sqrt(mean(x**2) + eps), in float32, rounded once to `dtype`.

    Shapes:
        x [..., N], weight [N] -> [..., N] of `dtype`
    Source:
        Zhang & Sennrich 2019, eq. 4; official model.py, RMSNorm
    """
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight)).to(dtype)
