"""FP4 experts with BF16 inputs, where reading the weights is nearly all the work.

A word of int32 holds 8 values. Shifting and masking a whole word brings values j and j + 4 to the right places in two BF16, with
E2M1's three bits across exponent and mantissa: each is then the stored value times 2**-126, zero and the subnormal 0.5 included.
So a pair costs four integer instructions, and no value is converted alone. Plane j of a row are its columns j, j + 4, j + 8, ..

Inputs are multiplied by 2**64 beforehand, which keeps the products within float32; what is left of both factors comes back with
the scales. Inputs are exact in BF16 up to 2**63, scales from 2**-60 to 2**64.
"""

import triton
import triton.language as tl

from .moe import finish_gated, finish_pair, members
from .numbers import e8m0_value, q8_rows


@triton.jit
def planes(words):
    """Planes 0..3 of words of 8 values, each two BF16 in an int32."""
    a = ((words << 6) & 0x01C001C0) | ((words << 12) & -0x7FFF8000)
    b = ((words << 2) & 0x01C001C0) | ((words << 8) & -0x7FFF8000)
    c = ((words >> 2) & 0x01C001C0) | ((words << 4) & -0x7FFF8000)
    d = ((words >> 6) & 0x01C001C0) | (words & -0x7FFF8000)
    return a, b, c, d


@triton.jit
def halves(bits):
    """int32 [R, C] as BF16 [R, 2 * C], the lower half first; moves nothing."""
    pairs = tl.join(bits.to(tl.int16), (bits >> 16).to(tl.int16))
    return tl.reshape(pairs, (bits.shape[0], 2 * bits.shape[1])).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_columns(data, rows, first, width, COUNT: tl.constexpr):
    """data[rows, first : first + COUNT] of a matrix [.., width]; zero outside."""
    column = first + tl.arange(0, COUNT)
    return tl.load(
        data + rows[:, None].to(tl.int64) * width + column[None, :], mask=(column < width)[None, :], other=0
    )


# one row: a decode step


@triton.jit
def load_row(x, k0, K, BK: tl.constexpr):
    """x[k0 : k0 + BK]; zero outside."""
    k = k0 + tl.arange(0, BK)
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def prepared(x, Q8: tl.constexpr):
    """Inputs [groups, 128] as the products want them: rounded to FP8 where `Q8`, BF16, times 2**64."""
    x = x.to(tl.float32)
    if Q8:
        x = q8_rows(x)
    return (x * 18446744073709551616.0).to(tl.bfloat16)


@triton.jit
def row_planes(row, BK: tl.constexpr, Q8: tl.constexpr):
    """One row [BK] as the right side of four products [BK / 4, BK / 32]: every group of 32 has a column of its own, so that each
    sum can be multiplied by the group's scale afterwards. Tensor cores take eight columns for the price of one.
    """
    x = prepared(tl.reshape(row, (BK // 128, 128)), Q8)
    even, odd = tl.split(tl.reshape(x, (BK // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    own = (tl.arange(0, BK // 4) // 8)[:, None] == tl.arange(0, BK // 32)[None, :]
    zero = tl.zeros((BK // 4, BK // 32), tl.bfloat16)
    a, b = tl.where(own, a[:, None], zero), tl.where(own, b[:, None], zero)
    return a, b, tl.where(own, c[:, None], zero), tl.where(own, d[:, None], zero)


@triton.jit
def row_product(words, scale, xa, xb, xc, xd):
    """Sums over each group of 32 columns, [BN, BK / 32] float32, times 2**-62; words [BN, BK / 8], scale [BN, BK / 32] bytes."""
    a, b, c, d = planes(words)
    part = tl.dot(halves(a), xa)
    part = tl.dot(halves(b), xb, part)
    part = tl.dot(halves(c), xc, part)
    return tl.dot(halves(d), xd, part) * e8m0_value(scale)


@triton.jit
def row_sums(x, w, scales, rows, first, steps, K, W, S, BN: tl.constexpr, BK: tl.constexpr, Q8: tl.constexpr):
    """x [K] times rows [BN] of a matrix, over `steps` times BK columns from step `first` on: [BN] float32.

    Shapes:
        w [.., W] int32 words of 8, scales [.., S] bytes, K = 8 W = 32 S
    """
    G: tl.constexpr = BK // 32
    acc = tl.zeros((BN, G), tl.float32)
    # what the compiler does not fetch ahead by itself
    row = load_row(x, first * BK, K, BK)
    scale = load_columns(scales, rows, first * G, S, G)
    for step in range(first, tl.minimum(tl.cdiv(K, BK), first + steps)):
        xa, xb, xc, xd = row_planes(row, BK, Q8)
        now = scale
        row = load_row(x, (step + 1) * BK, K, BK)
        scale = load_columns(scales, rows, (step + 1) * G, S, G)
        acc += row_product(load_columns(w, rows, step * (BK // 8), W, BK // 8), now, xa, xb, xc, xd)
    return tl.sum(acc, 1) * 4611686018427387904.0


@triton.jit
def packed_up_kernel(
    x, row_stride, w1, s1, w3, s3, a, parts, counters, ids, weights, P, I, K, W, S, steps, limit,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, Q8: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """As `moe.up_kernel` for single pairs: program (pair, n, s) sums `steps` times BK columns from s * steps * BK on.

    Shapes:
        w1, w3 [E, I, W] int32 words of 8, s1, s3 [E, I, S] bytes, K = 8 W = 32 S
    """
    pair, s = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    matrix = tl.load(ids + pair).to(tl.int64) * I
    # rows past the end read the last one and are not stored
    rows = matrix + tl.minimum(n, I - 1)
    x += (pair // CHOSEN).to(tl.int64) * row_stride
    G: tl.constexpr = BK // 32
    g = tl.zeros((BN, G), tl.float32)
    v = tl.zeros((BN, G), tl.float32)
    first = s * steps
    # what the compiler does not fetch ahead by itself
    row = load_row(x, first * BK, K, BK)
    f1, f3 = load_columns(s1, rows, first * G, S, G), load_columns(s3, rows, first * G, S, G)
    for step in range(first, tl.minimum(tl.cdiv(K, BK), first + steps)):
        xa, xb, xc, xd = row_planes(row, BK, Q8)
        now1, now3 = f1, f3
        row = load_row(x, (step + 1) * BK, K, BK)
        f1, f3 = load_columns(s1, rows, (step + 1) * G, S, G), load_columns(s3, rows, (step + 1) * G, S, G)
        g += row_product(load_columns(w1, rows, step * (BK // 8), W, BK // 8), now1, xa, xb, xc, xd)
        v += row_product(load_columns(w3, rows, step * (BK // 8), W, BK // 8), now3, xa, xb, xc, xd)
    g = tl.sum(g, 1)[None, :] * 4611686018427387904.0
    v = tl.sum(v, 1)[None, :] * 4611686018427387904.0
    counter = counters + pair * tl.num_programs(1) + tl.program_id(1)
    finish_gated(
        g, v, pair + tl.arange(0, 1), n, a, parts, counter, s, weights, P, I, limit, SPLIT, BETWEEN, True
    )


@triton.jit
def packed_down_kernel(
    a, w2, s2, y, parts, counters, ids, P, N, I, W, S, steps,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, Q8: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """As `moe.down_kernel` for single pairs; depth as in `packed_up_kernel`. w2 [E, N, W], s2 [E, N, S], a [P, I] BF16."""
    pair, s = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.load(ids + pair).to(tl.int64) * N + tl.minimum(n, N - 1)
    out = row_sums(a + pair.to(tl.int64) * I, w2, s2, rows, s * steps, steps, I, W, S, BN, BK, Q8)
    finish_pair(out, pair, n, y, parts, counters, ids, s, P, N, CHOSEN, SPLIT, BETWEEN)


# many rows: a prompt


@triton.jit
def spread_kernel(x, row_stride, y, R, K, width, ROWS: tl.constexpr, BK: tl.constexpr, Q8: tl.constexpr):
    """x [R, K] to y [R, width], prepared: of every BK columns first plane 0, then 1, 2, 3.

    Program (r, step) takes ROWS rows and BK columns; width is a multiple of BK.
    """
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    k = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    row = tl.load(x + r.to(tl.int64) * row_stride + k, mask=(r < R) & (k < K), other=0.0)
    row = prepared(tl.reshape(row, (ROWS * BK // 128, 128)), Q8)
    row = tl.permute(tl.reshape(row, (ROWS, BK // 4, 4)), (0, 2, 1))
    tl.store(y + r.to(tl.int64) * width + k, tl.reshape(row, (ROWS, BK)), mask=r < R)


@triton.jit
def load_plane(x, rows, width, step, S, PLANE: tl.constexpr, BK: tl.constexpr):
    """One plane of BK columns of spread rows, [BK / 4, BM]."""
    q = tl.arange(0, BK // 4)
    inside = step * (BK // 32) + q // 8 < S
    at = rows[None, :].to(tl.int64) * width + step * BK + PLANE * (BK // 4) + q[:, None]
    return tl.load(x + at, mask=inside[:, None], other=0.0)


@triton.jit
def plane_scale(scale, BK: tl.constexpr):
    """Bytes [BN, BK / 32] as BF16 [BN, BK / 4], each 2**62 times the scale."""
    # Triton 3.6 takes the smaller of int16 and a number as int32
    bits = (tl.minimum(scale.to(tl.int16) + 62, 254) << 7).to(tl.int16)
    wide = tl.broadcast_to(bits[:, :, None], (scale.shape[0], BK // 32, 8))
    return tl.reshape(wide, (scale.shape[0], BK // 4)).to(tl.bfloat16, bitcast=True)


@triton.jit
def tile_product(acc, words, scale, xa, xb, xc, xd, BK: tl.constexpr):
    """acc [BN, BM] + the product of weights with four planes of inputs [BK / 4, BM]."""
    a, b, c, d = planes(words)
    factor = plane_scale(scale, BK)
    acc = tl.dot(halves(a) * factor, xa, acc)
    acc = tl.dot(halves(b) * factor, xb, acc)
    acc = tl.dot(halves(c) * factor, xc, acc)
    return tl.dot(halves(d) * factor, xd, acc)


@triton.jit
def tile_sums(x, inputs, spread, w, scales, rows, W, S, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Spread rows `inputs` [BM] of x times rows [BN] of a matrix: [BN, BM] float32."""
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(tl.cdiv(W, BK // 8)):
        xa = load_plane(x, inputs, spread, step, S, 0, BK)
        xb = load_plane(x, inputs, spread, step, S, 1, BK)
        xc = load_plane(x, inputs, spread, step, S, 2, BK)
        xd = load_plane(x, inputs, spread, step, S, 3, BK)
        scale = load_columns(scales, rows, step * (BK // 32), S, BK // 32)
        words = load_columns(w, rows, step * (BK // 8), W, BK // 8)
        acc = tile_product(acc, words, scale, xa, xb, xc, xd, BK)
    return acc


@triton.jit
def packed_tile_up_kernel(
    x, width, w1, s1, w3, s3, a, experts, slots, weights, P, I, W, S, limit,
    CHOSEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """As `moe.up_kernel` for buckets; x is spread."""
    expert, pair = members(tl.program_id(0), experts, experts, slots, P, BM, "bucket")
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = expert * I + tl.minimum(n, I - 1)
    tokens = tl.maximum(pair, 0) // CHOSEN
    g = tl.zeros((BN, BM), tl.float32)
    v = tl.zeros((BN, BM), tl.float32)
    for step in range(tl.cdiv(W, BK // 8)):
        xa = load_plane(x, tokens, width, step, S, 0, BK)
        xb = load_plane(x, tokens, width, step, S, 1, BK)
        xc = load_plane(x, tokens, width, step, S, 2, BK)
        xd = load_plane(x, tokens, width, step, S, 3, BK)
        f1, f3 = (
            load_columns(s1, rows, step * (BK // 32), S, BK // 32),
            load_columns(s3, rows, step * (BK // 32), S, BK // 32),
        )
        g = tile_product(g, load_columns(w1, rows, step * (BK // 8), W, BK // 8), f1, xa, xb, xc, xd, BK)
        v = tile_product(v, load_columns(w3, rows, step * (BK // 8), W, BK // 8), f3, xa, xb, xc, xd, BK)
    g, v = tl.trans(g), tl.trans(v)
    finish_gated(g, v, pair, n, a, a, a, 0, weights, P, I, limit, 1, BETWEEN, True)


@triton.jit
def packed_tile_down_kernel(
    x, spread, w2, s2, y, experts, slots, P, N, W, S, first_column, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `moe.down_kernel` for buckets; x [P, spread] is spread."""
    expert, pair = members(tl.program_id(0), experts, experts, slots, P, BM, "bucket")
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = expert * N + tl.minimum(first_column + n, N - 1)
    inputs = tl.maximum(pair, 0)
    acc = tile_sums(x, inputs, spread, w2, s2, rows, W, S, BM, BN, BK)
    at = inputs[None, :].to(tl.int64) * width + n[:, None]
    tl.store(y + at, acc, mask=(pair >= 0)[None, :] & (n < width)[:, None])
