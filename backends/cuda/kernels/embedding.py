"""Token rows into streams, and rotary tables."""

import triton
import triton.language as tl


# the same code for one token and for many
@triton.jit(do_not_specialize=["T"])
def embed_kernel(ids, weight, weight_stride, y, T, N, M: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr):
    """y [T, M, N] = row ids[t] of weight [V, N], M times; program (t, b) copies columns b * BLOCK .. of BT tokens."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + rows, mask=rows < T, other=0).to(tl.int64)
    inside = (rows < T)[:, None] & (n < N)[None, :]
    row = tl.load(weight + token[:, None] * weight_stride + n[None, :], mask=inside, other=0.0)
    row = row.to(tl.float32).to(y.dtype.element_ty)
    for m in tl.static_range(M):
        tl.store(y + (rows * M + m)[:, None] * N + n[None, :], row, mask=inside)


@triton.jit
def reduced(angle):
    """An angle from 0 to 2**21 as (rest, quarter): rest + quarter * pi / 2 up to whole turns, |rest| < 0.8, within 1e-7.

    The chip's own sine does no more than multiply a large angle by 1 / (2 pi), which loses it. Here pi / 2 is a sum of
    constants of at most 13 bits, and the number of quarters one of numbers of at most 11 bits, so that products and all sums
    but the last are exact: fused or not, the result is the same.
    """
    # 2048 quarters at a time, then one at a time
    coarse = tl.floor(angle * 3.1084950e-4 + 0.5) * 2048.0
    left = angle - coarse * 1.57080078125
    near = left - coarse * -4.4544551e-6
    fine = tl.floor(near * 0.63661977 + 0.5)
    left = left - fine * 1.57080078125
    left = left - coarse * -4.4405460357666016e-06
    left = left - fine * -4.4405460357666016e-06
    tail = coarse * -1.3907992979511619e-08 + fine * -1.3907992979511619e-08
    tail += (coarse + fine) * -1.0746346554971943e-12
    return left - tail, fine.to(tl.int32) & 3


@triton.jit
def cosine_and_sine(angle):
    """Both of float32 angles from 0 to 2**21, within 2e-7; polynomials fitted to |rest| < 0.8."""
    r, quarter = reduced(angle)
    z = r * r
    sine = r + r * z * (-1.666665375e-1 + z * (8.332095109e-3 - z * 1.950553997e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664556e-2 + z * (-1.388729084e-3 + z * 2.442864388e-5))
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    # cosine is negative in the second and third quarter, sine in the third and fourth
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    return first, tl.where(quarter >= 2, -second, second)


@triton.jit
def rope_table_kernel(positions, inv, table, T, half, BT: tl.constexpr, BH: tl.constexpr):
    """table [T, 2 * half] float32: cosines, then sines, of positions [T] times inv [half]; BT rows per program."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    i = tl.arange(0, BH)
    position = tl.load(positions + rows, mask=rows < T, other=0).to(tl.float32)
    speed = tl.load(inv + i, mask=i < half, other=0.0)
    # the float32 product: written as a multiply-add, so that no compiler fuses it into the differences that follow
    angle = tl.fma(position[:, None], speed[None, :], 0.0)
    cosine, sine = cosine_and_sine(angle)
    at = rows[:, None].to(tl.int64) * (2 * half) + i[None, :]
    inside = (rows < T)[:, None] & (i < half)[None, :]
    tl.store(table + at, cosine, mask=inside)
    tl.store(table + at + half, sine, mask=inside)
