"""RMS norm and matrix products by torch_npu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.linear import linear as linear_op
from v4sdk.ops.norm import rms_norm as rms_norm_op
from v4sdk.quant import split_last
from v4sdk.weights import Weight

from . import Calls

# dtype codes of torch_npu, which torch has no name for
FLOAT8_E8M0 = 293
FLOAT4_E2M1 = 296
# two E8M0 scales of 32 values lie beside each other
MX_PAIR = 64


def rms_norm(to: Calls, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As the op. Operands of different dtypes meet in float32, so the result is rounded once."""
    if not x.numel():
        return rms_norm_op(x, weight, eps, dtype)
    wanted = dtype if x.dtype == weight.dtype == dtype else torch.float32
    y: Tensor = to("npu.npu_rms_norm", x.to(wanted).contiguous(), weight.to(wanted), eps)[0]
    return y.to(dtype)


def linear(to: Calls, x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype) -> Tensor:
    """As the op, by the matrix's encoding.

    int8: inputs become int8 with one scale per token, the product is int32 and comes back as BF16. FP8 with scales of 32
    (`layout.mx_scales`): inputs become MXFP8, unless the numerics ask for the reference's own rounding of inputs. BF16: one
    BF16 product. Others: the reference.
    """
    if is_int8(to, weight) and weight.scale is not None:
        codes, scales = to("npu.npu_dynamic_quant", x.to(torch.bfloat16).contiguous())
        y: Tensor = to(
            "npu.npu_quant_matmul", codes, weight.data.transpose(0, 1), weight.scale[:, 0].contiguous(),
            pertoken_scale=scales, output_dtype=torch.bfloat16,
        )  # fmt: skip
        return y.to(dtype)
    if is_mx(to, weight, numerics):
        codes, scales = mx_input(to, x)
        matrix = weight.data.view(torch.float8_e4m3fn).transpose(0, 1)
        y = to(
            "npu.npu_quant_matmul", codes, matrix, paired(weight).transpose(0, 1), pertoken_scale=scales,
            output_dtype=torch.bfloat16, pertoken_scale_dtype=FLOAT8_E8M0, scale_dtype=FLOAT8_E8M0, group_sizes=[1, 1, 32],
        )  # fmt: skip
        return y.to(dtype)
    if weight.encoding == "float" and weight.data.dtype == x.dtype == torch.bfloat16:
        return F.linear(x, weight.data).to(dtype)
    return linear_op(x, weight, numerics, dtype)


def is_int8(to: Calls, weight: Weight) -> bool:
    """Whether a matrix is multiplied as integers on this chip: int8 with one scale per row."""
    return (
        to.family != "950"
        and weight.encoding == "int8"
        and weight.scale is not None
        and weight.scale.shape[-1] == 1
    )


def is_mx(to: Calls, weight: Weight, numerics: Numerics) -> bool:
    """Whether a matrix is multiplied as MX on this chip: power-of-two scales of 32 along rows, and rows of whole pairs."""
    return (
        to.family == "950"
        and weight.encoding in ("fp8", "fp4")
        and weight.block == (1, 32)
        and weight.scale is not None
        and weight.scale.dtype.itemsize == 1
        and weight.in_features % MX_PAIR == 0
        and not numerics.q8_gemm_input
    )


def mx_input(to: Calls, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as FP8 with a power-of-two scale per 32: [T, in], [T, in / 64, 2]."""
    codes, scales = to(
        "npu.npu_dynamic_mx_quant",
        x.to(torch.bfloat16).contiguous(),
        axis=-1,
        dst_type=torch.float8_e4m3fn,
        block_size=32,
    )
    return codes, scales


def paired(weight: Weight) -> Tensor:
    """The E8M0 bytes of a matrix [.., out, in / 32] in pairs: [.., out, in / 64, 2]."""
    assert weight.scale is not None
    return split_last(weight.scale.view(torch.uint8), 2)
