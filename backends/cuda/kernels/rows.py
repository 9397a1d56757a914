"""Cache rows inside kernels: where a compressed entry lies, how KV rows and index keys are stored, and rotations of rows.

A stored row comes as two pointers to the same memory, one by bytes (or float elements) and one by BF16: the native layout mixes
both, and a kernel never casts a pointer. Layouts are those of `v4sdk.quant.kv_pack` and `index_pack`.
"""

import triton
import triton.language as tl

from .numbers import (
    e2m1_code,
    e2m1_value,
    e4m3_code,
    e4m3_round,
    e4m3_value,
    e8m0_inverse,
    e8m0_value,
    q4_exponent,
    q8_exponent,
)


@triton.jit
def entry_row(table, entry, num_pages, per_page, pages):
    """Flat cache rows (int64) of entry numbers; absent entries (-1) and absent pages lead to the scratch page, the last one.

    Args:
        table: pointer to the row of the block table that belongs to the sequence, `num_pages` long. pages: of the cache.
    """
    present = entry >= 0
    at = tl.minimum(tl.where(present, entry, 0) // per_page, num_pages - 1)
    page = tl.load(table + at, mask=present, other=-1)
    scratch = tl.cast(pages - 1, tl.int64) * per_page
    return tl.where(present & (page >= 0), page.to(tl.int64) * per_page + entry % per_page, scratch)


@triton.jit
def load_kv(rows, rows16, at, seen, d, row_size, D, R, NATIVE: tl.constexpr):
    """Read KV rows as float32; rows that are not seen, and columns beyond D, are zero.

    Args:
        rows, rows16: the cache by bytes and by BF16 (NATIVE), or twice the same float cache.
        at: [n] int64 flat rows. seen: [n]. d: [DB] columns. row_size: elements of `rows` per row. R: rotary columns.
    """
    plain = D - R
    wanted = seen[:, None] & (d < D)[None, :]
    base = at[:, None] * row_size
    if NATIVE:
        is_plain = (d < plain)[None, :]
        code = tl.load(rows + base + d[None, :], mask=wanted & is_plain, other=0)
        # one scale serves 64 columns
        scale = tl.load(rows + base + (plain + 2 * R + d // 64)[None, :], mask=wanted & is_plain, other=127)
        rotary = tl.load(
            rows16 + at[:, None] * (row_size // 2) + (plain // 2 + d - plain)[None, :],
            mask=wanted & (d >= plain)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        return tl.where(is_plain, e4m3_value(code) * e8m0_value(scale), rotary)
    else:
        return tl.load(rows + base + d[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def q8_plain(value, d, plain, DB: tl.constexpr):
    """Round the plain columns of rows to FP8 in groups of 64 as a KV row stores them; the rotary columns pass.

    Shapes:
        value [n, DB] float32, DB a multiple of 64 -> rounded [n, DB], codes [n, DB] int32, exponents [n, DB / 64] int32
    """
    n: tl.constexpr = value.shape[0]
    is_plain = (d < plain)[None, :]
    # a last group shorter than 64 must not see rotary columns
    groups = tl.reshape(tl.where(is_plain, value, 0.0), (n, DB // 64, 64))
    exponent = q8_exponent(tl.max(tl.abs(groups), 2))
    scale = tl.expand_dims(e8m0_value(exponent), 2)
    inverse = tl.expand_dims(e8m0_inverse(exponent), 2)
    fitted = e4m3_round(tl.minimum(tl.maximum(groups * inverse, -448.0), 448.0))
    rounded = tl.reshape(fitted * scale, (n, DB))
    return tl.where(is_plain, rounded, value), tl.reshape(e4m3_code(fitted), (n, DB)), exponent


@triton.jit
def store_kv(rows, rows16, at, keep, value, d, row_size, D, R, NATIVE: tl.constexpr, DB: tl.constexpr):
    """Write KV rows [n, DB] float32 as the cache stores them, where `keep`; padding bytes become zero.

    Values that lie on the FP8 grid are stored exactly.
    """
    plain = D - R
    base = at[:, None] * row_size
    inside = keep[:, None] & (d < D)[None, :]
    if NATIVE:
        _, code, exponent = q8_plain(value, d, plain, DB)
        tl.store(rows + base + d[None, :], code.to(tl.uint8), mask=inside & (d < plain)[None, :])
        tl.store(
            rows16 + at[:, None] * (row_size // 2) + (plain // 2 + d - plain)[None, :],
            value.to(rows16.dtype.element_ty), mask=inside & (d >= plain)[None, :],
        )  # fmt: skip
        group = tl.arange(0, DB // 64)
        groups = (plain + 63) // 64
        first = plain + 2 * R
        tl.store(
            rows + base + (first + group)[None, :],
            exponent.to(tl.uint8),
            mask=keep[:, None] & (group < groups)[None, :],
        )
        pad = tl.arange(0, 8)[None, :]
        tl.store(
            rows + base + (first + groups) + pad, tl.zeros((1, 8), tl.uint8),
            mask=keep[:, None] & (first + groups + pad < row_size),
        )  # fmt: skip
    else:
        tl.store(rows + base + d[None, :], value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def load_index(keys, at, seen, e, row_size, E, NATIVE: tl.constexpr):
    """Read index keys as float32 [n, EB]: FP4 nibbles and their scales, or floats; zero where not seen."""
    wanted = seen[:, None] & (e < E)[None, :]
    base = at[:, None] * row_size
    if NATIVE:
        byte = tl.load(keys + base + (e // 2)[None, :], mask=wanted, other=0).to(tl.int32)
        code = (byte >> (4 * (e & 1))[None, :]) & 15
        scale = tl.load(keys + base + (E // 2 + e // 32)[None, :], mask=wanted, other=127)
        return e2m1_value(code) * e8m0_value(scale)
    else:
        return tl.load(keys + base + e[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def q4_groups(value, EB: tl.constexpr):
    """Round rows to FP4 in groups of 32.

    Shapes:
        value [n, EB] float32, EB a multiple of 32 -> rounded [n, EB], codes [n, EB] int32, exponents [n, EB / 32] int32
    """
    from_groups: tl.constexpr = (value.shape[0], EB)
    groups = tl.reshape(value, (value.shape[0], EB // 32, 32))
    exponent = q4_exponent(tl.max(tl.abs(groups), 2))
    scale = tl.expand_dims(e8m0_value(exponent), 2)
    inverse = tl.expand_dims(e8m0_inverse(exponent), 2)
    code = e2m1_code(tl.minimum(tl.maximum(groups * inverse, -6.0), 6.0))
    return tl.reshape(e2m1_value(code) * scale, from_groups), tl.reshape(code, from_groups), exponent


@triton.jit
def store_index(keys, at, keep, value, e, row_size, E, NATIVE: tl.constexpr, EB: tl.constexpr):
    """Write index keys [n, EB] float32 as the cache stores them, where `keep`."""
    base = at[:, None] * row_size
    if NATIVE:
        _, code, exponent = q4_groups(value, EB)
        low, high = tl.split(tl.reshape(code, (value.shape[0], EB // 2, 2)))
        half, group = tl.arange(0, EB // 2), tl.arange(0, EB // 32)
        tl.store(
            keys + base + half[None, :],
            (low | (high << 4)).to(tl.uint8),
            mask=keep[:, None] & (half < E // 2)[None, :],
        )
        tl.store(
            keys + base + (E // 2 + group)[None, :],
            exponent.to(tl.uint8),
            mask=keep[:, None] & (group < E // 32)[None, :],
        )
    else:
        tl.store(
            keys + base + e[None, :], value.to(keys.dtype.element_ty), mask=keep[:, None] & (e < E)[None, :]
        )


@triton.jit
def rotate_pairs(value, cos, sin, INVERSE: tl.constexpr, DB: tl.constexpr):
    """Rotate adjacent columns of rows [n, DB] by angles whose cosine and sine are [n, DB / 2] (1 and 0 where nothing turns)."""
    even, odd = tl.split(tl.reshape(value, (value.shape[0], DB // 2, 2)))
    if INVERSE:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (value.shape[0], DB))


@triton.jit
def table_angles(table, rows, valid, D, R, DB: tl.constexpr):
    """Cosines and sines [n, DB / 2] of rows of a RoPE table [T, R]: cosines first; 1 and 0 for pairs of plain columns."""
    pair = tl.arange(0, DB // 2) - (D - R) // 2
    turns = valid[:, None] & (pair >= 0)[None, :] & (pair < R // 2)[None, :]
    at = table + rows[:, None].to(tl.int64) * R + pair[None, :]
    return tl.load(at, mask=turns, other=1.0), tl.load(at + R // 2, mask=turns, other=0.0)


@triton.jit
def hadamard_rows(value, E, EB: tl.constexpr):
    """Rows [n, EB] times the Sylvester matrix of size E = EB, scaled by E**-0.5, in float32.

    One bit of the column per round: the lowest joins its partner and becomes the highest, so that after all rounds the bits
    are back in place. A matrix product would hold EB x EB signs in registers.
    """
    n: tl.constexpr = value.shape[0]
    rounds: tl.constexpr = EB.bit_length() - 1
    for _ in tl.static_range(rounds):
        even, odd = tl.split(tl.reshape(value, (n, EB // 2, 2)))
        value = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (n, EB))
    return value * tl.rsqrt(tl.cast(E, tl.float32))
