"""Both ends of the network: token rows into streams, and hidden rows into logits."""

from __future__ import annotations

from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops import cost, inputs
from v4sdk.ops.linear import matmul
from v4sdk.ops.op import ROUNDING, op
from v4sdk.ops.precision import activation_dtype, wide
from v4sdk.weights import Weight


@op(inputs=inputs.cases(inputs.embed), tolerances=ROUNDING, cost=cost.embed)
def embed(token_ids: Tensor, weight: Tensor, hc_mult: int, numerics: Numerics) -> Tensor:
    """Look up token rows and copy each into all streams. There is no embedding scale.

    Shapes:
        token_ids [T] int64, weight [V, N] -> [T, M, N] in the activation dtype
    """
    h = weight[token_ids].to(activation_dtype(numerics))
    return h[:, None].expand(-1, hc_mult, -1).contiguous()


@op(inputs=inputs.cases(inputs.logits), tolerances=ROUNDING, cost=cost.logits)
def logits(h: Tensor, head: Weight) -> Tensor:
    """Score every vocabulary entry: float32(h) @ float32(head).T.

    Shapes:
        h [T, N], head [V, N] -> [T, V] float32
    Source:
        official model.py, ParallelHead
    """
    return matmul(wide(h), head)
