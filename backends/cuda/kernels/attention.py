"""The sparse softmax: one pass over window rows and compressed entries with a running maximum, for decode steps and for prompts.

Logits are counted in powers of two, so that the exponential is one instruction.
"""

import triton
import triton.language as tl

from .numbers import arrive, e4m3_value, e8m0_value
from .rows import entry_row

LOG2_E = tl.constexpr(1.4426950408889634)
# below every logit, and finite: the difference of two of them is 0, not NaN
LOWEST = tl.constexpr(-1e30)


@triton.jit
def key_tile(cache, at, present, D, R, NATIVE: tl.constexpr, DB: tl.constexpr, OPERAND: tl.constexpr):
    """Read KV rows [n, DB] as an operand of a product; zero where nothing is present and beyond D.

    As `rows.load_kv`, but every scale is read once per 64 columns, and the loads are as wide as rows are aligned.

    Args:
        cache: pointers to its FP8 values (or their bytes), its bytes and its BF16 (NATIVE), or thrice to the same floats; and
            the step from one row to the next, in units of 8 bytes (NATIVE) or in elements.
        at: [n] int64 rows. present: [n]. R: rotary columns, at most 64.
    """
    codes, scales, rotary, step = cache
    if NATIVE:
        WIDTH: tl.constexpr = 64 if DB > 64 else DB
        plain = D - R
        group, c = tl.arange(0, DB // WIDTH)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
        column = group * WIDTH + c
        row, wanted = at[:, None, None], present[:, None, None]
        # times 8 where the compiler can see it
        code = tl.load(codes + row * (step * 8) + column, mask=wanted & (column < plain), other=0.0)
        in_row = plain + 2 * R + group
        scale = tl.load(scales + row * (step * 8) + in_row, mask=wanted & (group * WIDTH < plain), other=127)
        # exact in BF16 too: E4M3 has four significant bits, and scales are powers of two
        value = e4m3_value(code).to(OPERAND) * e8m0_value(scale).to(OPERAND)
        # R <= WIDTH: below every c lies at most one rotary column, in whichever group
        turn = (c + WIDTH - plain % WIDTH) % WIDTH
        turned = tl.load(rotary + row * (step * 4) + plain // 2 + turn, mask=wanted & (turn < R), other=0.0)
        value = tl.where(column < plain, value, tl.where(column < D, turned.to(OPERAND), 0.0))
        return tl.reshape(value.to(OPERAND), (at.shape[0], DB))
    else:
        column = tl.arange(0, DB)[None, :]
        inside = present[:, None] & (column < D)
        return tl.load(codes + (at * step)[:, None] + column, mask=inside, other=0.0).to(OPERAND)


@triton.jit
def multiply_add(a, b, acc, OPERAND: tl.constexpr):
    """acc + a @ b in float32."""
    if OPERAND == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def attend(
    q,
    cache,
    at,
    present,
    seen,
    D,
    R,
    scale,
    once,
    top,
    total,
    acc,
    NATIVE: tl.constexpr,
    BF16_P: tl.constexpr,
):
    """Take n more rows of a cache, keys and values in one, into the running softmax of BH rows of queries.

    Args:
        q: [BH, DB] in the dtype that products multiply in. cache, at, present, D, R: see `key_tile`. seen: [BH or 1, n].
        once: 1. top, total: [BH], largest logit and sum. acc: [BH, DB] float32.

    Returns:
        top, total, acc with these keys
    """
    OPERAND: tl.constexpr = q.dtype
    keys = key_tile(cache, at, present, D, R, NATIVE, q.shape[1], OPERAND)
    logits = tl.zeros((q.shape[0], keys.shape[0]), tl.float32)
    if q.shape[0] >= 64:
        # in a loop of its own, or the compiler sees two products in a chain, lays the second out like the first, and
        # registers do not suffice
        for _ in range(once):
            logits = multiply_add(q, tl.trans(keys), logits, OPERAND)
    else:
        logits = multiply_add(q, tl.trans(keys), logits, OPERAND)
    logits = tl.where(seen, logits * scale, float("-inf"))
    now = tl.maximum(top, tl.max(logits, 1))
    kept = tl.exp2(top - now)
    p = tl.exp2(logits - now[:, None])
    total = total * kept + tl.sum(p, 1)
    # numerators are rounded for the weighted sum alone
    if BF16_P:
        p = p.to(tl.bfloat16)
    acc = multiply_add(p.to(OPERAND), keys, acc * kept[:, None], OPERAND)
    return now, total, acc


@triton.jit
def merge(parts, stats, sink, y, first, count, H, D, HEADS: tl.constexpr, DB: tl.constexpr):
    """Sum the parts of one token's heads in order and divide: what the last program of them does.

    Shapes:
        parts [count, H, D], stats [count, 2, H] float32: largest logit and sum; sink [H], y [H, D], all of one token
    """
    SOME: tl.constexpr = HEADS if HEADS < 16 else 16
    d = tl.arange(0, DB)[None, :]
    for h0 in range(first, first + HEADS, SOME):
        h = h0 + tl.arange(0, SOME)
        mine = h < H
        at, inside = h[:, None] * D + d, mine[:, None] & (d < D)
        top = tl.full((SOME,), LOWEST, tl.float32)
        for s in range(count):
            top = tl.maximum(top, tl.load(stats + s * 2 * H + h, mask=mine, other=0.0))
        total = tl.exp2(tl.load(sink + h, mask=mine, other=0.0) * LOG2_E - top)
        summed = tl.zeros((SOME, DB), tl.float32)
        # several parts in flight: they come from other multiprocessors
        for s in tl.range(0, count, loop_unroll_factor=4):
            weight = tl.exp2(tl.load(stats + s * 2 * H + h, mask=mine, other=0.0) - top)
            total += tl.load(stats + (s * 2 + 1) * H + h, mask=mine, other=0.0) * weight
            part = tl.load(parts + tl.cast(s, tl.int64) * H * D + at, mask=inside, other=0.0)
            summed += part * weight[:, None]
        tl.store(y + at, (summed / total[:, None]).to(y.dtype.element_ty), mask=inside)


# the same code for every length of the context
@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    q, near_codes, near_scales, near_rotary, near_step, far_codes, far_scales, far_rotary, far_step, picks, table, positions,
    slots, sink, y, parts, stats, counters, H, D, R, W, K, ratio, num_pages, per_page, pages, scale, span, splits,
    FAR: tl.constexpr, NEAR_NATIVE: tl.constexpr, FAR_NATIVE: tl.constexpr, IS_SPLIT: tl.constexpr, HEADS: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, DB: tl.constexpr, OPERAND: tl.constexpr, BF16_P: tl.constexpr,
):  # fmt: skip
    """y [T, H, D], one token per sequence: program (token and HEADS heads, s) takes blocks s * span .. of BN keys each.

    Blocks are those of the ring, then those of entries: the K picks of a token (FAR = `picked`), all that its position sees
    (`all`), or `none`. Programs without a block leave at once: how many have one follows from the token's position.
    """
    over = tl.cdiv(H, HEADS)
    t, head, split = tl.program_id(0) // over, tl.program_id(0) % over * HEADS, tl.program_id(1)
    p = tl.load(positions + t)
    near, entries, once = tl.cdiv(W, BN), 0, tl.minimum(H, 1)
    if FAR == "picked":
        entries = K
    elif FAR == "all":
        entries = tl.minimum((p + 1) // ratio, num_pages * per_page)
    end = near + tl.cdiv(entries, BN)
    low, high = split * span, tl.minimum(split * span + span, end)
    if low < end:
        row, d, key = tl.arange(0, BH), tl.arange(0, DB), tl.arange(0, BN)
        mine = (row < HEADS) & (head + row < H)
        token = t.to(tl.int64)
        at_head = (head + row)[:, None] * D + d[None, :]
        inside = mine[:, None] & (d < D)[None, :]
        query = tl.load(q + token * H * D + at_head, mask=inside, other=0.0).to(OPERAND)
        top, total = tl.full((BH,), LOWEST, tl.float32), tl.zeros((BH,), tl.float32)
        acc = tl.zeros((BH, DB), tl.float32)
        ring = tl.load(slots + t).to(tl.int64) * W
        cache = (near_codes, near_scales, near_rotary, near_step)
        for block in range(low, tl.minimum(high, near)):
            slot = block * BN + key
            seen = (slot < W) & (slot <= p)  # a ring not yet full holds positions 0..p in slots 0..p
            top, total, acc = attend(
                query, cache, ring + slot, seen, seen[None, :], D, R, scale, once, top, total, acc, NEAR_NATIVE, BF16_P,
            )  # fmt: skip
        cache = (far_codes, far_scales, far_rotary, far_step)
        if FAR != "none":
            for block in range(tl.maximum(low, near), high):
                entry = (block - near) * BN + key
                entry = tl.where(entry < entries, entry, -1)
                if FAR == "picked":
                    entry = tl.load(picks + token * K + entry, mask=entry >= 0, other=-1)
                at = entry_row(table + token * num_pages, entry, num_pages, per_page, pages)
                seen = entry >= 0
                top, total, acc = attend(
                    query, cache, at, seen, seen[None, :], D, R, scale, once, top, total, acc, FAR_NATIVE, BF16_P,
                )  # fmt: skip
        if not IS_SPLIT:
            total += tl.exp2(tl.load(sink + head + row, mask=mine, other=0.0) * LOG2_E - top)
            tl.store(y + token * H * D + at_head, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)
        else:
            of_token, of_stats = parts + token * splits * H * D, stats + token * splits * 2 * H
            tl.store(of_token + split.to(tl.int64) * H * D + at_head, acc, mask=inside)
            tl.store(of_stats + split * 2 * H + head + row, top, mask=mine)
            tl.store(of_stats + (split * 2 + 1) * H + head + row, total, mask=mine)
            count = tl.cdiv(end, span)
            if arrive(counters + tl.program_id(0), count):
                merge(of_token, of_stats, sink, y + token * H * D, head, count, H, D, HEADS, DB)


@triton.jit
def rows_of_heads(row, t0, t1, head, H, D, HEADS: tl.constexpr, DB: tl.constexpr):
    """Token and head of each row of a tile that holds HEADS heads of each token, where they lie in [T, H, D], and what exists.

    Returns:
        t, h [BH], place [BH, 1] int64, inside [BH, DB]
    """
    t, h = t0 + row // HEADS, head + row % HEADS
    mine = (t <= t1) & (h < H)
    return t, h, ((t.to(tl.int64) * H + h) * D)[:, None], mine[:, None] & (tl.arange(0, DB) < D)[None, :]


@triton.jit
def attend_sequence(
    query, kv, far, table, positions, cu_seqlens, b, t0, t1, p, belongs, B, D, R, W, ratio, num_pages, per_page, pages, scale,
    once, top, total, acc, FAR: tl.constexpr, FAR_NATIVE: tl.constexpr, BN: tl.constexpr, BF16_P: tl.constexpr,
):  # fmt: skip
    """Rows t0..t1 that belong to sequence b attend to its window, and to all its entries (FAR = `all`).

    Args:
        kv, far: caches, see `key_tile`. p, belongs: [BH or 1] position of each row, and whether it is one of the sequence.
    """
    key = tl.arange(0, BN)
    # position of the sequence's first new row, and of those here
    first = tl.load(cu_seqlens + b)
    start = tl.load(positions + first)
    low = start + tl.maximum(t0 - first, 0)
    high = start + tl.minimum(t1 + 1, tl.load(cu_seqlens + b + 1)) - first
    for k0 in range(tl.maximum(low - W + 1, 0), high, BN):
        k = k0 + key
        at = tl.where(k < start, b * W + k % W, B * W + first + (k - start)).to(tl.int64)
        seen = belongs[:, None] & (k[None, :] <= p[:, None]) & (k[None, :] > p[:, None] - W)
        top, total, acc = attend(
            query, kv, at, k < high, seen, D, R, scale, once, top, total, acc, False, BF16_P
        )
    if FAR == "all":
        entries = tl.minimum(high // ratio, num_pages * per_page)
        pages_of = table + tl.cast(b, tl.int64) * num_pages
        for e0 in range(0, entries, BN):
            entry, there = e0 + key, e0 + key < entries
            at = entry_row(pages_of, tl.where(there, entry, -1), num_pages, per_page, pages)
            seen = belongs[:, None] & (entry[None, :] < ((p + 1) // ratio)[:, None])
            top, total, acc = attend(
                query, far, at, there, seen, D, R, scale, once, top, total, acc, FAR_NATIVE, BF16_P
            )
    return top, total, acc


@triton.jit
def prompt_kernel(
    q, kv, kv_step, far_codes, far_scales, far_rotary, far_step, picks, table, positions, seq_ids, cu_seqlens, sink, y, T, B,
    H, D, R, W, K, ratio, num_pages, per_page, pages, scale, FAR: tl.constexpr, FAR_NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, DB: tl.constexpr, OPERAND: tl.constexpr,
    BF16_P: tl.constexpr,
):  # fmt: skip
    """y [T, H, D]: a program takes TOKENS consecutive rows and BH / TOKENS heads of each.

    `kv` holds the rings of B sequences in slot order, then the new rows. PICKS is K filled up to a power of two, so that the
    picks of a token never end inside another's block.
    """
    HEADS: tl.constexpr = BH // TOKENS
    over = tl.cdiv(H, HEADS)
    t0, head = tl.program_id(0) // over * TOKENS, tl.program_id(0) % over * HEADS
    t1, once = tl.minimum(t0 + TOKENS, T) - 1, tl.minimum(H, 1)
    key, d = tl.arange(0, BN), tl.arange(0, DB)
    t, h, place, inside = rows_of_heads(tl.arange(0, BH), t0, t1, head, H, D, HEADS, DB)
    # rows beyond the last token do its work once more, and store nothing; all rows of one token see the same keys
    asks = tl.minimum(t, t1) if TOKENS > 1 else tl.full((1,), t0, tl.int32)
    p, b_of = tl.load(positions + asks), tl.load(seq_ids + asks).to(tl.int32)
    query = tl.load(q + place + d[None, :], mask=inside, other=0.0).to(OPERAND)
    top, total = tl.full((BH,), LOWEST, tl.float32), tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, DB), tl.float32)
    near, far = (kv, kv, kv, kv_step), (far_codes, far_scales, far_rotary, far_step)
    b0 = tl.load(seq_ids + t0).to(tl.int32)
    if TOKENS == 1:
        belongs = tl.full((1,), True, tl.int1)
        top, total, acc = attend_sequence(
            query, near, far, table, positions, cu_seqlens, b0, t0, t1, p, belongs, B, D, R, W, ratio, num_pages, per_page, pages,
            scale, once, top, total, acc, FAR, FAR_NATIVE, BN, BF16_P,
        )  # fmt: skip
    else:
        for b in range(b0, tl.load(seq_ids + t1).to(tl.int32) + 1):
            top, total, acc = attend_sequence(
                query, near, far, table, positions, cu_seqlens, b, t0, t1, p, b_of == b, B, D, R, W, ratio, num_pages, per_page,
                pages, scale, once, top, total, acc, FAR, FAR_NATIVE, BN, BF16_P,
            )  # fmt: skip
    if FAR == "picked":
        for i0 in range(0, TOKENS * PICKS if TOKENS > 1 else K, BN):
            of = t0 + (i0 + key) // PICKS if TOKENS > 1 else tl.full((1,), t0, tl.int32)
            pick = (i0 + key) % PICKS if TOKENS > 1 else i0 + key
            entry = tl.load(picks + of.to(tl.int64) * K + pick, mask=(of <= t1) & (pick < K), other=-1)
            whose = tl.load(seq_ids + tl.minimum(of, t1))
            at = entry_row(table + whose * num_pages, entry, num_pages, per_page, pages)
            seen = (entry >= 0)[None, :] & (of[None, :] == asks[:, None])
            top, total, acc = attend(
                query, far, at, entry >= 0, seen, D, R, scale, once, top, total, acc, FAR_NATIVE, BF16_P
            )
    # worked out again, from a 0 that the compiler cannot see: kept over the loops, addresses take registers that sums need
    t, h, place, inside = rows_of_heads(tl.arange(0, BH) + (once - 1), t0, t1, head, H, D, HEADS, DB)
    total += tl.exp2(tl.load(sink + h, mask=h < H, other=0.0) * LOG2_E - top)
    tl.store(y + place + d[None, :], (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)
