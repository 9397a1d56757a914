"""What surrounds the experts' products in a prompt: pairs brought together by expert before, a token's rows added after."""

import triton
import triton.language as tl

from .moe import sum_choices


@triton.jit
def count_pairs(ids, P, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the P pairs chose each expert: [BINS] int32."""
    counts = tl.zeros((BINS,), tl.int32)
    lane = tl.arange(0, BLOCK)
    for first in range(0, P, BLOCK):
        # the last bin is nobody's
        chosen = tl.load(ids + first + lane, mask=first + lane < P, other=BINS - 1).to(tl.int32)
        counts += tl.histogram(chosen, BINS)
    return counts


@triton.jit
def bucket_kernel(
    ids, experts, slots, P, E, tiles, BM: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Deal the pairs into tiles of BM of one expert; program e lays out expert e's, in ascending order of pairs.

    Args:
        tiles: how many there are room for, at least the sum of every expert's. BINS: a power of two above E.

    Shapes:
        ids [P] -> experts [tiles], slots [tiles, BM] int32; -1 for no expert and no pair
    """
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = count_pairs(ids, P, BINS, BLOCK)
    needed = tl.where(bins < E, (counts + BM - 1) // BM, 0)
    first = tl.sum(tl.where(bins < e, needed, 0), 0)
    mine = tl.sum(tl.where(bins == e, needed, 0), 0)
    lane = tl.arange(0, BLOCK)
    found = 0
    for start in range(0, P, BLOCK):
        pair = start + lane
        match = (tl.load(ids + pair, mask=pair < P, other=-1).to(tl.int32) == e).to(tl.int32)
        place = found + tl.cumsum(match, 0) - 1
        tl.store(slots + first * BM + place, pair, mask=match != 0)
        found += tl.sum(match, 0)
    slot = tl.arange(0, SLOTS)
    for start in range(found, mine * BM, SLOTS):
        tl.store(
            slots + first * BM + start + slot, tl.full((SLOTS,), -1, tl.int32), mask=start + slot < mine * BM
        )
    for start in range(0, mine, SLOTS):
        tl.store(experts + first + start + slot, tl.zeros((SLOTS,), tl.int32) + e, mask=start + slot < mine)
    if e == E - 1:
        for start in range(first + mine, tiles, SLOTS):
            tl.store(experts + start + slot, tl.full((SLOTS,), -1, tl.int32), mask=start + slot < tiles)


@triton.jit
def combine_kernel(
    rows, ids, y, P, N, width, first_column,
    CHOSEN: tl.constexpr, BETWEEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[t, first_column :][: width] = the sum of token t's rows [P, width] in ascending expert id; y [T, N] float32."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (token * CHOSEN < P)[:, None] & (n < width)[None, :]
    total = sum_choices(rows, ids, token, n, inside, P, width, CHOSEN, 1, BETWEEN)
    tl.store(y + token[:, None].to(tl.int64) * N + first_column + n[None, :], total, mask=inside)
