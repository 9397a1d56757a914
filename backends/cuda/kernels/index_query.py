"""Index queries and the weights of their heads: two products side by side."""

import triton
import triton.language as tl

from .linear import product
from .numbers import arrive, sum_parts
from .rows import hadamard_rows, q4_groups, rotate_pairs, table_angles


@triton.jit
def head_weights(
    x, row_stride, data, scale, w, parts, counters, m, valid, tile, s, T, HEADS, N, span, factor,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr,
    OPERAND: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """Part s of x @ weight.T for one tile of heads; whoever comes last scales the sum."""
    n = tile * BN + tl.arange(0, BN)
    value = product(
        x, row_stride, data, scale, m, valid, n, HEADS, s * span, tl.minimum(N, (s + 1) * span), N, BM, BN, BK, ENCODING, Q8,
        OPERAND,
    )  # fmt: skip
    at = m[:, None].to(tl.int64) * HEADS + n[None, :]
    inside = valid[:, None] & (n < HEADS)[None, :]
    last = True
    if SPLIT > 1:
        size = tl.cast(T, tl.int64) * HEADS
        tl.store(parts + s * size + at, value, mask=inside)
        last = arrive(counters + tile, SPLIT)
        if last:
            value = sum_parts(parts, at, size, inside, SPLIT)
    if last:
        tl.store(w + at, (value.to(BETWEEN).to(tl.float32) * factor).to(BETWEEN), mask=inside)


@triton.jit
def head_query(
    qr, row_stride, data, scale, table, q, parts, counters, m, valid, head, s, T, HEADS, E, R, K, span,
    SPLIT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EB: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr,
    OPERAND: tl.constexpr, BETWEEN: tl.constexpr, ACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Part s of one head's query; whoever comes last rotates and rounds the sum."""
    d = tl.arange(0, EB)
    n = head * E + d
    value = product(
        qr, row_stride, data, scale, m, valid, n, HEADS * E, s * span, tl.minimum(K, (s + 1) * span), K, BM, EB, BK, ENCODING,
        Q8, OPERAND,
    )  # fmt: skip
    at = m[:, None].to(tl.int64) * (HEADS * E) + n[None, :]
    inside = valid[:, None] & (d < E)[None, :]
    last = True
    if SPLIT > 1:
        size = tl.cast(T, tl.int64) * (HEADS * E)
        tl.store(parts + s * size + at, value, mask=inside)
        last = arrive(counters + head, SPLIT)
        if last:
            value = sum_parts(parts, at, size, inside, SPLIT)
    if last:
        cos, sin = table_angles(table, m, valid, E, R, EB)
        value = rotate_pairs(value.to(BETWEEN).to(tl.float32), cos, sin, False, EB)
        value = value.to(BETWEEN).to(ACT).to(tl.float32)
        if ROUNDS:
            value, _, _ = q4_groups(hadamard_rows(value, E, EB).to(ACT).to(tl.float32), EB)
        tl.store(q + at, value.to(ACT), mask=inside)


@triton.jit
def index_query_kernel(
    x, x_stride, qr, qr_stride, wq_b, wq_b_scale, proj, proj_scale, table, q, w, q_parts, w_parts, counters,
    T, HEADS, E, R, K, q_span, N, w_span, factor,
    Q_SPLIT: tl.constexpr, W_SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EB: tl.constexpr,
    QB: tl.constexpr, PROJ: tl.constexpr, Q8_Q: tl.constexpr, Q8_W: tl.constexpr, Q_OPERAND: tl.constexpr,
    W_OPERAND: tl.constexpr, BETWEEN: tl.constexpr, ACT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """q [T, HEADS, E] in ACT and w [T, HEADS] in BETWEEN. Programs (m, i): those of w by tile and part, then of q by head and
    part; parts are [SPLIT, T, width] float32.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = m < T
    i = tl.program_id(1)
    w_tiles = (HEADS + BN - 1) // BN
    counter = counters + tl.program_id(0) * (w_tiles + (HEADS if Q_SPLIT > 1 else 0))
    if i < w_tiles * W_SPLIT:
        head_weights(
            x, x_stride, proj, proj_scale, w, w_parts, counter, m, valid, i // W_SPLIT, i % W_SPLIT, T, HEADS, N, w_span, factor,
            W_SPLIT, BM, BN, BK, PROJ, Q8_W, W_OPERAND, BETWEEN,
        )  # fmt: skip
    else:
        i -= w_tiles * W_SPLIT
        head_query(
            qr, qr_stride, wq_b, wq_b_scale, table, q, q_parts, counter + w_tiles, m, valid, i // Q_SPLIT, i % Q_SPLIT, T, HEADS,
            E, R, K, q_span, Q_SPLIT, BM, BK, EB, QB, Q8_Q, Q_OPERAND, BETWEEN, ACT, ROUNDS,
        )  # fmt: skip
