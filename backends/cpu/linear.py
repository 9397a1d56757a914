"""The matrix product by stored weight encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.weights import Weight

from .arguments import Matrix, Rows, deliver, int32, int64, matrix, result, rows, structure
from .kernels import Library

LinearCall = structure(
    "LinearCall", ("weight", Matrix), ("x y", Rows), ("tokens", int64), ("q8_input unused", int32)
)


class Linear:
    """Products with stored matrices."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def linear(
        self, x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.linear`."""
        y = result(out, (x.shape[0], weight.out_features), dtype)
        rounded = numerics.q8_gemm_input and weight.quantised
        call = LinearCall(matrix(weight), rows(x), rows(y), x.shape[0], rounded, 0)
        self._library.run("linear", call, x, weight, y)
        return deliver(out, y)

    def logits(self, h: Tensor, head: Weight, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.logits`."""
        y = result(out, (h.shape[0], head.out_features), torch.float32)
        call = LinearCall(matrix(head), rows(h), rows(y), h.shape[0], 0, 0)
        self._library.run("linear", call, h, head, y)
        return deliver(out, y)
