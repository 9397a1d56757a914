"""RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.norm import rms_norm_kernel
from .launch import Launch, deliver, result
from .operands import power_of_two


class Norm:
    """Kernels of `rms_norm`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.rms_norm`."""
        y = result(out, tuple(x.shape), dtype, x.device)
        width = x.shape[-1]
        block = power_of_two(width)
        self._launch(
            rms_norm_kernel, (x.numel() // max(1, width),), x.contiguous(), weight, y, width, eps, BLOCK=block,
            warps=min(8, max(1, block // 512)), stages=1,
        )  # fmt: skip
        return deliver(out, y)
