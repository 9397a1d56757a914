"""The matrix product by stored weight encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import cost, inputs
from v4sdk.ops.op import ROUNDING, op
from v4sdk.ops.precision import wide
from v4sdk.quant import q8_round
from v4sdk.weights import Weight

_Q8_GEMM_BLOCK = 128


def gemm_input(x: Tensor, weight: Weight, numerics: Numerics) -> Tensor:
    """The float32 operand a quantised GEMM sees: rounded to FP8 in groups of 128 where the numerics say so."""
    x = wide(x)
    return q8_round(x, _Q8_GEMM_BLOCK) if numerics.q8_gemm_input and weight.quantised else x


def matmul(x: Tensor, weight: Weight, first: int = 0, last: int | None = None) -> Tensor:
    """x @ weight[first:last].T in the precision of `x`, de-quantising at most 64 MB of weight at a time.

    Shapes:
        x [T, in] float32 (or float64), weight [out, in] -> [T, out] like x
    """
    blocks = list(weight.row_blocks(first, last))
    parts = [x @ weight.dequantize(i, j).to(x.dtype).T for i, j in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@op(inputs=inputs.cases(inputs.linear), tolerances=ROUNDING, cost=cost.linear)
def linear(x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype) -> Tensor:
    """Multiply by a weight as stored: y = x @ weight.T, accumulated in float32, rounded once to `dtype`.

    With `numerics.q8_gemm_input`, the input of an FP8 or FP4 weight is first rounded to FP8 in groups of 128 with
    power-of-two scales. De-quantised tiles are exact in float32, so scaling K slabs before or after the product agrees
    up to the order of accumulation.

    Shapes:
        x [T, in], weight [out, in] -> [T, out] of `dtype`. No bias exists in V4.
    Source:
        official model.py, linear; kernel.py, fp8_gemm and fp4_gemm
    """
    return matmul(gemm_input(x, weight, numerics), weight).to(dtype)
