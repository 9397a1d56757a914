"""Hyper-connections: the first kernels write streams back and sum what the mixes need, the last makes the mixes and collapses.

Between them lie the parts [T, S, ROW] float32: of every token and of every run of columns, the sums of fn row times streams,
and behind them the sum of squares.
"""

import triton
import triton.language as tl


@triton.jit
def _load_streams(x, at, stride, inside, M: tl.constexpr):
    """The tiles of M streams, `stride` apart, as a tuple of what is stored."""
    tiles = ()
    for j in tl.static_range(M):
        tiles += (tl.load(x + at + j * stride, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _written_back(y, tiles, post, comb, rows, valid, TO: tl.constexpr, M: tl.constexpr):
    """post[k] * y + sum over j of comb[j, k] * stream j, for every k, rounded to what is stored."""
    made = ()
    for k in tl.static_range(M):
        mixed = tl.full(y.shape, 0.0, tl.float32)
        for j in tl.static_range(M):
            factor = tl.load(comb + (rows * M + j) * M + k, mask=valid, other=0.0)
            mixed += factor[:, None] * tiles[j].to(tl.float32)
        # last, as the reference adds: the fewest values fall to the other side of a rounding
        mixed += tl.load(post + rows * M + k, mask=valid, other=0.0)[:, None] * y
        made += (mixed.to(TO),)
    return made


@triton.jit
def streams_kernel(
    y, y_stride, x, post, comb, streams, fn, parts, T, N,
    M: tl.constexpr, WRITE: tl.constexpr, COUNT: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (t, s) takes columns s * BN .. (s + 1) * BN of BM tokens, in all M streams.

    WRITE: streams = x written back with y [T, N], post [T, M] and comb [T, M, M]; else they are x as it is. COUNT: rows of
    fn [COUNT, M * N] to multiply with a single token (BM == 1), on no tensor core; 0 for none.
    """
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    valid = rows < T
    f = tl.arange(0, ROW)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = valid[:, None] & (n < N)[None, :]
    at = rows[:, None] * (M * N) + n[None, :]
    if COUNT > 0:
        weights = _load_streams(
            fn, f[:, None] * (M * N) + n[None, :], N, (f < COUNT)[:, None] & (n < N)[None, :], M
        )
        # nobody waits here; but without it the compiler asks for the weights, which take longest, after all else
        tl.debug_barrier()
    tiles = _load_streams(x, at, N, inside, M)
    if WRITE:
        added = tl.load(y + rows[:, None] * y_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tiles = _written_back(added, tiles, post, comb, rows, valid, x.dtype.element_ty, M)
        for k in tl.static_range(M):
            tl.store(streams + at + k * N, tiles[k], mask=inside)
    if COUNT > 0:
        sums = tl.full((ROW, BN), 0.0, tl.float32)
        squares = tl.full((BM, BN), 0.0, tl.float32)
        for k in tl.static_range(M):
            # from the streams as stored
            value = tiles[k].to(tl.float32)
            squares += value * value
            sums += weights[k].to(tl.float32) * value
        made = tl.where(f == COUNT, tl.sum(squares, 1), tl.sum(sums, 1))
        place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROW
        tl.store(parts + place + f, made, mask=f <= COUNT)


@triton.jit
def sums_kernel(
    x, fn, parts, T, K, span, COUNT: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """The parts of many tokens: x [T, K] @ fn [COUNT, K].T; program (t, s) sums columns s * span .. (s + 1) * span."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    valid = rows < T
    f = tl.arange(0, ROW)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, K)
    sums = tl.full((BM, ROW), 0.0, tl.float32)
    squares = tl.full((BM, BK), 0.0, tl.float32)
    for k0 in range(first, last, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < last
        value = tl.load(x + rows[:, None] * K + k[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        value = value.to(tl.float32)
        weight = tl.load(
            fn + f[None, :] * K + k[:, None], mask=(f < COUNT)[None, :] & inside[:, None], other=0.0
        )
        # three TF32 products are as good as float32; choosing rows makes the sum leave the tensor core, which truncates
        # where it accumulates
        product = tl.dot(value, weight.to(tl.float32), input_precision="tf32x3")
        sums += tl.where(valid[:, None], product, 0.0)
        squares += value * value
    sums = tl.where((f == COUNT)[None, :], tl.sum(squares, 1)[:, None], sums)
    place = (rows * tl.num_programs(1) + tl.program_id(1))[:, None] * ROW + f[None, :]
    tl.store(parts + place, sums, mask=valid[:, None] & (f <= COUNT)[None, :])


@triton.jit
def _load_parts(parts, rows, valid, columns, wanted, splits, SP: tl.constexpr, ROW: tl.constexpr):
    """Columns [C] of the parts of rows [B]: [B, SP, C], zero where there is none. The squares are a column like others: as a
    tile of two dimensions, Triton 3.6 would have every thread load all of them.
    """
    s = tl.arange(0, SP)
    at = ((rows[:, None] * splits + s[None, :]) * ROW)[:, :, None] + columns[None, None, :]
    inside = (valid[:, None] & (s < splits)[None, :])[:, :, None] & wanted[None, None, :]
    return tl.load(parts + at, mask=inside, other=0.0)


@triton.jit
def _sinkhorn(logits, iterations, eps, M: tl.constexpr, MP: tl.constexpr):
    """Push [B, MP, MP], of which [M, M] counts, towards doubly stochastic; see `v4sdk.ops.hyper_connection.sinkhorn`."""
    i = tl.arange(0, MP)
    source, destination = (i < M)[None, :, None], (i < M)[None, None, :]
    # what does not count is zero, and is divided by one
    row_eps = eps + tl.where(source, 0.0, 1.0)
    column_eps = eps + tl.where(destination, 0.0, 1.0)
    logits = tl.where(destination, logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    c = tl.where(source & destination, e / tl.sum(e, 2)[:, :, None] + eps, 0.0)
    c = c / (tl.sum(c, 1)[:, None, :] + column_eps)
    for _ in range(iterations - 1):
        c = c / (tl.sum(c, 2)[:, :, None] + row_eps)
        c = c / (tl.sum(c, 1)[:, None, :] + column_eps)
    return c


@triton.jit
def _mixes_of_tokens(
    first, parts, base, scale, post, comb, T, width, splits, iterations, norm_eps, hc_eps,
    M: tl.constexpr, MP: tl.constexpr, COUNT: tl.constexpr, SP: tl.constexpr, ROW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """post and comb of BT tokens."""
    rows = (first + tl.arange(0, BT)).to(tl.int64)
    valid = rows < T
    m, c = tl.arange(0, MP), tl.arange(0, MP * MP)
    j, k = c // MP, c % MP
    wanted, place = (j < M) & (k < M), 2 * M + j * M + k
    last = COUNT + tl.arange(0, 1)
    # all loads come before the first sum: each sum over threads ends what may overlap
    square_parts = _load_parts(parts, rows, valid, last, last == COUNT, splits, SP, ROW)
    comb_parts = _load_parts(parts, rows, valid, place, wanted, splits, SP, ROW)
    post_parts = _load_parts(parts, rows, valid, M + m, m < M, splits, SP, ROW)
    comb_base = tl.load(base + place, mask=wanted, other=0.0)[None, :]
    post_base = tl.load(base + M + m, mask=m < M, other=0.0)[None, :]
    post_scale, comb_scale = tl.load(scale + 1), tl.load(scale + 2)
    factor = tl.rsqrt(tl.sum(square_parts, 1) / width + norm_eps)
    logits = tl.sum(comb_parts, 1) * factor * comb_scale + comb_base
    weight = tl.sum(post_parts, 1) * factor * post_scale + post_base
    inside = valid[:, None] & (m < M)[None, :]
    tl.store(post + rows[:, None] * M + m[None, :], 2.0 / (1.0 + tl.exp(-weight)), mask=inside)
    made = _sinkhorn(tl.reshape(logits, (BT, MP, MP)), iterations, hc_eps, M, MP)
    at = (rows[:, None, None] * M + m[None, :, None]) * M + m[None, None, :]
    tl.store(comb + at, made, mask=inside[:, :, None] & (m < M)[None, None, :])


@triton.jit
def _collapse(
    first, x, parts, base, scale, gain, u, T, N, splits, norm_eps, hc_eps,
    M: tl.constexpr, MP: tl.constexpr, COUNT: tl.constexpr, NORM: tl.constexpr, SP: tl.constexpr, ROW: tl.constexpr,
    BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u = sum over j of pre[j] * x[:, j] of BC tokens, normalised where NORM."""
    rows = (first + tl.arange(0, BC)).to(tl.int64)
    valid = rows < T
    m, n = tl.arange(0, MP), tl.arange(0, BLOCK)
    inside = valid[:, None] & (n < N)[None, :]
    at = (rows[:, None] * M + m[None, :])[:, :, None] * N + n[None, None, :]
    last = COUNT + tl.arange(0, 1)
    # all loads come before the first sum: each sum over threads ends what may overlap
    tiles = tl.load(x + at, mask=inside[:, None, :] & (m < M)[None, :, None], other=0.0)
    square_parts = _load_parts(parts, rows, valid, last, last == COUNT, splits, SP, ROW)
    mix_parts = _load_parts(parts, rows, valid, m, m < M, splits, SP, ROW)
    shift, factor = tl.load(base + m, mask=m < M, other=0.0)[None, :], tl.load(scale)
    if NORM:
        weight = tl.load(gain + n, mask=n < N, other=0.0)
    factor = tl.rsqrt(tl.sum(square_parts, 1) / (M * N) + norm_eps) * factor
    pre = 1.0 / (1.0 + tl.exp(-(tl.sum(mix_parts, 1) * factor + shift))) + hc_eps
    row = tl.sum(pre[:, :, None] * tiles.to(tl.float32), 1).to(u.dtype.element_ty)
    if NORM:
        wide = row.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / N + norm_eps)[:, None]
        row = (wide * factor * weight.to(tl.float32)[None, :]).to(u.dtype.element_ty)
    tl.store(u + rows[:, None] * N + n[None, :], row, mask=inside)


@triton.jit
def finish_kernel(
    x, parts, base, scale, gain, u, post, comb, T, N, splits, groups, iterations, norm_eps, hc_eps,
    M: tl.constexpr, MP: tl.constexpr, COUNT: tl.constexpr, NORM: tl.constexpr, SP: tl.constexpr, ROW: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the parts to the results. The first `groups` programs make post [T, M] and comb [T, M, M] of BT tokens each, as they
    take longest; then each collapses the streams x [T, M, N] of BC tokens to u [T, N].
    """
    program = tl.program_id(0)
    # the output head has no matrices, so that their code is left out
    if COUNT > M:
        if program < groups:
            _mixes_of_tokens(
                program * BT, parts, base, scale, post, comb, T, M * N, splits, iterations, norm_eps, hc_eps,
                M, MP, COUNT, SP, ROW, BT,
            )  # fmt: skip
    if program >= groups:
        _collapse(
            (program - groups) * BC, x, parts, base, scale, gain, u, T, N, splits, norm_eps, hc_eps,
            M, MP, COUNT, NORM, SP, ROW, BC, BLOCK,
        )  # fmt: skip
