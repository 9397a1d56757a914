"""From logits to one token per row, by integers: a draw does not depend on the order in which anything is added.

A row is dealt out to programs in chunks. Probabilities are integers of 2**-44 of the likeliest, so their sums are exact, and
whatever is less likely than that is never drawn. Elements are put into buckets by their distance from the largest, which
keeps their order between buckets; within the one bucket that a search ends in, it goes on by halves.
"""

import triton
import triton.language as tl

from .numbers import arrive
from .select import LARGEST, order_key, order_value, ranked, ranked_key, ranked_number

NO_RANK = tl.constexpr(-(1 << 63))
# probability one
WHOLE = tl.constexpr(float(1 << 44))
# 64 to a factor of e; 44 bits end in the 1952nd
BUCKETS = tl.constexpr(2048)


@triton.jit
def summary(largest, sums, t, chunks, BC: tl.constexpr):
    """Largest logit of row t, and log of the sum of exponentials of all less that one, from those of its chunks."""
    c = tl.arange(0, BC)
    m = tl.load(largest + t * chunks + c, mask=c < chunks, other=float("-inf"))
    s = tl.load(sums + t * chunks + c, mask=c < chunks, other=0.0)
    top = tl.max(m, 0)
    return top, tl.log(tl.sum(tl.where(m == float("-inf"), 0.0, s * tl.exp(m - top)), 0))


@triton.jit
def best_of(bests, t, chunks, BC: tl.constexpr):
    """The best rank of row t, from those of its chunks."""
    c = tl.arange(0, BC)
    return tl.max(tl.load(bests + t * chunks + c, mask=c < chunks, other=NO_RANK), 0)


@triton.jit
def logits_of(logits, logits_stride, t, v, V):
    """Entries v of row t, float32; -inf outside."""
    at = logits + t.to(tl.int64) * logits_stride + v
    return tl.load(at, mask=v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def biased(x, bias, bias_stride, t, v, V):
    """Entries v of row t with their bias, where there is one."""
    if bias is not None:
        x += tl.load(bias + t.to(tl.int64) * bias_stride + v, mask=v < V, other=0.0).to(tl.float32)
    return x


@triton.jit
def choose(ids, logprobs, logits, logits_stride, t, chosen, top, log_sum):
    """Write one row's result."""
    x = tl.load(logits + t.to(tl.int64) * logits_stride + chosen).to(tl.float32)
    tl.store(ids + t, chosen.to(tl.int64))
    tl.store(logprobs + t, x - top - log_sum)


@triton.jit
def stats_kernel(
    logits, logits_stride, bias, bias_stride, largest, sums, bests, ids, logprobs, counts, masses, kept, counters, V,
    GREEDY: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What is known of chunk c of row t, by program (c, t): largest logit, sum of exponentials, best rank, each [T, chunks].

    Where `GREEDY`, the row's last program takes the best; else its first one clears the sums of `bucket_kernel`.
    """
    c, t, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    v = c * CHUNK + tl.arange(0, CHUNK)
    x = logits_of(logits, logits_stride, t, v, V)
    z = biased(x, bias, bias_stride, t, v, V)
    m = tl.max(x, 0)
    total = tl.sum(tl.where(v < V, tl.exp(x - tl.where(m == float("-inf"), 0.0, m)), 0.0), 0)
    tl.store(largest + t * chunks + c, m)
    tl.store(sums + t * chunks + c, total)
    tl.store(bests + t * chunks + c, tl.max(tl.where(v < V, ranked(order_key(z), v), NO_RANK), 0))
    if GREEDY:
        if arrive(counters + t, chunks):
            top, log_sum = summary(largest, sums, t, chunks, BC)
            chosen = ranked_number(best_of(bests, t, chunks, BC))
            choose(ids, logprobs, logits, logits_stride, t, chosen, top, log_sum)
    elif c == 0:
        bucket = tl.arange(0, BUCKETS)
        tl.store(counts + t * BUCKETS + bucket, tl.zeros((BUCKETS,), tl.int32))
        tl.store(masses + t * BUCKETS + bucket, tl.zeros((BUCKETS,), tl.int64))
        tl.store(kept + t, tl.cast(0, tl.int64))


@triton.jit
def top_kernel(
    logits, logits_stride, largest, sums, ranks, top_ids, top_logprobs, counters, V, num_top,
    CHUNK: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The `num_top` largest log-probabilities of every row, falling, the lowest id first among equals.

    Program (c, t) leaves those of its chunk in `ranks` [T, chunks, num_top]; the row's last one chooses among them.
    """
    c, t, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    v = c * CHUNK + tl.arange(0, CHUNK)
    top, log_sum = summary(largest, sums, t, chunks, BC)
    x = logits_of(logits, logits_stride, t, v, V)
    rank = tl.where(v < V, ranked(order_key(x - top - log_sum), v), NO_RANK)
    mine = ranks + (t * chunks + c) * num_top
    for i in range(num_top):
        best = tl.max(rank, 0)
        tl.store(mine + i, best)
        rank = tl.where(rank == best, NO_RANK, rank)
    if arrive(counters + t, chunks):
        at = tl.arange(0, BR)
        left = tl.load(ranks + t * chunks * num_top + at, mask=at < chunks * num_top, other=NO_RANK)
        for i in range(num_top):
            best = tl.max(left, 0)
            tl.store(top_ids + t * num_top + i, ranked_number(best).to(tl.int64))
            tl.store(top_logprobs + t * num_top + i, order_value(ranked_key(best)))
            left = tl.where(left == best, NO_RANK, left)


@triton.jit
def mass_of(scaled, top):
    """exp(scaled - top) as an integer, 0 where that is no number."""
    e = tl.exp(scaled - top)
    return (tl.where(e <= 1.0, e, 0.0) * WHOLE).to(tl.int64)


@triton.jit
def bucket_of(scaled, top):
    """The bucket of what has a mass."""
    return tl.minimum((top - scaled) * 64.0, BUCKETS - 1.0).to(tl.int32)


@triton.jit
def bucket_kernel(
    logits, logits_stride, bias, bias_stride, temperature, min_p, largest, sums, bests, counts, masses, kept, counters, V,
    CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Per row, how many elements lie before each bucket (counts), and the mass up to its end (masses): [T, BUCKETS].

    Also the mass of what `min_p` keeps, kept [T]. Rows of temperature 0 are left alone.
    """
    c, t, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    heat = tl.load(temperature + t)
    if heat > 0:
        v = c * CHUNK + tl.arange(0, CHUNK)
        z = biased(logits_of(logits, logits_stride, t, v, V), bias, bias_stride, t, v, V)
        top = tl.div_rn(order_value(ranked_key(best_of(bests, t, chunks, BC))), heat)
        scaled = tl.div_rn(z, heat)
        mass = mass_of(scaled, top)
        bucket = t * BUCKETS + bucket_of(scaled, top)
        tl.atomic_add(counts + bucket, 1, mask=mass > 0, sem="relaxed")
        tl.atomic_add(masses + bucket, mass, mask=mass > 0, sem="relaxed")
        least = (tl.load(min_p + t) * WHOLE).to(tl.int64)
        tl.atomic_add(kept + t, tl.sum(tl.where(mass >= least, mass, 0), 0), sem="relaxed")
        if arrive(counters + t, chunks):
            every = t * BUCKETS + tl.arange(0, BUCKETS)
            count = tl.load(counts + every)
            tl.store(counts + every, tl.cumsum(count, 0) - count)
            tl.store(masses + every, tl.cumsum(tl.load(masses + every), 0))


@triton.jit
def find(keys, ids, counts, masses, want, top, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of a row, by falling key and rising id, up to which there are `want` elements (or that much mass).

    Args:
        keys, ids: of the row, bucket after bucket. counts, masses: up to the end of each bucket.

    Returns:
        its id int32, and the mass up to it
    """
    all_buckets = tl.arange(0, BUCKETS)
    if COUNT:
        reached = tl.load(counts + all_buckets).to(tl.int64)
    else:
        reached = tl.load(masses + all_buckets)
    bucket = tl.minimum(tl.sum((reached < want).to(tl.int32), 0), BUCKETS - 1)
    start = tl.load(counts + bucket - 1, mask=bucket > 0, other=0)
    end = tl.load(counts + bucket)
    mass_before = tl.load(masses + bucket - 1, mask=bucket > 0, other=0)
    want -= start.to(tl.int64) if COUNT else mass_before
    # the largest key that enough lies at or above
    low = tl.load(keys + start)
    high, none = low, tl.cast(0, tl.int64)
    for i in range(start, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < end, other=low)
        low, high = tl.minimum(low, tl.min(key, 0)), tl.maximum(high, tl.max(key, 0))
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        have = none
        for i in range(start, end, BLOCK):
            at = i + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < end, other=0)
            weight = (at < end).to(tl.int64) if COUNT else mass_of(order_value(key), top)
            have += tl.sum(tl.where((at < end) & (key >= middle), weight, 0), 0)
        low, high = tl.where(have >= want, middle, low), tl.where(have >= want, high, middle - 1)
    # of those that equal it, the one by lowest id that is enough
    above, mass_above, alike = none, none, none
    first, last = tl.cast(LARGEST, tl.int32), tl.cast(0, tl.int32)
    for i in range(start, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        key = tl.load(keys + at, mask=at < end, other=0)
        number = tl.load(ids + at, mask=at < end, other=0)
        equal, larger = (at < end) & (key == low), (at < end) & (key > low)
        above += tl.sum(larger.to(tl.int64), 0)
        mass_above += tl.sum(tl.where(larger, mass_of(order_value(key), top), 0), 0)
        alike += tl.sum(equal.to(tl.int64), 0)
        first = tl.minimum(first, tl.min(tl.where(equal, number, LARGEST), 0))
        last = tl.maximum(last, tl.max(tl.where(equal, number, 0), 0))
    mass = mass_of(order_value(low), top)
    want -= above if COUNT else mass_above
    # a division, without the call that one of 64 bits is
    nth = none + 1
    while nth < alike:
        half_way = (nth + alike) >> 1
        enough = (half_way if COUNT else half_way * mass) >= want
        nth, alike = tl.where(enough, nth, half_way + 1), tl.where(enough, half_way, alike)
    while first < last:
        half = (first + last) // 2
        found = none
        for i in range(start, end, BLOCK):
            at = i + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < end, other=0)
            number = tl.load(ids + at, mask=at < end, other=0)
            found += tl.sum(((at < end) & (key == low) & (number <= half)).to(tl.int64), 0)
        first, last = tl.where(found >= nth, first, half + 1), tl.where(found >= nth, half, last)
    return first, mass_before + mass_above + nth * mass


@triton.jit
def share(total, fraction, UP: tl.constexpr):
    """total * fraction as an integer, for 0 <= total < 2**62 and a float32 fraction below one of steps of 2**-31."""
    part = (fraction * 2147483648.0).to(tl.int64)
    low = (total & LARGEST) * part
    if UP:
        low += LARGEST
    return (total >> 31) * part + (low >> 31)


@triton.jit
def draw_kernel(
    logits, logits_stride, bias, bias_stride, temperature, top_k, top_p, min_p, uniform, largest, sums, bests, counts, masses,
    kept, keys, numbers, ids, logprobs, counters, V,
    CHUNK: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put every element with a mass into its bucket, keys and numbers [T, V]; a row's last program draws from them.

    The order inside a bucket is that of arrival; a search there asks only for keys and ids.
    """
    c, t, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    heat = tl.load(temperature + t)
    top_logit, log_sum = summary(largest, sums, t, chunks, BC)
    best = best_of(bests, t, chunks, BC)
    if heat > 0:
        v = c * CHUNK + tl.arange(0, CHUNK)
        z = biased(logits_of(logits, logits_stride, t, v, V), bias, bias_stride, t, v, V)
        top = tl.div_rn(order_value(ranked_key(best)), heat)
        scaled = tl.div_rn(z, heat)
        live = mass_of(scaled, top) > 0
        counts += t * BUCKETS
        masses += t * BUCKETS
        keys += t.to(tl.int64) * V
        numbers += t.to(tl.int64) * V
        at = tl.atomic_add(counts + bucket_of(scaled, top), 1, mask=live, sem="relaxed")
        tl.store(keys + at, order_key(scaled), mask=live)
        tl.store(numbers + at, v, mask=live)
        if arrive(counters + t, chunks):
            chosen = ranked_number(best)
            rest, number = tl.load(masses + BUCKETS - 1), tl.load(counts + BUCKETS - 1)
            # no mass at all: something was not a number
            if rest > 0:
                k, p = tl.load(top_k + t), tl.load(top_p + t)
                if (k > 0) & (k < number):
                    chosen, rest = find(keys, numbers, counts, masses, k.to(tl.int64), top, True, BLOCK)
                if p < 1:
                    want = tl.maximum(share(rest, p, True), 1)
                    chosen, rest = find(keys, numbers, counts, masses, want, top, False, BLOCK)
                # what min_p keeps, and what the others keep, are both the first of the row
                rest = tl.minimum(rest, tl.load(kept + t))
                want = tl.minimum(share(rest, tl.load(uniform + t), False) + 1, rest)
                chosen, rest = find(keys, numbers, counts, masses, want, top, False, BLOCK)
            choose(ids, logprobs, logits, logits_stride, t, chosen, top_logit, log_sum)
    elif c == 0:
        choose(ids, logprobs, logits, logits_stride, t, ranked_number(best), top_logit, log_sum)


@triton.jit
def feed_kernel(drawn, token_ids, positions, T, BLOCK: tl.constexpr):
    """token_ids = drawn, positions += 1, all [T]."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(token_ids + t, tl.load(drawn + t, mask=t < T), mask=t < T)
    tl.store(positions + t, tl.load(positions + t, mask=t < T) + 1, mask=t < T)
