"""How a float matrix becomes the bytes of a checkpoint: FP8 tiles, FP4 rows, and integers with a scale per row.

A scale of FP8 or FP4 is the smallest power of two under which the largest magnitude fits, so values that already lie on the
grid come back unchanged. Scales of integers are float32 numbers short enough that integer times scale is exact in float32.
Packing what was unpacked changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4sdk.errors import ShapeError
from v4sdk.quant import (
    E2M1_MAX,
    E4M3_MAX,
    e2m1_decode,
    e2m1_encode,
    fp4_pack,
    int4_pack,
    ue8m0_ceil,
    ue8m0_value,
)

# the dtypes of a checkpoint file, by the names its headers use
TORCH_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
}

FP4_GROUP = 32
INT8_MAX = 127
# symmetric: -8 is not used
INT4_MAX = 7
# a scale of 24 - 7 bits or less times an integer of 7 bits fits float32; the rest of the mantissa is cut off, upward
_CUT_BITS = 0xFF
# a tile of zeros has no magnitude to fit; its scale is 1
_ZERO_BYTE = 127
_SMALLEST_NORMAL = 2.0**-126


def pack_fp8(weight: Tensor, tile: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """Store a matrix as FP8 E4M3 with one scale per tile; tiles at the edges may be partial.

    Shapes:
        weight [o, i] float -> data [o, i] float8_e4m3fn, scale [ceil(o / b0), ceil(i / b1)] float8_e8m0fnu
    Source:
        architecture note 3.2
    """
    rows, cols = _matrix_shape(weight)
    tiles = _tiles(weight.detach().float(), tile)
    byte = _scale_bytes(tiles.abs().amax((1, 3)), E4M3_MAX)
    scaled = tiles / ue8m0_value(byte)[:, None, :, None]
    flat = scaled.flatten(2, 3).flatten(0, 1)[:rows, :cols]
    data = flat.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).contiguous()
    return data, byte.view(torch.float8_e8m0fnu)


def pack_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store a matrix as packed FP4 E2M1 with one scale per 32 columns of a row.

    Shapes:
        weight [o, i] float, i a multiple of 32 -> data [o, i / 2] int8, scale [o, i / 32] float8_e8m0fnu
    Raises:
        ShapeError: if i is not a multiple of 32.
    Source:
        architecture note 3.2: even column in the low nibble
    """
    code, byte = _fp4_codes(weight)
    return fp4_pack(code.flatten(-2)), byte.view(torch.float8_e8m0fnu)


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store a matrix as int8 with one scale per row: round(w / scale), ties to even, within -127..127.

    The scale is the row's largest magnitude / 127, rounded up to 16 bits; where every value of the row is a whole multiple
    of a power of two, and at most 127 of them (often so of FP4 rows), it is that power, and the row keeps its values. Else
    values move by at most half a scale, and by the rounding of the float32 quotient (2**-16 of a scale).

    Shapes:
        weight [o, i] float -> data [o, i] int8, scale [o, 1] float32
    """
    code, scale = _integer_codes(weight, INT8_MAX, 0)
    return code.flatten(-2), scale


def pack_int4(weight: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Store a matrix as packed int4 of -7..7, with one scale per row or per `group` columns of it; else as `pack_int8`.

    Shapes:
        weight [o, i] float, i even and a multiple of `group` -> data [o, i / 2] int8, scale [o, 1 or i / group] float32
    Raises:
        ShapeError: if i is not such a multiple.
    """
    code, scale = _integer_codes(weight, INT4_MAX, group)
    return int4_pack(code.flatten(-2)), scale


def round_fp8(weight: Tensor, tile: tuple[int, int] = (128, 128)) -> Tensor:
    """Give the values `pack_fp8` stores, in the dtype of `weight`; the gradient passes straight through."""
    with torch.no_grad():
        rows, cols = _matrix_shape(weight)
        tiles = _tiles(weight.detach().float(), tile)
        scale = ue8m0_value(_scale_bytes(tiles.abs().amax((1, 3)), E4M3_MAX))[:, None, :, None]
        code = (tiles / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        rounded = (code * scale).flatten(2, 3).flatten(0, 1)[:rows, :cols].to(weight.dtype)
    return _pass_through(weight, rounded)


def round_fp4(weight: Tensor) -> Tensor:
    """Give the values `pack_fp4` stores, in the dtype of `weight`; the gradient passes straight through."""
    with torch.no_grad():
        code, byte = _fp4_codes(weight)
        rounded = (e2m1_decode(code) * ue8m0_value(byte)[..., None]).flatten(-2).to(weight.dtype)
    return _pass_through(weight, rounded)


def round_int8(weight: Tensor) -> Tensor:
    """Give the values `pack_int8` stores, in the dtype of `weight`; the gradient passes straight through."""
    return _round_integers(weight, INT8_MAX, 0)


def round_int4(weight: Tensor, group: int = 0) -> Tensor:
    """Give the values `pack_int4` stores, in the dtype of `weight`; the gradient passes straight through."""
    return _round_integers(weight, INT4_MAX, group)


def _round_integers(weight: Tensor, largest: int, group: int) -> Tensor:
    with torch.no_grad():
        code, scale = _integer_codes(weight, largest, group)
        rounded = (code * scale[..., None]).flatten(-2).to(weight.dtype)
    return _pass_through(weight, rounded)


def _integer_codes(weight: Tensor, largest: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [o, groups, columns] int8 and scales [o, groups] float32."""
    rows, cols = _matrix_shape(weight)
    if largest == INT4_MAX and cols % (group or 2):
        raise ShapeError(f"int4 packing got {cols} columns, expected a multiple of {group or 2}")
    values = weight.detach().float().reshape(rows, -1, group or max(1, cols))
    # an empty row has no magnitude
    amax = values.abs().amax(-1) if cols else values.new_zeros(rows, 1)
    even = ue8m0_value(_scale_bytes(amax, largest))
    quotient = values / even[..., None]
    fits = (quotient == quotient.round()).all(-1)
    if not bool(fits.all()):
        scale = torch.where(fits, even, _short_scale(amax, largest))
        quotient = values / scale[..., None]
    else:
        scale = even
    return quotient.round_().clamp_(-largest, largest).to(torch.int8), scale


def _short_scale(amax: Tensor, largest: int) -> Tensor:
    bits = (amax / largest).clamp_min(_SMALLEST_NORMAL).contiguous().view(torch.int32)
    return torch.where(amax == 0, 1.0, ((bits + _CUT_BITS) & ~_CUT_BITS).view(torch.float32))


def _fp4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    _, cols = _matrix_shape(weight)
    if cols % FP4_GROUP:
        raise ShapeError(f"FP4 packing got {cols} columns, expected a multiple of {FP4_GROUP}")
    groups = weight.detach().float().reshape(weight.shape[0], -1, FP4_GROUP)
    byte = _scale_bytes(groups.abs().amax(-1), E2M1_MAX)
    return e2m1_encode((groups / ue8m0_value(byte)[..., None]).clamp(-E2M1_MAX, E2M1_MAX)), byte


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ShapeError(f"packing got {weight.dtype} {list(weight.shape)}, expected a float matrix")
    return weight.shape[0], weight.shape[1]


def _tiles(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    b0, b1 = tile
    # zeros at the edges never change a tile's maximum
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % b1, 0, -weight.shape[0] % b0))
    return padded.reshape(padded.shape[0] // b0, b0, padded.shape[1] // b1, b1)


def _scale_bytes(amax: Tensor, largest: float) -> Tensor:
    # division, not a product with the rounded reciprocal: grid values must find their own scale again
    byte = ue8m0_ceil((amax / largest).clamp_min(_SMALLEST_NORMAL))
    return torch.where(amax == 0, _ZERO_BYTE, byte).to(torch.uint8)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Any, None]:
        return grad[0], None


def _pass_through(weight: Tensor, rounded: Tensor) -> Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(weight, rounded)  # type: ignore[no-untyped-call,no-any-return]
    return rounded
