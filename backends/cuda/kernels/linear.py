"""The matrix product by stored weight encoding."""

import triton
import triton.language as tl

from .numbers import arrive, sum_parts
from .weights import column_scale, input_tile, multiply, weight_tile


@triton.jit
def product(
    x, row_stride, data, scale, rows, valid, n, N, first, last, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """x[rows] @ weight[n].T over columns first..last, float32 [BM, BN]; what other kernels build on."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(first, last, BK):
        tile = input_tile(x, rows, valid, row_stride, k0, K, BK, Q8)
        w = weight_tile(data, scale, n, N, k0, K, ENCODING, BK, OPERAND)
        acc = multiply(acc, tile, w, column_scale(scale, n, N, k0, K, ENCODING), OPERAND)
    return acc


@triton.jit
def linear_kernel(
    x, row_stride, data, scale, y, parts, counters, T, N, K, span,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ENCODING: tl.constexpr, Q8: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] @ weight [N, K].T; program (m, n, s) sums columns s * span .. (s + 1) * span.

    With SPLIT > 1 the parts [SPLIT, T, N] float32 are summed in order by whoever comes last.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(2)
    valid = m < T
    acc = product(
        x, row_stride, data, scale, m, valid, n, N, s * span, tl.minimum(K, (s + 1) * span), K, BM, BN, BK,
        ENCODING, Q8, OPERAND,
    )  # fmt: skip
    at = m[:, None].to(tl.int64) * N + n[None, :]
    inside = valid[:, None] & (n < N)[None, :]
    if SPLIT == 1:
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)
    else:
        size = tl.cast(T, tl.int64) * N
        tl.store(parts + s * size + at, acc, mask=inside)
        if arrive(counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), SPLIT):
            total = sum_parts(parts, at, size, inside, SPLIT)
            tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
