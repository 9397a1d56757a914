"""The choice of experts: scores in float32, the largest of them, and their weights."""

import triton
import triton.language as tl

from .numbers import arrive


@triton.jit
def root_softplus(x):
    """sqrt(softplus(x)); softplus is x itself above 20."""
    # log1p from log: what 1 + y loses of y comes back as a factor
    y = tl.exp(tl.minimum(x, 20.0))
    rounded = 1.0 + y
    log1p = tl.where(rounded == 1.0, y, tl.log(rounded) * (y / (rounded - 1.0)))
    return tl.sqrt(tl.where(x > 20.0, x, log1p))


@triton.jit
def store_choice(chosen, scores, ids, weights, rows, k, inside, CHOSEN: tl.constexpr, scale):
    """Store ids and weights of rows [BT], places k; weights are the chosen scores [BT, PLACES], summing to `scale`."""
    at = rows[:, None].to(tl.int64) * CHOSEN + k[None, :]
    total = tl.sum(scores, 1)[:, None]
    tl.store(ids + at, chosen, mask=inside)
    tl.store(weights + at, scores / total * scale, mask=inside)


@triton.jit
def choose(
    raw,
    bias,
    ids,
    weights,
    rows,
    valid,
    E,
    scale,
    CHOSEN: tl.constexpr,
    BT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The CHOSEN largest of score + bias per row of raw [BT, EXPERTS], ties to the lowest id, in descending order."""
    e = tl.arange(0, EXPERTS)
    score = root_softplus(raw)
    moved = score + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    # NaN sorts before everything, as in torch
    moved = tl.where(moved == moved, moved, float("inf"))
    free = (e < E)[None, :] & tl.full((BT, EXPERTS), 1, tl.int1)
    PLACES: tl.constexpr = triton.next_power_of_2(CHOSEN)
    k = tl.arange(0, PLACES)
    chosen = tl.zeros((BT, PLACES), tl.int32)
    scores = tl.zeros((BT, PLACES), tl.float32)
    for place in tl.static_range(CHOSEN):
        best = tl.max(tl.where(free, moved, float("-inf")), 1)
        first = tl.min(tl.where(free & (moved == best[:, None]), e[None, :], EXPERTS), 1)
        here = e[None, :] == first[:, None]
        found = tl.sum(tl.where(here, score, 0.0), 1)
        chosen = tl.where((k == place)[None, :], first[:, None], chosen)
        scores = tl.where((k == place)[None, :], found[:, None], scores)
        free = free & (e[None, :] != first[:, None])
    inside = valid[:, None] & (k < CHOSEN)[None, :]
    store_choice(chosen, scores, ids, weights, rows, k, inside, CHOSEN, scale)


@triton.jit
def route_kernel(
    u, row_stride, gate, bias, ids, weights, parts, counters, T, E, N, span, scale,
    CHOSEN: tl.constexpr, SPLIT: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (t, e, s) sums columns s * span .. of a tile of products u gate^T; whoever comes last for its tokens chooses.

    Shapes:
        u [T, N], gate [E, N], bias [E], parts [SPLIT, T, EXPERTS] float32 -> ids, weights [T, CHOSEN]
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    here = tl.program_id(1) * BE + tl.arange(0, BE)
    s, valid = tl.program_id(2), rows < T
    token, expert = tl.minimum(rows, T - 1), tl.minimum(here, E - 1)
    acc = tl.zeros((BT, BE), tl.float32)
    for k0 in range(s * span, tl.minimum(N, (s + 1) * span), BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(
            u + token[:, None].to(tl.int64) * row_stride + k[None, :], mask=(k < N)[None, :], other=0.0
        )
        w = tl.load(gate + expert[None, :].to(tl.int64) * N + k[:, None], mask=(k < N)[:, None], other=0.0)
        # each tile's sum leaves the tensor core: choices must not depend on how long it keeps float32
        if OPERAND == tl.float32:
            acc += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(x, w)
    size = tl.cast(T, tl.int64) * EXPERTS
    at = rows[:, None].to(tl.int64) * EXPERTS + here[None, :]
    tl.store(parts + s * size + at, acc, mask=valid[:, None] & (here < EXPERTS)[None, :])
    if arrive(counters + tl.program_id(0), tl.num_programs(1) * SPLIT):
        raw = tl.zeros((BT, EXPERTS), tl.float32)
        every = tl.arange(0, EXPERTS)
        whole = rows[:, None].to(tl.int64) * EXPERTS + every[None, :]
        for part in range(SPLIT):
            raw += tl.load(parts + part * size + whole, mask=valid[:, None] & (every < E)[None, :], other=0.0)
        choose(raw, bias, ids, weights, rows, valid, E, scale, CHOSEN, BT, EXPERTS)


@triton.jit
def route_hash_kernel(
    u, row_stride, gate, table, token_ids, ids, weights, T, N, scale,
    CHOSEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BT tokens per program: experts from the table [V, CHOSEN], scores from their rows of the gate alone."""
    PLACES: tl.constexpr = triton.next_power_of_2(CHOSEN)
    k = tl.arange(0, PLACES)
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    valid = rows < T
    inside = valid[:, None] & (k < CHOSEN)[None, :]
    token = tl.load(token_ids + rows, mask=valid, other=0).to(tl.int64)
    chosen = tl.load(table + token[:, None] * CHOSEN + k[None, :], mask=inside, other=0).to(tl.int32)
    x = u + rows.to(tl.int64) * row_stride
    w = gate + chosen.to(tl.int64) * N
    acc = tl.zeros((BT, PLACES, BK), tl.float32)
    for k0 in range(0, N, BK):
        column = k0 + tl.arange(0, BK)
        row = tl.load(x[:, None] + column[None, :], mask=valid[:, None] & (column < N)[None, :], other=0.0)
        column = column[None, None, :]
        weight = tl.load(w[:, :, None] + column, mask=inside[:, :, None] & (column < N), other=0.0)
        acc += weight.to(tl.float32) * row.to(tl.float32)[:, None, :]
    score = tl.where((k < CHOSEN)[None, :], root_softplus(tl.sum(acc, 2)), 0.0)
    store_choice(chosen, score, ids, weights, rows, k, inside, CHOSEN, scale)
