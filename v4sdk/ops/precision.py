"""From a numerics option to tensor dtypes."""

from __future__ import annotations

import torch

from v4sdk.numerics import Numerics


def activation_dtype(numerics: Numerics) -> torch.dtype:
    """Dtype of streams and of sub-layer inputs and outputs."""
    return torch.bfloat16 if numerics.bf16_activations else torch.float32


def between_dtype(numerics: Numerics) -> torch.dtype:
    """Dtype of values handed from one part of a fused op to the next."""
    return torch.bfloat16 if numerics.bf16_between else torch.float32
