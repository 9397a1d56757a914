"""Experts of any stored encoding: gate and up with what comes between, down, and the sum over a token's experts.

A row of the first product is a pair of a token and one of its choices, numbered token * CHOSEN + choice; for the shared expert,
which every token chooses once, pairs are tokens.
"""

import triton
import triton.language as tl

from .linear import product
from .numbers import arrive, sum_parts
from .weights import column_scale, input_tile, multiply, weight_tile


@triton.jit
def members(tile, ids, experts, slots, P, BM: tl.constexpr, MEMBERS: tl.constexpr):
    """The expert (int64) and the pairs [BM] of a tile; -1 for none.

    Args:
        MEMBERS: `all`: tiles of one expert's P pairs; `pair`: tile number t is pair number t alone; `bucket`: as `bucket_kernel`
            has laid them out in `experts` and `slots`.
    """
    lane = tl.arange(0, BM)
    if MEMBERS == "all":
        pair = tile * BM + lane
        return tl.cast(0, tl.int64), tl.where(pair < P, pair, -1)
    elif MEMBERS == "pair":
        return tl.load(ids + tile).to(tl.int64), tl.where(lane == 0, tile, -1)
    else:
        return tl.load(experts + tile).to(tl.int64), tl.load(slots + tile * BM + lane)


@triton.jit
def gated(g, v, limit, BETWEEN: tl.constexpr):
    """silu(min(g, limit)) * clamp(v, -limit, limit), in float32."""
    if BETWEEN:
        g, v = g.to(tl.bfloat16).to(tl.float32), v.to(tl.bfloat16).to(tl.float32)
    g = tl.minimum(g, limit)
    return g / (1.0 + tl.exp(-g)) * tl.minimum(tl.maximum(v, -limit), limit)


@triton.jit
def store_gated(g, v, a, at, inside, pair, weights, limit, BETWEEN: tl.constexpr, WEIGHTED: tl.constexpr):
    """Store the gated values g, v [rows, BN] at `at`, multiplied by the routing weight of each row's pair."""
    value = gated(g, v, limit, BETWEEN)
    if WEIGHTED:
        value *= tl.load(weights + pair, mask=pair >= 0, other=0.0)[:, None]
    tl.store(a + at, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def finish_gated(
    g, v, pair, n, a, parts, counter, part, weights, P, I, limit,
    SPLIT: tl.constexpr, BETWEEN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Turn sums g, v [rows, BN] of one part of the depth into a [P, I]; with SPLIT > 1 whoever comes last adds the parts.

    Shapes:
        pair [rows], n [BN], parts [SPLIT, 2, P, I] float32
    """
    inside = (pair >= 0)[:, None] & (n < I)[None, :]
    at = pair[:, None].to(tl.int64) * I + n[None, :]
    if SPLIT == 1:
        store_gated(g, v, a, at, inside, pair, weights, limit, BETWEEN, WEIGHTED)
    else:
        size = tl.cast(P, tl.int64) * I
        tl.store(parts + 2 * part * size + at, g, mask=inside)
        tl.store(parts + (2 * part + 1) * size + at, v, mask=inside)
        if arrive(counter, SPLIT):
            g = sum_parts(parts, at, 2 * size, inside, SPLIT)
            v = sum_parts(parts + size, at, 2 * size, inside, SPLIT)
            store_gated(g, v, a, at, inside, pair, weights, limit, BETWEEN, WEIGHTED)


@triton.jit
def sum_choices(
    parts, ids, token, n, inside, P, N,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """The outputs of some tokens' experts, in float32, added in ascending expert id, equal ids by place.

    Shapes:
        parts [SPLIT, P, N] float32, ids [P], token [BT], n [BN], inside [BT, BN] -> [BT, BN]
    """
    PLACES: tl.constexpr = triton.next_power_of_2(CHOSEN)
    k = tl.arange(0, PLACES)[None, :]
    known = (k < CHOSEN) & (token * CHOSEN < P)[:, None]
    expert = tl.load(ids + token[:, None] * CHOSEN + k, mask=known, other=0).to(tl.int64)
    # what no place holds comes after all others
    key = tl.where(k < CHOSEN, expert, 1 << 32) * PLACES + k
    place = tl.sum((key[:, None, :] < key[:, :, None]).to(tl.int32), 2)
    total = tl.zeros(inside.shape, tl.float32)
    for p in tl.static_range(CHOSEN):
        pair = token * CHOSEN + tl.sum(tl.where(place == p, k, 0), 1)
        at = pair[:, None].to(tl.int64) * N + n[None, :]
        out = tl.zeros(inside.shape, tl.float32)
        for s in tl.static_range(SPLIT):
            out += tl.load(parts + tl.cast(s, tl.int64) * P * N + at, mask=inside, other=0.0)
        if BETWEEN:
            out = out.to(tl.bfloat16).to(tl.float32)
        total += out
    return total


@triton.jit
def finish_pair(
    out, pair, n, y, parts, counters, ids, part, P, N,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    """Store one pair's output [BN]; whoever comes last for its token and columns adds up y [T, N]. Counters: a row per token."""
    inside = n < N
    tl.store(parts + (tl.cast(part, tl.int64) * P + pair) * N + n, out, mask=inside)
    token = pair // CHOSEN
    if arrive(counters + token * tl.num_programs(1) + tl.program_id(1), CHOSEN * SPLIT):
        only = token + tl.arange(0, 1)
        total = sum_choices(parts, ids, only, n, inside[None, :], P, N, CHOSEN, SPLIT, BETWEEN)
        tl.store(y + only[:, None].to(tl.int64) * N + n[None, :], total, mask=inside[None, :])


@triton.jit
def up_kernel(
    x, row_stride, w1, s1, w3, s3, a, parts, counters, ids, experts, slots, weights, P, I, K, data_step, scale_step, span, limit,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MEMBERS: tl.constexpr,
    ENCODING: tl.constexpr, Q8: tl.constexpr, BETWEEN: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """a [P, I] = silu(x w1^T) * (x w3^T) * weight, clamped; program (tile, n, s) sums columns s * span .. (s + 1) * span.

    Args:
        data_step, scale_step: elements from one expert's matrix and scales to the next one's.
    """
    tile, s = tl.program_id(0), tl.program_id(2)
    expert, pair = members(tile, ids, experts, slots, P, BM, MEMBERS)
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    w1, w3 = w1 + expert * data_step, w3 + expert * data_step
    s1, s3 = s1 + expert * scale_step, s3 + expert * scale_step
    rows, valid = tl.maximum(pair, 0) // CHOSEN, pair >= 0
    first, last = s * span, tl.minimum(K, (s + 1) * span)
    if OPERAND == tl.float32:
        # without tensor cores both products at once would not fit the registers
        g = product(
            x, row_stride, w1, s1, rows, valid, n, I, first, last, K, BM, BN, BK, ENCODING, Q8, OPERAND
        )
        v = product(
            x, row_stride, w3, s3, rows, valid, n, I, first, last, K, BM, BN, BK, ENCODING, Q8, OPERAND
        )
    else:
        g = tl.zeros((BM, BN), tl.float32)
        v = tl.zeros((BM, BN), tl.float32)
        for k0 in range(first, last, BK):
            here = input_tile(x, rows, valid, row_stride, k0, K, BK, Q8)
            gate = weight_tile(w1, s1, n, I, k0, K, ENCODING, BK, OPERAND)
            g = multiply(g, here, gate, column_scale(s1, n, I, k0, K, ENCODING), OPERAND)
            up = weight_tile(w3, s3, n, I, k0, K, ENCODING, BK, OPERAND)
            v = multiply(v, here, up, column_scale(s3, n, I, k0, K, ENCODING), OPERAND)
    counter = counters + tile * tl.num_programs(1) + tl.program_id(1)
    finish_gated(g, v, pair, n, a, parts, counter, s, weights, P, I, limit, SPLIT, BETWEEN, MEMBERS != "all")


@triton.jit
def down_kernel(
    a, w2, s2, y, parts, counters, ids, experts, slots, P, N, I, data_step, scale_step, span, first_column, width,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MEMBERS: tl.constexpr,
    ENCODING: tl.constexpr, Q8: tl.constexpr, BETWEEN: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Outputs of routed experts from a [P, I]: added to y [T, N] (`pair`), or one row per pair, y [P, width] (`bucket`), which
    holds the columns first_column .. first_column + width.
    """
    tile, s = tl.program_id(0), tl.program_id(2)
    expert, pair = members(tile, ids, experts, slots, P, BM, MEMBERS)
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = product(
        a, I, w2 + expert * data_step, s2 + expert * scale_step, tl.maximum(pair, 0), pair >= 0, first_column + n, N, s * span,
        tl.minimum(I, (s + 1) * span), I, BM, BN, BK, ENCODING, Q8, OPERAND,
    )  # fmt: skip
    if MEMBERS == "pair":
        out = tl.sum(tl.where((pair >= 0)[:, None], acc, 0.0), 0)
        finish_pair(out, tile, n, y, parts, counters, ids, s, P, N, CHOSEN, SPLIT, BETWEEN)
    else:
        at = tl.maximum(pair, 0)[:, None].to(tl.int64) * width + n[None, :]
        tl.store(y + at, acc, mask=(pair >= 0)[:, None] & (n < width)[None, :])


@triton.jit
def shared_down_kernel(
    a, w2, s2, routed, y, parts, counters, T, N, I, span,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr,
    BETWEEN: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y [T, N] = routed [T, N] + a [T, I] w2^T, added in float32; the depth is split as in `up_kernel`."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    s, valid = tl.program_id(2), m < T
    acc = product(
        a, I, w2, s2, m, valid, n, N, s * span, tl.minimum(I, (s + 1) * span), I, BM, BN, BK, ENCODING, Q8, OPERAND,
    )  # fmt: skip
    at = m[:, None].to(tl.int64) * N + n[None, :]
    inside = valid[:, None] & (n < N)[None, :]
    if SPLIT == 1:
        store_sum(acc, routed, y, at, inside, BETWEEN)
    else:
        size = tl.cast(T, tl.int64) * N
        tl.store(parts + s * size + at, acc, mask=inside)
        if arrive(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), SPLIT):
            total = sum_parts(parts, at, size, inside, SPLIT)
            store_sum(total, routed, y, at, inside, BETWEEN)


@triton.jit
def store_sum(out, routed, y, at, inside, BETWEEN: tl.constexpr):
    """Store routed + out at `at`."""
    if BETWEEN:
        out = out.to(tl.bfloat16).to(tl.float32)
    total = tl.load(routed + at, mask=inside, other=0.0) + out
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
