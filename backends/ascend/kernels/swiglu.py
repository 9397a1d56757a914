"""Clamped SwiGLU whose result leaves as int8 with one scale per row: the input of the second product of an expert."""

import triton
import triton.language as tl

# adding and taking away 1.5 * 2**23 leaves a float32 of small size rounded to the nearest integer, ties to even
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _gated(gate, up, at, inside, limit, weight):
    """weight * silu(min(gate, limit)) * clamp(up, -limit, limit) in float32."""
    g = tl.minimum(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), limit)
    v = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.maximum(tl.minimum(v, limit), -limit)
    return g / (1.0 + tl.exp(-g)) * v * weight


@triton.jit
def _code(a, scale):
    """a / scale to the nearest integer, ties to even, as int8; 0 where the scale is 0."""
    divided = a / tl.where(scale > 0.0, scale, 1.0)
    return ((divided + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def swiglu_kernel(
    gate, up, weights, codes, scales, rows, stride, limit,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From gate and up [rows, WIDTH], rows `stride` apart, to codes [rows, WIDTH] int8 and scales [rows] float32.

    scale = max |a| / 127, code = a / scale to the nearest, ties to even; a row of zeros has codes and scale 0. Program p takes
    rows p, p + programs, ..; a row wider than BLOCK is computed twice, once to find its scale.
    """
    n = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + start)
        to = codes + start * WIDTH + n
        if BLOCK >= WIDTH:
            a = _gated(gate, up, start * stride + n, n < WIDTH, limit, weight)
            scale = tl.max(tl.abs(a), 0) / 127.0
            tl.store(to, _code(a, scale), mask=n < WIDTH)
        else:
            most = tl.full((BLOCK,), 0.0, tl.float32)
            for first in range(0, WIDTH, BLOCK):
                a = _gated(gate, up, start * stride + first + n, first + n < WIDTH, limit, weight)
                most = tl.maximum(most, tl.abs(a))
            scale = tl.max(most, 0) / 127.0
            for first in range(0, WIDTH, BLOCK):
                a = _gated(gate, up, start * stride + first + n, first + n < WIDTH, limit, weight)
                tl.store(to + first, _code(a, scale), mask=first + n < WIDTH)
        tl.store(scales + start, scale)
