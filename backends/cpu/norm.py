"""RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Rows, deliver, float32, int32, int64, result, rows, structure
from .kernels import Library

NormCall = structure(
    "NormCall", ("x weight y", Rows), ("tokens width", int64), ("eps", float32), ("unused", int32)
)


class Norm:
    """Row normalisation."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.rms_norm`."""
        flat = x.reshape(-1, x.shape[-1])
        y = result(out, tuple(x.shape), dtype)
        call = NormCall(rows(flat), rows(weight), rows(y.view(flat.shape)), *flat.shape, eps, 0)
        self._library.run("rms_norm", call, flat, weight, y)
        return deliver(out, y)
