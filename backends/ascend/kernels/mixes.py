"""Hyper-connections: from the products of the streams to the three mixes, the last of them by Sinkhorn's iteration."""

import triton
import triton.language as tl


@triton.jit
def _doubly_stochastic(c, iterations, eps, M: tl.constexpr, MP: tl.constexpr):
    """Push [BT, MP, MP], of which [M, M] counts, towards doubly stochastic; see `v4sdk.ops.hyper_connection.sinkhorn`."""
    i = tl.arange(0, MP)
    source, destination = i[None, :, None] < M, i[None, None, :] < M
    row_eps = eps
    column_eps = eps
    if M < MP:
        # what does not count is zero, and is divided by one; without padding, which V4 does not need, nothing is selected,
        # for a choice within so short an axis becomes a loop over it
        row_eps = eps + tl.where(source, 0.0, 1.0)
        column_eps = eps + tl.where(destination, 0.0, 1.0)
        c = tl.where(destination, c, float("-inf"))
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + eps
    if M < MP:
        c = tl.where(source & destination, c, 0.0)
    c = c / (tl.sum(c, 1)[:, None, :] + column_eps)
    for _ in range(iterations - 1):
        c = c / (tl.sum(c, 2)[:, :, None] + row_eps)
        c = c / (tl.sum(c, 1)[:, None, :] + column_eps)
    return c


@triton.jit
def mixes_kernel(
    products, mean_square, base, scale, pre, post, comb, tokens, iterations, norm_eps, hc_eps,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From products [tokens, (2 + M) * M] and mean_square [tokens] to pre, post [tokens, M] and comb [tokens, M, M].

    All float32. mix = products * rsqrt(mean_square + norm_eps), split in M, M and M * M columns, each with its number of
    scale [3] and its part of base; see `hc_pre`. Program p takes BT tokens at p * BT, (p + programs) * BT, ..; MP >= M is a
    power of two.
    """
    m = tl.arange(0, MP)
    column = (m < M)[None, :]
    square = (m < M)[None, :, None] & (m < M)[None, None, :]
    place = m[None, :, None] * M + m[None, None, :]
    pre_scale, post_scale, comb_scale = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
    pre_base = tl.load(base + m, mask=m < M, other=0.0)[None, :]
    post_base = tl.load(base + M + m, mask=m < M, other=0.0)[None, :]
    comb_base = tl.load(base + 2 * M + place, mask=square, other=0.0)
    for first in range(tl.program_id(0) * BT, tokens, tl.num_programs(0) * BT):
        t = first + tl.arange(0, BT)
        row, valid = t.to(tl.int64), t < tokens
        factor = tl.rsqrt(tl.load(mean_square + row, mask=valid, other=1.0) + norm_eps)
        at, inside = products + row[:, None] * ((2 + M) * M) + m[None, :], valid[:, None] & column
        to = row[:, None] * M + m[None, :]
        mix = tl.load(at, mask=inside, other=0.0) * factor[:, None] * pre_scale + pre_base
        tl.store(pre + to, 1.0 / (1.0 + tl.exp(-mix)) + hc_eps, mask=inside)
        mix = tl.load(at + M, mask=inside, other=0.0) * factor[:, None] * post_scale + post_base
        tl.store(post + to, 2.0 / (1.0 + tl.exp(-mix)), mask=inside)

        wanted = valid[:, None, None] & square
        at_square = products + row[:, None, None] * ((2 + M) * M) + 2 * M + place
        mix = tl.load(at_square, mask=wanted, other=0.0) * factor[:, None, None] * comb_scale + comb_base
        mixed = _doubly_stochastic(mix, iterations, hc_eps, M, MP)
        tl.store(comb + row[:, None, None] * (M * M) + place, mixed, mask=wanted)
