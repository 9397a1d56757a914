"""Rotary positions on the last dims of rows, in place, so that the dims before them are never moved."""

import triton
import triton.language as tl


@triton.jit
def rope_kernel(
    x, table, tokens, token_stride, head_stride, table_stride,
    HEADS: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Rotate dims FIRST .. FIRST + 2 * HALF of x [tokens, HEADS, D] by table [tokens, 2 * HALF] float32, cosines first.

    Program p takes tokens p, p + programs, .. and BH heads at a time; BR >= HALF is a power of two.
    """
    i, pair = tl.arange(0, BR), tl.arange(0, 2)
    dims = FIRST + 2 * i[None, :, None] + pair[None, None, :]
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        cos = tl.load(table + row * table_stride + i, mask=i < HALF, other=0.0)[None, :]
        sin = tl.load(table + row * table_stride + HALF + i, mask=i < HALF, other=0.0)[None, :]
        if INVERSE:
            sin = -sin
        for first in range(0, HEADS, BH):
            h = first + tl.arange(0, BH)
            at = x + row * token_stride + h[:, None, None] * head_stride + dims
            inside = (h < HEADS)[:, None, None] & (i < HALF)[None, :, None] & (pair < 2)[None, None, :]
            # pairs lie side by side: loaded as neighbours and taken apart on the chip. Before they are widened: the 950's
            # compiler (ascendnpu-ir 1.2.0) aborts on the other order; and steps of two in memory, 910's aborts on
            even, odd = tl.split(tl.load(at, mask=inside, other=0.0))
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            real, imaginary = even * cos - odd * sin, even * sin + odd * cos
            turned = tl.join(real.to(x.dtype.element_ty), imaginary.to(x.dtype.element_ty))
            tl.store(at, turned, mask=inside)
