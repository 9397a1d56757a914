"""Exact choices: floats as integers of the same order, and the search for the k-th largest among them.

Integers compare alike on every chip and sum to the same in any order, so a choice made with them depends on nothing but its
inputs.
"""

import triton
import triton.language as tl

SMALLEST = tl.constexpr(-(1 << 31))
LARGEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def order_key(x):
    """Float32 as int32 of the same order; -0.0 equals +0.0, NaN is above everything. SMALLEST is no key of anything."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == SMALLEST, 0, bits)
    return tl.where(x == x, tl.where(bits < 0, bits ^ LARGEST, bits), LARGEST)


@triton.jit
def order_value(key):
    """Undo `order_key`."""
    return tl.where(key < 0, key ^ LARGEST, key).to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, number):
    """An int64 that orders by key, then by lowest number (int32, not negative)."""
    return (key.to(tl.int64) << 32) + (number ^ LARGEST).to(tl.int64)


@triton.jit
def ranked_key(rank):
    """The key of a `ranked` integer."""
    return (rank >> 32).to(tl.int32)


@triton.jit
def ranked_number(rank):
    """The number of a `ranked` integer."""
    return (rank & LARGEST).to(tl.int32) ^ LARGEST


@triton.jit
def bound_of_largest(key, k):
    """The bound that parts the k largest keys of every row, by halves between the smallest and the largest key.

    A row is done as soon as exactly k keys reach its bound. All keys above the bound are among the k, and the first `equals`
    of those that equal it.

    Shapes:
        key [rows, n] int32, SMALLEST where there is none; k [rows], at most the number of keys of the row
        -> bound, equals [rows] int32
    """
    low = tl.min(tl.where(key == SMALLEST, LARGEST, key), 1)
    high = tl.max(key, 1)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        # the mean of both, rounded up, where their sum would not fit
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        enough = count >= k
        high = tl.where(enough, tl.where(count == k, middle, high), middle - 1)
        low = tl.where(enough, middle, low)
    return low, k - tl.sum((key > low[:, None]).to(tl.int32), 1)
