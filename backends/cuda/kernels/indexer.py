"""The lightning indexer: scores of compressed entries as integers of the same order, and the exact choice of the largest."""

import triton
import triton.language as tl

from .numbers import e8m0_value
from .select import SMALLEST, bound_of_largest, order_key


@triton.jit
def _fp4_value(code):
    """E2M1 codes 0..15 (int32) as float32: their bits at float32's place, then the difference of the exponents' biases."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def key_rows(
    table, first, visible, last_page, PAGE: tl.constexpr, PAGE_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Where the rows of entries first .. first + BN begin, in elements of the cache [BN]; an absent page is the last one.

    Args:
        first: a multiple of BN. visible: entries from here on have no row.
    """
    if PAGE % BN == 0:
        page = tl.load(table + first // PAGE)
        page = tl.where(page < 0, last_page, page).to(tl.int64)
        return page * PAGE_STRIDE + (first % PAGE) * ROW_STRIDE + tl.arange(0, BN) * ROW_STRIDE
    entry = first + tl.arange(0, BN)
    page = tl.load(table + entry // PAGE, mask=entry < visible, other=0)
    page = tl.where(page < 0, last_page, page).to(tl.int64)
    return page * PAGE_STRIDE + (entry % PAGE) * ROW_STRIDE


@triton.jit
def key_tile(keys, at, valid, E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, OPERAND: tl.constexpr):
    """Index keys as an operand of `tl.dot`: packed rows (E / 2 bytes of nibbles, E / 32 of scales) or rows of floats.

    Shapes:
        at, valid [BN] -> [BN, BE]; zero outside
    """
    if keys.dtype.element_ty == tl.uint8:
        group, half = tl.arange(0, BE // 32), tl.arange(0, 16)
        inside = valid[:, None] & (group < E // 32)[None, :]
        spot = (at[:, None] + group[None, :] * 16)[:, :, None] + half[None, None, :]
        byte = tl.load(keys + spot, mask=inside[:, :, None], other=0).to(tl.int32)
        stored = tl.load(keys + at[:, None] + E // 2 + group[None, :], mask=inside, other=127)
        factor = e8m0_value(stored)[:, :, None]
        even = (_fp4_value(byte & 15) * factor).to(OPERAND)
        odd = (_fp4_value(byte >> 4) * factor).to(OPERAND)
        return tl.reshape(tl.join(even, odd), (BN, BE))
    k = tl.arange(0, BE)
    return tl.load(keys + at[:, None] + k[None, :], mask=valid[:, None] & (k < E)[None, :], other=0.0).to(
        OPERAND
    )


@triton.jit
def query_rows(
    q,
    q_stride,
    w,
    w_stride,
    first,
    last,
    H: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    BH: tl.constexpr,
):
    """The heads of tokens first .. first + QUERIES side by side.

    Shapes:
        -> pointers to their queries, which of them exist (tokens from `last` on do not), weights float32: all [QUERIES * BH]
    """
    column = tl.arange(0, QUERIES * BH)
    head, t = column % BH, tl.cast(first, tl.int64) + column // BH
    inside = (head < H) & (t < last)
    return (
        q + t * q_stride + head * E,
        inside,
        tl.load(w + t * w_stride + head, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def query_tile(rows, inside, E: tl.constexpr, BE: tl.constexpr, OPERAND: tl.constexpr):
    """Queries as an operand of `tl.dot`: [BE, QUERIES * BH], zero outside."""
    k = tl.arange(0, BE)
    return tl.load(rows[None, :] + k[:, None], mask=inside[None, :] & (k < E)[:, None], other=0.0).to(OPERAND)


@triton.jit
def wide_product(keys, at, seen, rows, inside, E: tl.constexpr):
    """Keys times queries in float32, by columns that fit the registers: [BN, QUERIES * BH]."""
    dot = tl.zeros((at.shape[0], rows.shape[0]), tl.float32)
    for k0 in range(0, E, 16):
        k = k0 + tl.arange(0, 16)
        x = tl.load(keys + at[:, None] + k[None, :], mask=seen[:, None] & (k < E)[None, :], other=0.0)
        y = tl.load(rows[None, :] + k[:, None], mask=inside[None, :] & (k < E)[:, None], other=0.0)
        dot = tl.dot(x.to(tl.float32), y.to(tl.float32), dot, input_precision="ieee")
    return dot


@triton.jit
def scores_of(
    dot, weights, QUERIES: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BF16_SCORES: tl.constexpr
):
    """sum_h w[h] relu(q[h] . k[j]) as order keys [BN, QUERIES] int32; `BF16_SCORES` rounds dot, product and sum to BF16."""
    if BF16_SCORES:
        dot = dot.to(tl.bfloat16).to(tl.float32)
        weights = weights.to(tl.bfloat16).to(tl.float32)
    weighted = tl.maximum(dot, 0.0) * weights[None, :]
    if BF16_SCORES:
        weighted = weighted.to(tl.bfloat16).to(tl.float32)
    total = tl.sum(tl.reshape(weighted, (BN, QUERIES, BH)), 2)
    if BF16_SCORES:
        total = total.to(tl.bfloat16).to(tl.float32)
    return order_key(total)


@triton.jit(do_not_specialize=["table_stride", "start", "last_page"])
def decode_scores_kernel(
    q, q_stride, w, w_stride, keys, table, table_stride, positions, seq_ids, scores, start, N, span, topk, ratio,
    last_page,
    H: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, PAGE_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, OPERAND: tl.constexpr, BF16_SCORES: tl.constexpr,
):  # fmt: skip
    """scores [.., N] of tokens from `start`: program (i, t) does entries i * span .. (i + 1) * span of token start + t.

    What cannot be seen is not written, nor anything of a token that sees at most `topk` entries.
    """
    first, t = tl.program_id(0) * span, tl.program_id(1).to(tl.int64) + start
    visible = tl.minimum((tl.load(positions + t) + 1) // ratio, N)
    if (visible > topk) & (visible > first):
        pages = table + tl.load(seq_ids + t) * table_stride
        rows, inside, weights = query_rows(q, q_stride, w, w_stride, t, t + 1, H, E, 1, BH)
        if OPERAND == tl.bfloat16:
            queries = query_tile(rows, inside, E, BE, OPERAND)
        for j0 in range(first, tl.minimum(first + span, visible), BN):
            entry = j0 + tl.arange(0, BN)
            seen = entry < visible
            at = key_rows(pages, j0, visible, last_page, PAGE, PAGE_STRIDE, ROW_STRIDE, BN)
            if OPERAND == tl.bfloat16:
                dot = tl.dot(key_tile(keys, at, seen, E, BE, BN, OPERAND), queries)
            else:
                dot = wide_product(keys, at, seen, rows, inside, E)
            found = scores_of(dot, weights, 1, BH, BN, BF16_SCORES)
            tl.store(scores + (t - start) * N + entry[:, None], found, mask=seen[:, None])


@triton.jit(do_not_specialize=["table_stride", "start", "end", "last_page"])
def prompt_scores_kernel(
    q, q_stride, w, w_stride, keys, table, table_stride, positions, seq_ids, bounds, scores, start, end, N, run, topk,
    ratio, last_page,
    H: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, PAGE_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr,
    BN: tl.constexpr, QUERIES: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr, OPERAND: tl.constexpr,
    BF16_SCORES: tl.constexpr,
):  # fmt: skip
    """scores [end - start, N] of tokens start .. end: program (i, g) takes BN entries and the g-th run of `run` tokens.

    A tile of keys is loaded once for all the tokens of a sequence. See `decode_scores_kernel` for what is not written.
    """
    entry = tl.program_id(0) * BN + tl.arange(0, BN)
    first = start + tl.program_id(1) * run
    last = tl.minimum(first + run, end)
    for s in range(tl.load(seq_ids + first).to(tl.int32), tl.load(seq_ids + last - 1).to(tl.int32) + 1):
        low, high = tl.maximum(first, tl.load(bounds + s)), tl.minimum(last, tl.load(bounds + s + 1))
        # positions rise within a sequence: its last token sees most
        most = tl.minimum((tl.load(positions + high - 1) + 1) // ratio, N)
        if (most > topk) & (most > tl.program_id(0) * BN):
            seen = entry < most
            pages = table + tl.cast(s, tl.int64) * table_stride
            at = key_rows(pages, tl.program_id(0) * BN, most, last_page, PAGE, PAGE_STRIDE, ROW_STRIDE, BN)
            if OPERAND == tl.bfloat16:
                tile = key_tile(keys, at, seen, E, BE, BN, OPERAND)
            for t0 in range(low, high, QUERIES):
                t = t0 + tl.arange(0, QUERIES)
                visible = tl.minimum((tl.load(positions + t, mask=t < high, other=0) + 1) // ratio, N)
                rows, inside, weights = query_rows(q, q_stride, w, w_stride, t0, high, H, E, QUERIES, BH)
                if OPERAND == tl.bfloat16:
                    dot = tl.dot(tile, query_tile(rows, inside, E, BE, OPERAND))
                else:
                    dot = wide_product(keys, at, seen, rows, inside, E)
                found = scores_of(dot, weights, QUERIES, BH, BN, BF16_SCORES)
                wanted = (t < high) & (visible > topk)
                to = scores + ((t - start).to(tl.int64) * N)[None, :] + entry[:, None]
                tl.store(to, found, mask=wanted[None, :] & (entry[:, None] < visible[None, :]))


@triton.jit(do_not_specialize=["T", "limit"])
def pick_kernel(
    keys, entries, positions, picks, pick_keys, T, N, limit, topk, ratio,
    LISTED: tl.constexpr, FINAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Pick the `topk` largest keys of a block: program (c, r) does columns c * BLOCK .. of rows r * ROWS ...

    Args:
        keys: [T, N] int32. entries: [T, N] int32 where `LISTED`, ascending; else the column is the entry, and what a token
            does not see has no key.
        picks: [T, topk] int32, entries ascending, -1 at the end, where `FINAL`; else [T, programs, topk] and their keys in
            `pick_keys`, SMALLEST at the end, for a next pass. Tokens that see at most `topk` entries need no keys, and only
            the final pass.
        limit: entries that a table can hold. PART: columns whose places are counted at a time.
    """
    c, t = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    visible = tl.minimum((tl.load(positions + t, mask=t < T, other=0) + 1) // ratio, limit)
    chosen = (visible > topk) & (t < T)
    place = tl.arange(0, BK)
    if FINAL:
        all_seen = tl.where(place[None, :] < visible[:, None], place[None, :], -1)
        asked = ((t < T) & (visible <= topk))[:, None] & (place < topk)[None, :]
        tl.store(picks + t[:, None] * topk + place[None, :], all_seen, mask=asked)
    if tl.max(chosen.to(tl.int32), 0) > 0:
        every_column = (c * BLOCK + tl.arange(0, BLOCK))[None, :]
        # whole vectors are loaded, what is not seen among them too
        reached = chosen[:, None] & (every_column < N)
        every_key = tl.load(keys + t[:, None] * N + every_column, mask=reached, other=SMALLEST)
        if not LISTED:
            every_key = tl.where(every_column < visible[:, None], every_key, SMALLEST)
        k = tl.minimum(tl.sum((every_key > SMALLEST).to(tl.int32), 1), topk)
        bound, equals = bound_of_largest(every_key, k)
        to = (t * tl.num_programs(0) + c)[:, None] * topk
        # picked so far, and equal to the bound so far
        taken, met = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
        for first in range(0, BLOCK, PART):
            column = (c * BLOCK + first + tl.arange(0, PART))[None, :]
            at = t[:, None] * N + column
            inside = chosen[:, None] & (column < N)
            key = tl.load(keys + at, mask=inside, other=SMALLEST)
            if LISTED:
                entry = tl.load(entries + at, mask=inside, other=-1)
            else:
                entry = tl.broadcast_to(column, (ROWS, PART))
                key = tl.where(column < visible[:, None], key, SMALLEST)
            above, equal = key > bound[:, None], key == bound[:, None]
            # both running counts in one scan
            counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 1)
            rank = met[:, None] + (counts >> 16)
            picked = above | (equal & (rank <= equals[:, None]))
            seat = taken[:, None] + (counts & 0xFFFF) + tl.minimum(rank, equals[:, None]) - 1
            tl.store(picks + to + seat, entry, mask=picked)
            if not FINAL:
                tl.store(pick_keys + to + seat, key, mask=picked)
            taken += tl.sum(above.to(tl.int32), 1)
            met += tl.sum(equal.to(tl.int32), 1)
        if not FINAL:
            unused = chosen[:, None] & (place[None, :] >= k[:, None]) & (place < topk)[None, :]
            tl.store(pick_keys + to + place[None, :], tl.full((ROWS, BK), SMALLEST, tl.int32), mask=unused)
