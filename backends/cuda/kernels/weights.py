"""Tiles of stored weights as operands of a matrix product."""

import triton
import triton.language as tl

from .numbers import e2m1_value, e4m3_value, e8m0_value, q8_rows, scale_value


@triton.jit
def input_tile(x, rows, valid, row_stride, k0, K, BK: tl.constexpr, Q8: tl.constexpr):
    """Load x[rows, k0 : k0 + BK] as float32, rounded to FP8 as one group where `Q8` (BK is then the group, 128).

    Shapes:
        rows, valid [BM] -> [BM, BK]; zero outside
    """
    k = k0 + tl.arange(0, BK)
    at = x + rows[:, None].to(tl.int64) * row_stride + k[None, :]
    tile = tl.load(at, mask=valid[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    if Q8:
        tile = q8_rows(tile)
    return tile


@triton.jit
def weight_tile(data, scale, n, N, k0, K, ENCODING: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr):
    """Load weight[n, k0 : k0 + BK] transposed, as an operand of `tl.dot`.

    FP8 comes without its scale (see `column_scale`): the product of one K tile is scaled as a whole, which no rounding of
    the operand can disturb. FP4 comes scaled: a power of two times E2M1 is exact in BF16.

    Args:
        n: [BN] rows of the weight. K: columns after unpacking, a multiple of 2 for FP4. ENCODING: `float`, `fp8` or `fp4`.
        BK: 128, the width of a scale's tile, or less for `float`. OPERAND: dtype of the result.

    Shapes:
        data [N, K] (packed FP4: [N, K / 2]), contiguous -> [BK, BN]; zero outside
    """
    rows = n[None, :].to(tl.int64)
    inside = (n < N)[None, :]
    if ENCODING == "fp4":
        half = tl.arange(0, BK // 2)
        columns = k0 // 2 + half
        byte = tl.load(
            data + rows * (K // 2) + columns[:, None], mask=inside & (columns < K // 2)[:, None], other=0
        )
        byte = byte.to(tl.int32) & 255
        groups = k0 // 32 + half // 16
        factor = tl.load(
            scale + rows * (K // 32) + groups[:, None], mask=inside & (columns < K // 2)[:, None], other=127
        )
        factor = e8m0_value(factor)
        even = e2m1_value(byte & 15) * factor
        odd = e2m1_value(byte >> 4) * factor
        # columns alternate: [BK / 2, BN, 2] -> [BK / 2, 2, BN] -> [BK, BN]
        pairs = tl.permute(tl.join(even, odd), (0, 2, 1))
        return tl.reshape(pairs, (BK, byte.shape[1])).to(OPERAND)
    k = k0 + tl.arange(0, BK)
    stored = tl.load(data + rows * K + k[:, None], mask=inside & (k < K)[:, None], other=0.0)
    if ENCODING == "fp8":
        return e4m3_value(stored).to(OPERAND)
    return stored.to(OPERAND)


@triton.jit
def column_scale(scale, n, N, k0, K, ENCODING: tl.constexpr):
    """The factor [BN] float32 of a K tile's product: FP8 weights have one scale per 128 x 128 tile, others none."""
    if ENCODING == "fp8":
        tiles = (K + 127) // 128
        return scale_value(tl.load(scale + (n // 128) * tiles + k0 // 128, mask=n < N, other=0))
    return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def multiply(acc, x, w, factor, OPERAND: tl.constexpr):
    """acc + (x @ w) * factor: one K tile, accumulated in float32.

    The sum over K leaves the tensor core after every tile; a chip that accumulates FP8 or BF16 with fewer bits inside a long
    chain would be off otherwise.
    """
    if OPERAND == tl.float32:
        part = tl.dot(x, w, input_precision="ieee")
    else:
        part = tl.dot(x.to(OPERAND), w)
    return acc + part * factor[None, :]
