"""Number formats inside kernels: FP8 E4M3, FP4 E2M1, UE8M0 scales, and the roundings built on them.

Codes are made and read by integer arithmetic on float32, so that every chip and the interpreter give the same bits, with or
without FP8 instructions. The definitions are those of `v4sdk.quant`.
"""

import triton
import triton.language as tl


@triton.jit
def e8m0_value(byte):
    """UE8M0 bytes as float32 powers of two; 0 is 2**-127, 255 is NaN."""
    wide = byte.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverse(exponent):
    """One over the power of two of a UE8M0 byte 1..253 (int32). Multiplying by it is exact; a division need not be on a GPU."""
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_value(stored):
    """Scales of a weight as float32: UE8M0 bytes or float32, by the dtype of what was loaded."""
    # `else`, not what follows: the compiler reads on after a return under a condition it knows
    if stored.dtype == tl.uint8:
        return e8m0_value(stored)
    else:
        return stored


@triton.jit
def e8m0_ceil(x):
    """The exponent byte (int32) of the smallest power of two that is at least x, positive and normal."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0).to(tl.int32)


@triton.jit
def e4m3_round(x):
    """Round float32 within [-448, 448] to the E4M3 grid, ties to even; the result is float32."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    # 1.5 * 2**23 grid steps: adding it leaves no bits below a step
    magic = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@triton.jit
def e4m3_code(x):
    """The E4M3 byte (int32) of float32 values that lie on the grid."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - (120 << 23)) >> 20
    small = (tl.abs(x) * 512.0).to(tl.int32)
    return tl.where(size >= (121 << 23), normal, small) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_value(code):
    """E4M3 values as float32, from bytes or from the chip's own FP8 type."""
    if code.dtype == tl.uint8:
        wide = code.to(tl.int32)
        # the bits of E4M3 at float32's place, then the difference of the exponents' biases
        value = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        signed = tl.where(wide >= 128, -value, value)
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), signed)
    return code.to(tl.float32)


@triton.jit
def e2m1_value(code):
    """E2M1 codes 0..15 (int32) as float32."""
    exponent = (code >> 1) & 3
    mantissa = code & 1
    size = tl.where(
        exponent == 0,
        mantissa.to(tl.float32) * 0.5,
        (((exponent + 126) << 23) | (mantissa << 22)).to(tl.float32, bitcast=True),
    )
    return tl.where(code >= 8, -size, size)


@triton.jit
def e2m1_code(x):
    """Round float32 within [-6, 6] to the nearest E2M1 code (int32), ties to the even code."""
    # counting the boundaries below x would do, but compilers count conditions in memory
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.maximum(size >> 23, 127)
    # 1.5 * 2**23 grid steps: adding it leaves no bits below a step
    magic = (((exponent + 22) << 23) | 0x400000).to(tl.float32, bitcast=True)
    near = (tl.abs(x) + magic) - magic
    code = tl.where(near >= 1.0, (near.to(tl.int32, bitcast=True) >> 22) - 252, tl.where(near == 0.5, 1, 0))
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def q8_exponent(amax):
    """The UE8M0 byte (int32) under which values up to `amax` fit E4M3."""
    return e8m0_ceil(tl.maximum(amax, 1e-4) * 0.002232142857142857)


@triton.jit
def q4_exponent(amax):
    """The UE8M0 byte (int32) under which values up to `amax` fit E2M1."""
    return e8m0_ceil(tl.maximum(amax, 7.052966104933725e-38) * 0.16666666666666666)


@triton.jit
def q8_rows(x):
    """Round every row of x [rows, group] float32 to FP8 with one power-of-two scale, and come back to float32."""
    exponent = q8_exponent(tl.max(tl.abs(x), 1))
    scale = e8m0_value(exponent)[:, None]
    fitted = tl.minimum(tl.maximum(x * e8m0_inverse(exponent)[:, None], -448.0), 448.0)
    return e4m3_round(fitted) * scale


@triton.jit
def arrive(counter, total):
    """Say that this program has stored its part; true for the last of `total` programs, which may read all parts.

    The counter is zero again afterwards, so a replayed graph finds it as the first run did. Order of arrival decides who
    finishes, never what is summed in which order.
    """
    # every thread's stores come before the one atomic, whose release covers them
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    last = before == total - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")
    tl.debug_barrier()
    return last


@triton.jit
def sum_parts(parts, at, size, inside, SPLIT: tl.constexpr):
    """Add up what SPLIT programs left in float32, `size` elements from one to the next: always in the same order.

    Shapes:
        at, inside [rows, columns] -> [rows, columns]; zero where not inside
    """
    total = tl.load(parts + at, mask=inside, other=0.0)
    # small tiles: unrolled, so that all loads are on their way before the first sum
    if at.shape[0] <= 16:
        for part in tl.static_range(1, SPLIT):
            total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    else:
        for part in range(1, SPLIT):
            total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    return total
