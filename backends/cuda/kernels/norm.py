"""RMS normalisation."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, y, width, eps, BLOCK: tl.constexpr):
    """One program per row of x [rows, width]; BLOCK covers the width."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < width
    value = tl.load(x + row * width + k, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    gain = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + k, (value * factor * gain).to(y.dtype.element_ty), mask=inside)
