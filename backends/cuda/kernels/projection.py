"""Projections around attention: queries, the key-value latent, the grouped output.

A norm needs whole rows, and a product's programs make a few columns each. So they leave their sums in float32, and the one that
comes last finishes the rows, in the same launch.
"""

import triton
import triton.language as tl

from .linear import product
from .numbers import arrive, q8_rows, sum_parts
from .rows import load_kv, q8_plain, rotate_pairs, store_kv, table_angles
from .weights import column_scale, input_tile, multiply, weight_tile


@triton.jit
def narrowed(x, BF16: tl.constexpr):
    """float32 values, on the BF16 grid where asked for."""
    if BF16:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def leave_part(
    x, row_stride, data, scale, parts, counters, T, N, K, span,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (m, n, s) stores its sum over columns s * span .. (s + 1) * span of x [T, K] @ weight [N, K].T.

    Shapes:
        parts [splits, T, N] float32 -> whether this program is the last one of its block of rows
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(2)
    valid = m < T
    acc = product(
        x, row_stride, data, scale, m, valid, n, N, s * span, tl.minimum(K, (s + 1) * span), K, BM, BN, BK,
        ENCODING, Q8, OPERAND,
    )  # fmt: skip
    at = s.to(tl.int64) * T * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(parts + at, acc, mask=valid[:, None] & (n < N)[None, :])
    return arrive(counters + tl.program_id(0), tl.num_programs(1) * tl.num_programs(2))


@triton.jit
def summed_rows(parts, rows, valid, n, T, N, SPLIT: tl.constexpr):
    """Sums over the splits of parts [SPLIT, T, N], always in the same order; zero outside."""
    at = rows[:, None].to(tl.int64) * N + n[None, :]
    return sum_parts(parts, at, tl.cast(T, tl.int64) * N, valid[:, None] & (n < N)[None, :], SPLIT)


@triton.jit
def rms_rows(value, gain, n, N, eps):
    """RMS normalisation of rows [rows, columns] float32 that are zero beyond column N."""
    factor = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
    return value * factor[:, None] * tl.load(gain + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def query_latent_kernel(
    x, row_stride, data, scale, gain, qr, rounded, parts, counters, T, N, K, span, eps,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr,
    ENCODING: tl.constexpr, Q8: tl.constexpr, OPERAND: tl.constexpr, BETWEEN: tl.constexpr, Q8_NEXT: tl.constexpr,
):  # fmt: skip
    """qr [T, N] = RMSNorm(x [T, K] @ weight [N, K].T), and the same rounded to FP8 for the next product (`Q8_NEXT`).

    NB, at least 128, covers a row; ROWS are finished at a time. BETWEEN: the product is rounded to BF16.
    """
    last = leave_part(
        x, row_stride, data, scale, parts, counters, T, N, K, span, BM, BN, BK, ENCODING, Q8, OPERAND
    )
    if last:
        n = tl.arange(0, NB)
        begin = tl.program_id(0) * BM
        for first in range(begin, tl.minimum(T, begin + BM), ROWS):
            rows = first + tl.arange(0, ROWS)
            valid = rows < T
            value = narrowed(summed_rows(parts, rows, valid, n, T, N, SPLIT), BETWEEN)
            value = rms_rows(value, gain, n, N, eps).to(qr.dtype.element_ty)
            at = rows[:, None].to(tl.int64) * N + n[None, :]
            inside = valid[:, None] & (n < N)[None, :]
            tl.store(qr + at, value, mask=inside)
            if Q8_NEXT:
                groups = tl.reshape(value.to(tl.float32), (ROWS * NB // 128, 128))
                value = tl.reshape(q8_rows(groups), (ROWS, NB))
                tl.store(rounded + at, value.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def head_norm(value, D, eps, NARROW: tl.constexpr):
    """Normalise heads [rows, columns] float32 that are zero beyond column D; NARROW: every operation rounds to BF16."""
    if NARROW:
        value = narrowed(value, True)
        mean = narrowed(tl.sum(narrowed(value * value, True), 1) / D, True)
        factor = narrowed(tl.rsqrt(narrowed(mean + eps, True)), True)
        return narrowed(value * factor[:, None], True)
    else:
        return value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]


@triton.jit
def heads_kernel(
    x, data, scale, table, q, sums, counters, T, N, K, D, R, eps, per_head,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, DB: tl.constexpr, ENCODING: tl.constexpr,
    OPERAND: tl.constexpr, BETWEEN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """q [T, N] = RoPE(head norm(x [T, K] @ weight [N, K].T)) in heads of D columns, R of them rotary.

    Program (i, m) makes tile i % per_head of head i // per_head for a block of rows; the last one of a head and a block turns
    sums [T, N] float32 into queries.
    """
    head = tl.program_id(0) // per_head
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tl.program_id(0) % per_head * BN + tl.arange(0, BN)
    n = head * D + column
    valid = m < T
    # x comes rounded already
    acc = product(x, K, data, scale, m, valid, n, N, 0, K, K, BM, BN, BK, ENCODING, False, OPERAND)
    tl.store(
        sums + m[:, None].to(tl.int64) * N + n[None, :],
        acc,
        mask=valid[:, None] & (column < D)[None, :],
    )
    group = tl.program_id(1) * (tl.num_programs(0) // per_head) + head
    if arrive(counters + group, per_head):
        d = tl.arange(0, DB)
        begin = tl.program_id(1) * BM
        for first in range(begin, tl.minimum(T, begin + BM), ROWS):
            rows = first + tl.arange(0, ROWS)
            seen = rows < T
            at = rows[:, None].to(tl.int64) * N + head * D + d[None, :]
            inside = seen[:, None] & (d < D)[None, :]
            value = narrowed(tl.load(sums + at, mask=inside, other=0.0), BETWEEN)
            value = narrowed(head_norm(value, D, eps, NARROW), BETWEEN)
            cos, sin = table_angles(table, rows, seen, D, R, DB)
            value = narrowed(rotate_pairs(value, cos, sin, False, DB), BETWEEN)
            tl.store(q + at, value.to(q.dtype.element_ty), mask=inside)


@triton.jit
def history_kernel(
    window, window16, slots, y, total, W, row_size, D, R,
    ROWS: tl.constexpr, DB: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """y [total, D]: the rings of all sequences, slot after slot, decoded."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = rows < total
    d = tl.arange(0, DB)
    at = tl.load(slots + rows // W, mask=seen, other=0).to(tl.int64) * W + rows % W
    value = load_kv(window, window16, at, seen, d, row_size, D, R, NATIVE)
    tl.store(
        y + rows[:, None].to(tl.int64) * D + d[None, :],
        value.to(y.dtype.element_ty),
        mask=seen[:, None] & (d < D)[None, :],
    )


@triton.jit
def kv_kernel(
    x, row_stride, data, scale, gain, table, y, window, window16, slots, positions, seq_ids, cu_seqlens, parts, counters,
    T, D, K, span, R, W, row_size, eps,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, DB: tl.constexpr,
    ENCODING: tl.constexpr, Q8: tl.constexpr, OPERAND: tl.constexpr, BETWEEN: tl.constexpr, Q8_KV: tl.constexpr,
    NATIVE: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """y [T, D] = Q8(RoPE(RMSNorm(x [T, K] @ weight [D, K].T))), and the last W rows of every sequence into its ring.

    On a prompt the rings must have been read before this starts. DB covers a row; ROWS are finished at a time.
    """
    last = leave_part(
        x, row_stride, data, scale, parts, counters, T, D, K, span, BM, BN, BK, ENCODING, Q8, OPERAND
    )
    if last:
        short: tl.constexpr = y.dtype.element_ty == tl.bfloat16
        d = tl.arange(0, DB)
        begin = tl.program_id(0) * BM
        for first in range(begin, tl.minimum(T, begin + BM), ROWS):
            rows = first + tl.arange(0, ROWS)
            valid = rows < T
            value = narrowed(summed_rows(parts, rows, valid, d, T, D, SPLIT), BETWEEN)
            value = narrowed(rms_rows(value, gain, d, D, eps), short)
            cos, sin = table_angles(table, rows, valid, D, R, DB)
            value = narrowed(rotate_pairs(value, cos, sin, False, DB), short)
            if Q8_KV:
                value, _, _ = q8_plain(value, d, D - R, DB)
            tl.store(
                y + rows[:, None].to(tl.int64) * D + d[None, :],
                value.to(y.dtype.element_ty),
                mask=valid[:, None] & (d < D)[None, :],
            )
            if DECODE:
                sequence = rows
                keep = valid
            else:
                sequence = tl.load(seq_ids + rows, mask=valid, other=0)
                # an older row would land on the slot of a newer one
                keep = valid & (tl.load(cu_seqlens + sequence + 1, mask=valid, other=0) - rows <= W)
            position = tl.load(positions + rows, mask=valid, other=0)
            at = tl.load(slots + sequence, mask=valid, other=0).to(tl.int64) * W + position % W
            store_kv(window, window16, at, keep, value, d, row_size, D, R, NATIVE, DB)


@triton.jit
def turned_back(tile, table, rows, valid, k0, D, R, BK: tl.constexpr):
    """Rotate columns k0 .. k0 + BK of rows of heads, each D long, by minus the angles of their rows."""
    pair = ((k0 + 2 * tl.arange(0, BK // 2)) % D - (D - R)) // 2
    at = table + rows[:, None].to(tl.int64) * R + pair[None, :]
    turns = valid[:, None] & (pair >= 0)[None, :]
    cos, sin = tl.load(at, mask=turns, other=1.0), tl.load(at + R // 2, mask=turns, other=0.0)
    return rotate_pairs(tile, cos, sin, True, BK)


@triton.jit
def groups_kernel(
    o, data, scale, table, z, T, L, N, K, D, R,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """z [T, N] in groups of L columns: group g is RoPE^-1(o)[:, g * K : (g + 1) * K] @ weight[g * L : (g + 1) * L].T.

    Args:
        o: [T, N / L * K], heads of D columns of which the last R are rotary. K: a multiple of D.
    """
    per_group = (L + BN - 1) // BN
    group = tl.program_id(1) // per_group
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) % per_group * BN + tl.arange(0, BN)
    n = group * L + column
    valid = m < T
    row_stride = N // L * K
    short: tl.constexpr = o.dtype.element_ty == tl.bfloat16
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        tile = input_tile(o + group * K, m, valid, row_stride, k0, K, BK, False)
        # most tiles hold no rotary column
        if k0 % D + BK > D - R:
            tile = narrowed(turned_back(tile, table, m, valid, k0, D, R, BK), short)
        w = weight_tile(data, scale, n, N, k0, K, ENCODING, BK, OPERAND)
        acc = multiply(acc, tile, w, column_scale(scale, n, N, k0, K, ENCODING), OPERAND)
    tl.store(
        z + m[:, None].to(tl.int64) * N + n[None, :],
        acc.to(z.dtype.element_ty),
        mask=valid[:, None] & (column < L)[None, :],
    )
