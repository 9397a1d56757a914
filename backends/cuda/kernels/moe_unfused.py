"""FP4 experts with one launch for every step of the work: what fusing them is measured against."""

import triton
import triton.language as tl

from .moe import members, store_gated
from .moe_packed import row_sums, tile_sums
from .numbers import arrive, sum_parts


@triton.jit
def packed_product_kernel(
    x, row_stride, w, scales, y, parts, counters, ids, P, N, K, W, S, steps,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, Q8: tl.constexpr,
):  # fmt: skip
    """y [P, N] float32: row pair // CHOSEN of x times the matrix of the pair's expert; programs as in `packed_up_kernel`."""
    pair, s = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.load(ids + pair).to(tl.int64) * N + tl.minimum(n, N - 1)
    x += (pair // CHOSEN).to(tl.int64) * row_stride
    out = row_sums(x, w, scales, rows, s * steps, steps, K, W, S, BN, BK, Q8)[None, :]
    inside = (n < N)[None, :]
    at = pair.to(tl.int64) * N + n[None, :]
    if SPLIT == 1:
        tl.store(y + at, out, mask=inside)
    else:
        size = tl.cast(P, tl.int64) * N
        tl.store(parts + s * size + at, out, mask=inside)
        if arrive(counters + pair * tl.num_programs(1) + tl.program_id(1), SPLIT):
            tl.store(y + at, sum_parts(parts, at, size, inside, SPLIT), mask=inside)


@triton.jit
def packed_tile_product_kernel(
    x, spread, w, scales, y, experts, slots, P, N, W, S,
    CHOSEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `packed_product_kernel` for buckets; x [.., spread] is spread."""
    expert, pair = members(tl.program_id(0), experts, experts, slots, P, BM, "bucket")
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = expert * N + tl.minimum(n, N - 1)
    inputs = tl.maximum(pair, 0) // CHOSEN
    acc = tile_sums(x, inputs, spread, w, scales, rows, W, S, BM, BN, BK)
    at = tl.maximum(pair, 0)[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y + at, acc, mask=(pair >= 0)[None, :] & (n < N)[:, None])


@triton.jit
def gate_kernel(g, v, a, weights, P, I, limit, BETWEEN: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """a [P, I] = silu(min(g, limit)) * clamp(v, -limit, limit) * weight of the pair; g, v [P, I] float32."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (pair < P)[:, None] & (n < I)[None, :]
    at = pair[:, None].to(tl.int64) * I + n[None, :]
    gate = tl.load(g + at, mask=inside, other=0.0)
    up = tl.load(v + at, mask=inside, other=0.0)
    store_gated(gate, up, a, at, inside, tl.where(pair < P, pair, -1), weights, limit, BETWEEN, True)
