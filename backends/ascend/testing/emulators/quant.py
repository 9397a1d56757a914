"""Quantised products: `npu_dynamic_quant`, `npu_quant_matmul`, `npu_dynamic_mx_quant` of the torch_npu 2.13.0 wheel.

Types are numbers of the wheel: 1 int8, 3 int32, 5 float16, 6 float32, 15 bfloat16, 24 or 292 float8_e4m3fn, 293 float8_e8m0fnu,
296 float4_e2m1fn_x2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documented import HALF, Refused, emulates, family, int8_rows, refuse, want_dtype, want_shape

TYPES = {
    1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16, 24: torch.float8_e4m3fn,
    292: torch.float8_e4m3fn,
}  # fmt: skip
E8M0 = 293
FP4 = 296
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def typed(number: int | None, default: torch.dtype) -> torch.dtype:
    """The dtype of a number of the wheel."""
    refuse(number is not None and number not in TYPES, f"dtype number {number} is not emulated")
    return default if number is None else TYPES[number]


@emulates("npu", "npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,  # noqa: A002 - the schema's word
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """scale = rowmax(|x|) / max of the target, y = x / scale rounded; int8 everywhere, FP8 on 950 alone.

    Shapes:
        input [.., n] float16 or bfloat16 -> [.., n], [..] float32
    """
    want_dtype("input", input, *HALF)
    refuse(input.dim() < 2, "input has one dim, documented are more")
    refuse(smooth_scales is not None or group_index is not None, "smoothing is not emulated")
    refuse(
        quant_mode != "pertoken" or dst_type_max != 0.0,
        "pertoken without another maximum is what is emulated",
    )
    target = typed(dst_type, torch.int8)
    x = input.float()
    if target == torch.int8:
        return int8_rows(x)
    refuse(
        target != torch.float8_e4m3fn or family() != "950",
        f"dst_type {target} is not supported on {family()}",
    )
    scale = x.abs().amax(-1) / 448.0
    return (x / torch.where(scale == 0, 1, scale)[..., None]).to(target), scale


@emulates("npu", "npu_quant_matmul")
def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, offset: Tensor | None = None, pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None, output_dtype: int | None = None, x1_dtype: int | None = None, x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None, scale_dtype: int | None = None, group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(x1 @ x2) in int32, times the scale of the column and of the row; on 950 also MX blocks of 32.

    Shapes:
        x1 [m, k] int8, x2 [k, n] int8, scale [n] float32 or bfloat16, pertoken_scale [m] float32 -> [m, n]
    """
    refuse(any(t is not None for t in (offset, bias, y_scale)), "offset, bias and y_scale are not emulated")
    target = typed(output_dtype, torch.int8)
    if E8M0 in (scale_dtype, pertoken_scale_dtype):
        refuse(family() != "950", f"MX scales are for 950, not for {family()}")
        refuse((scale_dtype, pertoken_scale_dtype) != (E8M0, E8M0), "both scales of an MX product are E8M0")
        refuse(group_sizes not in (None, [1, 1, 32]), f"group_sizes is {group_sizes}, MX has 1, 1, 32")
        return _mx_matmul(x1, x2, scale, pertoken_scale, x1_dtype, x2_dtype, target)
    want_dtype("x1", x1, torch.int8)
    want_dtype("x2", x2, torch.int8)
    refuse(
        x1.dim() != 2 or x2.dim() != 2 or x1.shape[1] != x2.shape[0],
        f"x1 {list(x1.shape)} times x2 {list(x2.shape)}",
    )
    # the last dims in memory may not be longer
    refuse(max(x1.shape[1], x2.shape[1]) > 65535, "a last dim is longer than 65535")
    refuse(0 in x1.shape or 0 in x2.shape, "empty tensors are not supported")
    want_dtype("scale", scale, torch.float32, torch.bfloat16)
    refuse(
        scale.shape not in ((1,), (x2.shape[1],)), f"scale is {list(scale.shape)} for {x2.shape[1]} columns"
    )
    if pertoken_scale is not None:
        want_dtype("pertoken_scale", pertoken_scale, torch.float32)
        want_shape("pertoken_scale", pertoken_scale, x1.shape[0])
    listed = {
        (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16),
    }  # fmt: skip
    refuse(
        (scale.dtype, target) not in listed, f"scale {scale.dtype} with output {target} is not in the table"
    )
    # sums of int8 products over k <= 65535 stay below 2**31; float64 holds them exactly
    y = (x1.double() @ x2.double()).float() * scale.float()
    return (y if pertoken_scale is None else y * pertoken_scale[:, None]).to(target)


def mx_scales(x: Tensor) -> Tensor:
    """Paired E8M0 bytes [.., k/64, 2] as float32 [.., k/32]."""
    want_dtype("MX scale", x, torch.uint8)
    refuse(x.shape[-1] != 2, f"an MX scale has a last dim of {x.shape[-1]}, documented is 2")
    return torch.exp2(x.flatten(-2).float() - 127)


def mx_values(x: Tensor, number: int | None) -> Tensor:
    """FP8 as float32, or FP4 pairs unpacked along the last dim, the first in the low nibble."""
    if number == FP4:
        want_dtype("FP4 pairs", x, torch.uint8)
        table = torch.tensor((*_E2M1, *(-v for v in _E2M1)))
        return torch.stack((table[(x & 15).long()], table[(x >> 4).long()]), -1).flatten(-2)
    want_dtype("MX values", x, torch.float8_e4m3fn)
    return x.float()


def _mx_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, pertoken_scale: Tensor | None, x1_dtype: int | None, x2_dtype: int | None,
    target: torch.dtype,
) -> Tensor:  # fmt: skip
    """x1 [m, k] with E8M0 bytes [m, k/64, 2]; x2 [k, n] with [k/64, n, 2], both as transposed views of [n, ..]."""
    if pertoken_scale is None:
        raise Refused("MX needs pertoken_scale")
    refuse(x2.stride(0) != 1 or scale.stride(0) != 2, "x2 and its scale must be transposed views of [n, ..]")
    a, b = mx_values(x1, x1_dtype), mx_values(x2.T.contiguous(), x2_dtype)
    (m, k), n = a.shape, b.shape[0]
    refuse(b.shape[1] != k or k % 64 != 0, f"x1 {list(a.shape)} times x2 {[b.shape[1], n]}, k in pairs of 32")
    want_shape("pertoken_scale", pertoken_scale, m, k // 64, 2)
    want_shape("scale", scale, k // 64, n, 2)
    a = a * mx_scales(pertoken_scale).repeat_interleave(32, -1)
    b = b * mx_scales(scale.transpose(0, 1)).repeat_interleave(32, -1)
    refuse(target not in (torch.bfloat16, torch.float16, torch.float32), f"MX output {target}")
    return (a @ b.T).to(target)


def _e2m1(x: Tensor) -> Tensor:
    """Codes of the nearest of the eight magnitudes, ties to the even code; sign in bit 3."""
    table = torch.tensor(_E2M1)
    away = (x.abs().clamp_max(6.0)[..., None] - table).abs()
    low = away.min(-1)
    # of two equally near neighbours the even code wins
    other = torch.where(away == low.values[..., None], torch.arange(8), 8)
    first = other.amin(-1)
    second = torch.where(other == first[..., None], 8, other).amin(-1)
    code = torch.where((second < 8) & (first % 2 == 1), second, first)
    return (code | (torch.signbit(x).long() << 3)).to(torch.uint8)


@emulates("npu", "npu_dynamic_mx_quant", chips=("950",))
def npu_dynamic_mx_quant(
    input: Tensor,  # noqa: A002 - the schema's word
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = FP4,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Blocks of 32 with a power-of-two scale: 2**(floor(log2(max)) - emax), emax 8 for FP8 E4M3 and 2 for FP4 E2M1.

    scale_alg 1 (FP8 alone) takes the smallest power of two that is at least max / 448.

    Shapes:
        input [.., k] -> FP8 [.., k] or FP4 pairs uint8 [.., k/2]; scales uint8 [.., ceil(k/64), 2]
    """
    want_dtype("input", input, *HALF, torch.float32)
    refuse(
        axis not in (-1, input.dim() - 1) or block_size != 32,
        "blocks of 32 along the last dim are what is emulated",
    )
    refuse(
        round_mode != "rint" or dst_type_max != 0.0 or max_low_bound != 0.0,
        "rint without bounds is what is emulated",
    )
    fp4 = dst_type == FP4
    refuse(
        not fp4 and typed(dst_type, torch.int8) != torch.float8_e4m3fn, f"dst_type {dst_type} is not emulated"
    )
    refuse(scale_alg not in ((0,) if fp4 else (0, 1)), f"scale_alg {scale_alg} is not emulated for this type")
    k = input.shape[-1]
    refuse(fp4 and k % 2 != 0, f"the last dim is {k}, FP4 needs an even one")
    padded = torch.nn.functional.pad(input.float(), (0, -k % 64))
    x = padded.reshape(*padded.shape[:-1], -1, 32)
    top = x.abs().amax(-1)
    if scale_alg == 1:
        exponent = torch.ceil(torch.log2(torch.where(top == 0, 1, top) / 448.0))
    else:
        # frexp gives a mantissa in [0.5, 1), so the floor of log2 is its exponent less one; exact, unlike log2
        exponent = (torch.frexp(torch.where(top == 0, 1, top)).exponent - 1).float() - (2 if fp4 else 8)
    exponent = torch.where(top == 0, -127.0, exponent.clamp(-127, 127))
    scaled = x / torch.exp2(exponent)[..., None]
    scales = (exponent + 127).to(torch.uint8).reshape(*input.shape[:-1], -1, 2)
    if fp4:
        codes = _e2m1(scaled).flatten(-2)[..., :k]
        return codes[..., 0::2] | (codes[..., 1::2] << 4), scales
    values = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)[..., :k]
    return values.contiguous().view(torch.float8_e4m3fn), scales
