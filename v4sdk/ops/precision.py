"""From a numerics option to tensor dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics


def activation_dtype(numerics: Numerics) -> torch.dtype:
    """Dtype of streams and of sub-layer inputs and outputs."""
    return torch.bfloat16 if numerics.bf16_activations else _arithmetic(numerics)


def between_dtype(numerics: Numerics) -> torch.dtype:
    """Dtype of values handed from one part of a fused op to the next."""
    return torch.bfloat16 if numerics.bf16_between else _arithmetic(numerics)


def wide(x: Tensor) -> Tensor:
    """The operand of float32 arithmetic; float64 stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


def _arithmetic(numerics: Numerics) -> torch.dtype:
    return torch.float64 if numerics.float64 else torch.float32
