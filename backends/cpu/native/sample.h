// From logits to one token per row. Included inside the level's namespace.

constexpr std::int64_t kSlice = 4096;  // entries summed together: fixed, so that the sum does not depend on the team

struct Slice {
    float largest, biased;   // of logits, of logits + bias
    std::int64_t best;       // first place of `biased`
    double sum;              // of exp(logits - largest of the row), set in the second phase
    double biased_sum;
};

struct SampleLayout {
    Arena arena;
    std::int64_t slices;
    Slice* parts;      // [T, slices]
    Ranked* ranked;    // [team, V]
    SampleLayout(const SampleCall& c, std::uintptr_t base, int threads) : arena(base) {
        slices = (c.vocab + kSlice - 1) / kSlice;
        parts = arena.take<Slice>(c.tokens * slices);
        ranked = arena.take<Ranked>(c.temperature || c.top ? c.vocab * threads : 0);
    }
};

// sum of exp(factor * (x + bias) - shift) over a slice
static double exponentials(const float* x, const float* bias, std::int64_t n, float divisor, float shift) {
    double total = 0;
    alignas(64) float block[kBlock];
    for (std::int64_t first = 0; first < n; first += kBlock) {
        const std::int64_t count = n - first < kBlock ? n - first : kBlock;
        for (std::int64_t i = 0; i < count; i++) block[i] = (bias ? x[first + i] + bias[first + i] : x[first + i]) / divisor - shift;
        for (std::int64_t i = count; i < kBlock; i++) block[i] = -200.0f;
        F part = set(0);
        for (int i = 0; i < kBlock; i += W) {
            const F v = load(block + i);
            store(block + i, exponential(v));
        }
        // beyond the range of `exponential` nothing is left
        for (std::int64_t i = 0; i < count; i++)
            if (((bias ? x[first + i] + bias[first + i] : x[first + i]) / divisor - shift) < -87.0f) block[i] = 0;
        for (int i = 0; i < kBlock; i += W) part = part + load(block + i);
        // the places that pad the last block are e**-87 each
        total += static_cast<double>(sum(part));
    }
    return total;
}

static void sample(const void* arguments, const Team& team) {
    const SampleCall& c = *static_cast<const SampleCall*>(arguments);
    const SampleLayout at(c, workspace(), team.size);
    const Span mine = share(c.tokens * at.slices, team);
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / at.slices, first = unit % at.slices * kSlice;
        const std::int64_t n = c.vocab - first < kSlice ? c.vocab - first : kSlice;
        const float *x = c.logits + t * c.vocab + first, *bias = c.bias ? c.bias + t * c.vocab + first : nullptr;
        Slice found{x[0], 0, first, 0, 0};
        for (std::int64_t i = 1; i < n; i++) found.largest = x[i] > found.largest ? x[i] : found.largest;
        found.biased = bias ? x[0] + bias[0] : x[0];
        for (std::int64_t i = 1; i < n; i++) {
            const float z = bias ? x[i] + bias[i] : x[i];
            if (z > found.biased) {
                found.biased = z;
                found.best = first + i;
            }
        }
        at.parts[unit] = found;
    }
    team.barrier();
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / at.slices, first = unit % at.slices * kSlice;
        const std::int64_t n = c.vocab - first < kSlice ? c.vocab - first : kSlice;
        const Slice* row = at.parts + t * at.slices;
        float largest = row[0].largest, biased = row[0].biased;
        for (std::int64_t k = 1; k < at.slices; k++) {
            largest = row[k].largest > largest ? row[k].largest : largest;
            biased = row[k].biased > biased ? row[k].biased : biased;
        }
        const float *x = c.logits + t * c.vocab + first, *bias = c.bias ? c.bias + t * c.vocab + first : nullptr;
        at.parts[unit].sum = exponentials(x, nullptr, n, 1.0f, largest);
        if (c.temperature && c.temperature[t] > 0)
            at.parts[unit].biased_sum = exponentials(x, bias, n, c.temperature[t], biased / c.temperature[t]);
    }
    team.barrier();
    const Span rows = share(c.tokens, team);
    for (std::int64_t t = rows.begin; t < rows.end; t++) {
        const Slice* parts = at.parts + t * at.slices;
        const float *x = c.logits + t * c.vocab, *bias = c.bias ? c.bias + t * c.vocab : nullptr;
        Slice found = parts[0];
        for (std::int64_t k = 1; k < at.slices; k++) {
            found.sum += parts[k].sum;
            found.biased_sum += parts[k].biased_sum;
            found.largest = parts[k].largest > found.largest ? parts[k].largest : found.largest;
            if (parts[k].biased > found.biased) {
                found.biased = parts[k].biased;
                found.best = parts[k].best;
            }
        }
        const float log_sum = static_cast<float>(__builtin_log(found.sum));
        std::int64_t chosen = found.best;
        Ranked* ranked = at.ranked + team.rank * c.vocab;
        if (c.temperature && c.temperature[t] > 0) {
            // 2**-24 is the finest uniform: what lies 40 below the top cannot be drawn
            const float divisor = c.temperature[t], least = found.biased / divisor - 40.0f;
            std::int64_t count = 0;
            for (std::int64_t i = 0; i < c.vocab; i++) {
                const float z = (bias ? x[i] + bias[i] : x[i]) / divisor;
                if (z >= least) ranked[count++] = Ranked{z, static_cast<std::int32_t>(i)};
            }
            chosen = draw(ranked, count, c.vocab, found.biased_sum, c.top_k[t], c.top_p[t], c.min_p[t], c.uniform[t]);
        }
        c.ids[t] = chosen;
        c.logprobs[t] = x[chosen] - found.largest - log_sum;
        if (!c.top) continue;
        largest_of(x, c.vocab, c.top, ranked, c.top_ids + t * c.top, c.top_logprobs + t * c.top);
        for (std::int64_t i = 0; i < c.top; i++) c.top_logprobs[t * c.top + i] = c.top_logprobs[t * c.top + i] - found.largest - log_sum;
    }
}
