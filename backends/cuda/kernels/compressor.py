"""Compressed entries: two products per token, blocks pooled into entries, entries finished and stored."""

import triton
import triton.language as tl

from .embedding import cosine_and_sine
from .numbers import arrive, sum_parts
from .rows import (
    entry_row,
    hadamard_rows,
    q4_groups,
    q8_plain,
    rotate_pairs,
    store_index,
    store_kv,
)
from .weights import column_scale, input_tile, multiply, weight_tile


@triton.jit
def closing(positions, first, T, ratio, CH: tl.constexpr):
    """Which of the rows first .. first + CH complete a block.

    Returns:
        rows [CH] int32, place [CH]: 0, 1, .. for rows that do and -1 for others, and how many do.
    """
    rows = first + tl.arange(0, CH)
    position = tl.load(positions + rows, mask=rows < T, other=0)
    closes = ((rows < T) & ((position + 1) % ratio == 0)).to(tl.int32)
    place = tl.where(closes != 0, tl.cumsum(closes, 0) - 1, -1)
    return rows, place, tl.sum(closes, 0)


@triton.jit
def picked(rows, place, first, count, G: tl.constexpr):
    """The closing rows numbered first .. first + G: [G] int32, and whether there are so many."""
    number = first + tl.arange(0, G)
    tokens = tl.sum(tl.where(place[None, :] == number[:, None], rows[None, :], 0), 1)
    return tokens, number < count


@triton.jit
def pool(
    pair, state, positions, seq_ids, starts, slots, tokens, valid, c, E, W, length, ratio,
    G: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Pool channels c [BN] of the `length` positions that end at each of `tokens` [G]: [G, BN] float32, 0 where not valid.

    A decode step finds all of them in the ring `state`, where its own row already lies; other steps find those of this step in
    `pair` [T, 2, W].
    """
    seq = tl.load(seq_ids + tokens, mask=valid, other=0)
    position = tl.load(positions + tokens, mask=valid, other=0)
    slot = tl.load(slots + seq, mask=valid, other=0).to(tl.int64)
    start = tl.load(starts + seq, mask=valid, other=0)
    top = tl.full((G, BN), float("-inf"), tl.float32)
    total, value = tl.zeros((G, BN), tl.float32), tl.zeros((G, BN), tl.float32)
    for first in range(0, length, P):
        i = first + tl.arange(0, P)
        back = (length - 1 - i)[None, :]
        at = position[:, None] - back
        # positions before the sequence do not exist: block 0 has no predecessor
        seen = valid[:, None] & (i < length)[None, :] & (at >= 0)
        inside = seen[:, :, None] & (c < E)[None, None, :]
        column = c[None, None, :]
        if OVERLAP:
            # the block before joins with the first halves of its channels
            column += tl.where(i >= ratio, E, 0)[None, :, None]
        ring = ((slot[:, None] * length + at % length) * (2 * W))[:, :, None] + column
        if DECODE:
            k = tl.load(state + ring, mask=inside, other=0.0)
            z = tl.load(state + ring + W, mask=inside, other=float("-inf"))
        else:
            row = tokens[:, None] - back
            is_new = (row >= start[:, None])[:, :, None]
            fresh = (row.to(tl.int64) * (2 * W))[:, :, None] + column
            new, old = inside & is_new, inside & ~is_new
            k = tl.load(pair + fresh, mask=new, other=0.0) + tl.load(state + ring, mask=old, other=0.0)
            z_new = tl.load(pair + fresh + W, mask=new, other=float("-inf"))
            z = tl.maximum(z_new, tl.load(state + ring + W, mask=old, other=float("-inf")))
        highest = tl.maximum(top, tl.max(z, 1))
        # nothing seen yet: any finite number will do
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight, kept = tl.exp(z - base[:, None, :]), tl.exp(top - base)
        total = total * kept + tl.sum(weight, 1)
        value = value * kept + tl.sum(weight * k, 1)
        top = highest
    return value / tl.where(total == 0.0, 1.0, total)


@triton.jit
def finish(
    pooled, tokens, valid, positions, seq_ids, table, table_width, norm, inv_freq, entries, entries16, pages, per_page, row_size,
    E, R, ratio, eps,
    EB: tl.constexpr, ACT: tl.constexpr, IS_INDEX: tl.constexpr, ROUNDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate, round and store the entries that `tokens` complete; `pooled` [T, E] in ACT, as are values between."""
    d = tl.arange(0, EB)
    inside = valid[:, None] & (d < E)[None, :]
    value = tl.load(pooled + tokens[:, None].to(tl.int64) * E + d[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    factor = tl.rsqrt(tl.sum(value * value, 1) / E + eps)
    gain = tl.load(norm + d, mask=d < E, other=0.0).to(tl.float32)
    value = (value * factor[:, None] * gain[None, :]).to(ACT).to(tl.float32)
    block = tl.load(positions + tokens, mask=valid, other=0) // ratio
    pair = tl.arange(0, EB // 2) - (E - R) // 2
    inv = tl.load(inv_freq + pair, mask=(pair >= 0) & (pair < R // 2), other=0.0)
    position = (block * ratio).to(tl.float32)[:, None] + tl.zeros((1, EB // 2), tl.float32)
    # as a multiply-add, so that no compiler fuses the float32 product into what follows
    cos, sin = cosine_and_sine(tl.fma(position, inv[None, :] + tl.zeros_like(position), 0.0))
    value = rotate_pairs(value, cos, sin, False, EB).to(ACT).to(tl.float32)
    seq = tl.load(seq_ids + tokens, mask=valid, other=0)
    at = entry_row(table + seq * table_width, tl.where(valid, block, -1), table_width, per_page, pages)
    # a native row is rounded by being stored
    if IS_INDEX:
        if ROUNDS:
            value = hadamard_rows(value, E, EB).to(ACT).to(tl.float32)
            if not NATIVE:
                value, _, _ = q4_groups(value, EB)
        store_index(entries, at, valid, value, d, row_size, E, NATIVE, EB)
    else:
        if ROUNDS and not NATIVE:
            value, _, _ = q8_plain(value, d, E - R, EB)
        store_kv(entries, entries16, at, valid, value, d, row_size, E, R, NATIVE, EB)


@triton.jit
def close_blocks(
    first, c, counter, tiles, pair, state, positions, seq_ids, starts, slots, pooled, table, table_width, norm, inv_freq,
    entries, entries16, pages, per_page, row_size, T, E, R, W, length, ratio, eps,
    CH: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, OVERLAP: tl.constexpr,
    DECODE: tl.constexpr, ACT: tl.constexpr, IS_INDEX: tl.constexpr, ROUNDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Pool channels c of all blocks that rows first .. first + CH complete; the last of `tiles` programs finishes the entries."""
    rows, place, count = closing(positions, first, T, ratio, CH)
    # all programs of these rows see the same count
    if count > 0:
        for number in range(0, count, G):
            tokens, valid = picked(rows, place, number, count, G)
            found = pool(
                pair, state, positions, seq_ids, starts, slots, tokens, valid, c, E, W, length, ratio, G, P, BN, OVERLAP, DECODE
            )  # fmt: skip
            at = pooled + tokens[:, None].to(tl.int64) * E + c[None, :]
            tl.store(at, found.to(ACT), mask=valid[:, None] & (c < E)[None, :])
        if arrive(counter, tiles):
            for number in range(0, count, G):
                tokens, valid = picked(rows, place, number, count, G)
                finish(
                    pooled, tokens, valid, positions, seq_ids, table, table_width, norm, inv_freq, entries, entries16, pages,
                    per_page, row_size, E, R, ratio, eps, EB, ACT, IS_INDEX, ROUNDS, NATIVE,
                )  # fmt: skip


@triton.jit
def pair_kernel(
    x, row_stride, wkv, wkv_scale, wgate, wgate_scale, ape, parts, pair, counters, K, span,
    state, positions, seq_ids, starts, slots, pooled, table, table_width, norm, inv_freq, entries, entries16, pages, per_page,
    row_size, T, E, R, W, length, ratio, eps,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KV: tl.constexpr, GATE: tl.constexpr,
    OPERAND: tl.constexpr, FUSED: tl.constexpr, G: tl.constexpr, P: tl.constexpr, EB: tl.constexpr, OVERLAP: tl.constexpr,
    DECODE: tl.constexpr, ACT: tl.constexpr, IS_INDEX: tl.constexpr, ROUNDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """K = wkv x and z = wgate x + ape of every token, into `pair` [T, 2, W] float32, on a decode step into the ring `state`.

    Program (m, n, s) sums columns s * span .. (s + 1) * span of x; n counts tiles of the first halves, then of the second.
    Whoever comes last adds the parts [SPLIT, T, 2, W]. If FUSED (a decode step of at most BM tokens) the last comers of the
    second halves go on to pool, and the last of those finishes.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = m < T
    tiles = (E + BN - 1) // BN
    half = tl.program_id(1) // tiles
    c = tl.program_id(1) % tiles * BN + tl.arange(0, BN)
    n = half * E + c
    s = tl.program_id(2)
    k, z = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k0 in range(s * span, tl.minimum(K, (s + 1) * span), BK):
        tile = input_tile(x, m, valid, row_stride, k0, K, BK, False)
        w = weight_tile(wkv, wkv_scale, n, W, k0, K, KV, BK, OPERAND)
        k = multiply(k, tile, w, column_scale(wkv_scale, n, W, k0, K, KV), OPERAND)
        w = weight_tile(wgate, wgate_scale, n, W, k0, K, GATE, BK, OPERAND)
        z = multiply(z, tile, w, column_scale(wgate_scale, n, W, k0, K, GATE), OPERAND)
    inside = valid[:, None] & (c < E)[None, :]
    last = True
    if SPLIT > 1:
        at = m[:, None].to(tl.int64) * (2 * W) + n[None, :]
        size = tl.cast(T, tl.int64) * (2 * W)
        tl.store(parts + s * size + at, k, mask=inside)
        tl.store(parts + s * size + at + W, z, mask=inside)
        last = arrive(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), SPLIT)
        if last:
            k = sum_parts(parts, at, size, inside, SPLIT)
            z = sum_parts(parts + W, at, size, inside, SPLIT)
    if last:
        position = tl.load(positions + m, mask=valid, other=0)
        z += tl.load(ape + (position % ratio)[:, None] * W + n[None, :], mask=inside, other=0.0)
        row = m.to(tl.int64)
        if DECODE:
            slot = tl.load(slots + m, mask=valid, other=0)
            row = slot.to(tl.int64) * length + position % length
        to = pair + row[:, None] * (2 * W) + n[None, :]
        tl.store(to, k, mask=inside)
        tl.store(to + W, z, mask=inside)
        if FUSED:
            if (half + 1) * E == W:
                # what this program pools is what it just wrote, and rows of earlier steps
                tl.debug_barrier()
                close_blocks(
                    0, c, counters + tl.num_programs(1), tiles, pair, state, positions, seq_ids, starts, slots, pooled, table,
                    table_width, norm, inv_freq, entries, entries16, pages, per_page, row_size, T, E, R, W, length, ratio, eps,
                    BM, G, P, BN, EB, OVERLAP, DECODE, ACT, IS_INDEX, ROUNDS, NATIVE,
                )  # fmt: skip


@triton.jit
def pool_kernel(
    counters, pair, state, positions, seq_ids, starts, slots, pooled, table, table_width, norm, inv_freq, entries, entries16,
    pages, per_page, row_size, T, E, R, W, length, ratio, eps,
    CH: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, EB: tl.constexpr, OVERLAP: tl.constexpr,
    DECODE: tl.constexpr, ACT: tl.constexpr, IS_INDEX: tl.constexpr, ROUNDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, n) pools tile n of the channels for all blocks that tokens i * CH .. (i + 1) * CH complete."""
    i = tl.program_id(0)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    close_blocks(
        i * CH, c, counters + i, tl.num_programs(1), pair, state, positions, seq_ids, starts, slots, pooled, table, table_width,
        norm, inv_freq, entries, entries16, pages, per_page, row_size, T, E, R, W, length, ratio, eps, CH, G, P, BN, EB, OVERLAP,
        DECODE, ACT, IS_INDEX, ROUNDS, NATIVE,
    )  # fmt: skip


# the same code for short rings and for long ones
@triton.jit(do_not_specialize=["length"])
def keep_kernel(pair, state, positions, starts, slots, length, width, BR: tl.constexpr, BC: tl.constexpr):
    """Write the last `length` rows of `pair` [T, width] of sequence b into its ring, BR x BC of them per program (b, i, j)."""
    b = tl.program_id(0)
    start, end = tl.load(starts + b), tl.load(starts + b + 1)
    back = tl.program_id(1) * BR + tl.arange(0, BR)
    row = end - 1 - back
    valid = (back < length) & (row >= start)
    position = tl.load(positions + row, mask=valid, other=0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    inside = valid[:, None] & (c < width)[None, :]
    value = tl.load(pair + row[:, None].to(tl.int64) * width + c[None, :], mask=inside, other=0.0)
    to = tl.load(slots + b).to(tl.int64) * length + position % length
    tl.store(state + to[:, None] * width + c[None, :], value, mask=inside)
