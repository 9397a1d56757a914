"""Number formats of the checkpoint and the caches: FP8 E4M3, FP4 E2M1, UE8M0 scales, and the roundings built on them.

Every rounding passes its gradient straight through, so training sees the same values that inference does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from v4sdk.errors import ShapeError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# the reference multiplies by these float32 constants instead of dividing; as numbers of the host, which no device waits for
_INV_E4M3_MAX = torch.tensor(1.0 / 448.0).item()
_INV_E2M1_MAX = torch.tensor(1.0 / 6.0).item()
_MIN_AMAX_Q8 = 1e-4
# 0.5 in float32
_HALF_BITS = 126 << 23
_MIN_AMAX_Q4 = 6.0 * 2.0**-126


def ue8m0_ceil(x: Tensor) -> Tensor:
    """Give the UE8M0 byte of the smallest power of two that is at least `x`, from the bit pattern.

    Shapes:
        x [...] float32, positive and normal -> [...] uint8; the value is 2**(byte - 127)
    Source:
        official kernel.py; a floating log2 mis-rounds near powers of two
    """
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    return (exponent + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)


def ue8m0_value(byte: Tensor) -> Tensor:
    """Decode UE8M0 bytes: 2**(byte - 127) in float32; byte 0 is the subnormal 2**-127, byte 255 is NaN."""
    wide = byte.to(torch.int32)
    bits = torch.where(wide == 0, 0x00400000, wide << 23)
    return torch.where(wide == 255, 0x7FC00000, bits).view(torch.float32)


def e4m3_round(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 value, ties to even, without the dtype.

    Shapes:
        x [...] float32 within [-448, 448] -> [...] float32
    """
    # 3 bits after the first, and steps of 2**-9 under the smallest normal value
    return _round_to(x, 3, -6)


def e2m1_round(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even code, by arithmetic.

    Shapes:
        x [...] float32 within [-6, 6] -> [...] float32
    """
    return _round_to(x, 1, 0)


def _round_to(x: Tensor, mantissa_bits: int, least_exponent: int) -> Tensor:
    exponent = ((x.contiguous().view(torch.int32) >> 23) & 0xFF).clamp_min(127 + least_exponent)
    step = ((exponent - mantissa_bits) << 23).view(torch.float32)
    return (x / step).round() * step


def e2m1_encode(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 code, ties to the even code.

    Shapes:
        x [...] float32 within [-6, 6] -> [...] uint8 codes 0..15, bit 3 the sign
    """
    a = x.abs()
    # boundaries between neighbours; ">" leaves the tie to the lower code, ">=" gives it to the upper
    code = (a > 0.25).to(torch.uint8)
    code += a >= 0.75
    code += a > 1.25
    code += a >= 1.75
    code += a > 2.5
    code += a >= 3.5
    code += a > 5.0
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_decode(code: Tensor) -> Tensor:
    """Decode E2M1 codes 0..15 to float32."""
    # from bits rather than by a table, which would have to be brought to the device first
    wide = code.to(torch.int32)
    magnitude = wide & 7
    normal = (((magnitude >> 1) + 126) << 23) + ((magnitude & 1) << 22)
    value = torch.where(magnitude < 2, magnitude * _HALF_BITS, normal).view(torch.float32)
    return torch.where(wide > 7, -value, value)


def fp4_pack(code: Tensor) -> Tensor:
    """Pack codes [..., 2k] into bytes [..., k] int8, even columns in the low nibble."""
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def fp4_unpack(packed: Tensor) -> Tensor:
    """Unpack bytes [..., k] into float32 values [..., 2k], low nibble first."""
    return _unpack(packed, e2m1_decode(torch.arange(16, device=packed.device)))


def int4_pack(code: Tensor) -> Tensor:
    """Pack int8 numbers [..., 2k] of -8 to 7 into bytes [..., k] int8, even columns in the low nibble, two's complement."""
    return fp4_pack((code & 15).view(torch.uint8))


def int4_unpack(packed: Tensor) -> Tensor:
    """Undo `int4_pack`: float32 values [..., 2k]."""
    nibble = torch.arange(16, device=packed.device)
    return _unpack(packed, (nibble - 16 * (nibble > 7)).float())


def _unpack(packed: Tensor, values: Tensor) -> Tensor:
    """Bytes [..., k] to the values [16] float32 of their nibbles: [..., 2k], low nibble first."""
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    # a pair of values travels as one 8-byte element: four times faster than decoding nibbles one by one
    index = packed.view(torch.uint8).flatten().to(torch.int32)
    chosen = torch.index_select(pairs.view(torch.float64).flatten(), 0, index)
    return chosen.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


class _StraightThrough(torch.autograd.Function):
    """Give `rounded` forward and pass the gradient to `x` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Any, None]:
        return grad[0], None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    if x.requires_grad:
        return _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call,no-any-return]
    return rounded


def _groups(x: Tensor, block: int) -> Tensor:
    # a last group shorter than `block` is padded with zeros, which never change its maximum
    pad = -x.shape[-1] % block
    return split_last(torch.nn.functional.pad(x, (0, pad)), block)


def split_last(x: Tensor, inner: int) -> Tensor:
    """View the last dimension as groups: [..., n] -> [..., n / inner, inner]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // inner, inner)


def q8_encode(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise activations to FP8 with one power-of-two scale per group.

    a = max(amax, 1e-4); s = 2**ceil(log2(a * (1/448))); q = e4m3(clamp(x / s, -448, 448)), ties to even.

    Shapes:
        x [..., n] float -> q [..., n] float8_e4m3fn, scale [..., ceil(n / block)] uint8 (UE8M0)
    Source:
        `Q8` of the architecture note; official kernel.py, act_quant
    """
    g = _groups(x.float(), block)
    amax = g.abs().amax(-1).clamp_min(_MIN_AMAX_Q8)
    byte = ue8m0_ceil(amax * _INV_E4M3_MAX)
    q = (g / ue8m0_value(byte)[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    # flatten by bytes: float8 has no padding-free slice kernels on some devices
    flat = q.view(torch.uint8).flatten(-2)[..., : x.shape[-1]].contiguous()
    return flat.view(torch.float8_e4m3fn), byte


def q8_decode(q: Tensor, scale: Tensor, block: int) -> Tensor:
    """Undo `q8_encode` exactly: float32 [..., n]."""
    g = _groups(q.to(torch.float32), block)
    return (g * ue8m0_value(scale)[..., None]).flatten(-2)[..., : q.shape[-1]]


def q8_round(x: Tensor, block: int) -> Tensor:
    """Round to the FP8 grid of `q8_encode` and come back, in the dtype of `x`. Gradient passes straight through.

    By float32 arithmetic: not every device has the dtype that `q8_encode` stores.
    """
    with torch.no_grad():
        g = _groups(x.detach().float(), block)
        amax = g.abs().amax(-1).clamp_min(_MIN_AMAX_Q8)
        byte = ue8m0_ceil(amax * _INV_E4M3_MAX)
        scale = ue8m0_value(byte)[..., None]
        q = e4m3_round((g / scale).clamp(-E4M3_MAX, E4M3_MAX))
        rounded = (q * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return _straight_through(x, rounded)


def q4_encode(x: Tensor, block: int = 32) -> tuple[Tensor, Tensor]:
    """Quantise to FP4 with one power-of-two scale per group of 32.

    a = max(amax, 6 * 2**-126); s = 2**ceil(log2(a * (1/6))); q = e2m1(clamp(x / s, -6, 6)), ties to even.

    Shapes:
        x [..., n] float, n a multiple of `block` -> codes [..., n] uint8, scale [..., n / block] uint8 (UE8M0)
    Source:
        `Q4` of the architecture note
    """
    g, byte = _fp4_groups(x, block)
    code = e2m1_encode((g / ue8m0_value(byte)[..., None]).clamp(-E2M1_MAX, E2M1_MAX))
    return code.flatten(-2), byte


def q4_decode(code: Tensor, scale: Tensor, block: int = 32) -> Tensor:
    """Undo `q4_encode` exactly: float32 [..., n]."""
    return (split_last(e2m1_decode(code), block) * ue8m0_value(scale)[..., None]).flatten(-2)


def q4_round(x: Tensor, block: int = 32) -> Tensor:
    """Round to the FP4 grid of `q4_encode` and come back, in the dtype of `x`. Gradient passes straight through."""
    with torch.no_grad():
        g, byte = _fp4_groups(x.detach(), block)
        scale = ue8m0_value(byte)[..., None]
        rounded = (e2m1_round((g / scale).clamp(-E2M1_MAX, E2M1_MAX)) * scale).flatten(-2).to(x.dtype)
    return _straight_through(x, rounded)


def _fp4_groups(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Groups [..., n / block, block] float32, and their scales [..., n / block] uint8."""
    if x.shape[-1] % block:
        raise ShapeError(
            f"FP4 rounding got a last dimension of {x.shape[-1]}, expected a multiple of {block}"
        )
    g = split_last(x.float(), block)
    return g, ue8m0_ceil(g.abs().amax(-1).clamp_min(_MIN_AMAX_Q4) * _INV_E2M1_MAX)


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dimension by the Sylvester matrix, scaled by n**-0.5, in float32 (float64 for float64 input).

    The natural order matters: FP4 rounding groups 32 consecutive outputs.

    Shapes:
        x [..., n], n a power of two -> [..., n] float32 or float64
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ShapeError(f"Hadamard got a last dimension of {n}, expected a power of two")
    matrix = torch.ones(1, 1, device=x.device)
    while matrix.shape[0] < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    rotation: Tensor = matrix * n**-0.5
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide @ rotation.to(wide.dtype)


def kv_pack(row: Tensor, rope_dim: int) -> Tensor:
    """Pack rounded KV rows into the native layout: FP8 plain part, BF16 rotary part, scales, padding to 8 bytes.

    Rows that lie on the FP8 grid (groups of 64) are stored exactly.

    Shapes:
        row [..., c] float, last `rope_dim` rotary -> [..., bytes] uint8 (584 for c = 512, rope_dim = 64)
    """
    plain = row.shape[-1] - rope_dim
    q, scale = q8_encode(row[..., :plain], 64)
    rope = row[..., plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
    packed = torch.cat((q.view(torch.uint8), rope, scale), -1)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 8))


def kv_unpack(packed: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """Undo `kv_pack`: float32 [..., head_dim]."""
    plain = head_dim - rope_dim
    scale_at = plain + 2 * rope_dim
    q = packed[..., :plain].contiguous().view(torch.float8_e4m3fn)
    rope = packed[..., plain:scale_at].contiguous().view(torch.bfloat16).float()
    scale = packed[..., scale_at : scale_at + math.ceil(plain / 64)]
    return torch.cat((q8_decode(q, scale, 64), rope), -1)


def index_pack(key: Tensor) -> Tensor:
    """Pack rounded index keys [..., e] into FP4 nibbles and scales: [..., e/2 + e/32] uint8."""
    code, scale = q4_encode(key)
    return torch.cat((fp4_pack(code).view(torch.uint8), scale), -1)


def index_unpack(packed: Tensor, index_head_dim: int) -> Tensor:
    """Undo `index_pack`: float32 [..., index_head_dim]."""
    half = index_head_dim // 2
    values = fp4_unpack(packed[..., :half].contiguous())
    scale = ue8m0_value(packed[..., half:])
    return (split_last(values, 32) * scale[..., None]).flatten(-2)
