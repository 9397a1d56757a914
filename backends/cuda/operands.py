"""Weights and numerics as arguments of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4sdk.errors import ShapeError
from v4sdk.numerics import Numerics
from v4sdk.weights import INTEGERS, Weight

from .target import Target

# FP8 GEMM inputs are rounded in groups of this many columns, which is also the width of an FP8 weight's tile
GROUP = 128


def dense(x: Tensor) -> Tensor:
    """The same values as kernels read them: rows may lie apart, the elements of one may not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def data_of(weight: Weight, target: Target) -> Tensor:
    """The stored values as a kernel's pointer: FP8 as bytes on chips without that type.

    Raises:
        ShapeError: if the encoding is none that kernels read; the table declines such models before.
    """
    if weight.encoding in INTEGERS:
        raise ShapeError(f"no kernel reads a matrix of {weight.encoding}, expected float, fp8 or fp4")
    if weight.encoding == "fp8":
        return weight.data.view(torch.float8_e4m3fn if target.has_fp8 else torch.uint8)
    if weight.encoding == "fp4":
        return weight.data.view(torch.uint8)
    return weight.data


def scale_of(weight: Weight) -> Tensor:
    """The scales as a kernel's pointer, UE8M0 as bytes; a float weight gives its data, which is never read as scales."""
    if weight.scale is None:
        return weight.data
    return weight.scale if weight.scale.dtype == torch.float32 else weight.scale.view(torch.uint8)


def operand_type(x: Tensor, *weights: Weight) -> Any:
    """The dtype that products multiply in: BF16 wherever that loses nothing of the stored weight, else float32.

    Inputs rounded to FP8, FP8 and FP4 values and BF16 are all exact in BF16; float32 activations of `exact` numerics and float32
    weights are not.
    """
    import triton.language as tl

    narrow = x.dtype == torch.bfloat16 and all(
        w.encoding != "float" or w.data.dtype == torch.bfloat16 for w in weights
    )
    return tl.bfloat16 if narrow else tl.float32


def rounds_input(weight: Weight, numerics: Numerics) -> bool:
    """Whether the input of this product is rounded to FP8 first."""
    return numerics.q8_gemm_input and weight.quantised


def triton_type(dtype: torch.dtype) -> Any:
    """The Triton name of a float dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: Triton's blocks have no other sizes."""
    return 1 << max(0, n - 1).bit_length()
