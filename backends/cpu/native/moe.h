// Mixture of experts: routing, and experts run where they were chosen. Included inside the level's namespace.

struct RouteLayout {
    Arena arena;
    int terms;
    char* packed;
    float* scores;  // [T, E]
    RouteLayout(const RouteCall& c, std::uintptr_t base, int) : arena(base) {
        terms = terms_for(c.gate, c.u.dtype, false);
        packed = arena.take<char>(packed_bytes(c.gate, c.tokens, terms));
        scores = arena.take<float>(c.tokens * c.experts);
    }
};

// sqrt(softplus(x)); softplus is x beyond 20, as the reference has it
static float gate_score(float x) { return __builtin_sqrtf(x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x))); }

static void route(const void* arguments, const Team& team) {
    const RouteCall& c = *static_cast<const RouteCall*>(arguments);
    const RouteLayout at(c, workspace(), team.size);
    pack(c.u, c.tokens, c.gate, false, at.terms, at.packed, team);
    team.barrier();
    const Span rows = share(c.experts, team);
    multiply(c.gate, rows.begin, rows.end, at.packed, c.tokens, at.terms, [&](std::int64_t t, std::int64_t row, const float* v, int n) {
        for (int i = 0; i < n; i++) at.scores[t * c.experts + row + i] = gate_score(v[i]);
    });
    team.barrier();
    const Span tokens = share(c.tokens, team);
    for (std::int64_t t = tokens.begin; t < tokens.end; t++) {
        const float* scores = at.scores + t * c.experts;
        std::int32_t* ids = c.ids + t * c.chosen;
        float* weights = c.weights + t * c.chosen;
        for (std::int64_t k = 0; k < c.chosen; k++) {
            if (c.table) {
                const std::int64_t place = c.token_ids[t] * c.chosen + k;
                ids[k] = c.wide_table ? static_cast<std::int32_t>(static_cast<const std::int64_t*>(c.table)[place])
                                      : static_cast<const std::int32_t*>(c.table)[place];
                continue;
            }
            // the largest below the last one taken; of equal ones the next id
            std::int64_t best = -1;
            float most = 0;
            for (std::int64_t e = 0; e < c.experts; e++) {
                const float s = scores[e] + c.bias[e];
                bool taken = false;
                for (std::int64_t j = 0; j < k; j++) taken = taken || ids[j] == e;
                if (!taken && (best < 0 || s > most)) {
                    best = e;
                    most = s;
                }
            }
            ids[k] = static_cast<std::int32_t>(best);
        }
        float total = 0;
        for (std::int64_t k = 0; k < c.chosen; k++) total += weights[k] = scores[ids[k]];
        for (std::int64_t k = 0; k < c.chosen; k++) weights[k] = weights[k] / total * c.scale;
    }
}

// tokens whose choices are worked on together: bounds the scratch, and leaves an expert of a large model a good share of rows
constexpr std::int64_t kExpertTokens = 1024;

// one choice of one token
struct Choice {
    std::int32_t token, expert, group;
    float weight;
};

struct ExpertsLayout {
    Arena arena;
    int terms, inner_terms;
    std::int64_t most;           // choices of one block of tokens
    char *packed, *inner_packed;
    float* gated;                // [choices, I]
    Choice* choices;             // in ascending expert id
    std::int64_t* bounds;        // [groups + 1] first choice of each expert that was chosen
    std::int64_t* places;        // [groups] first packed row of each, inner ones too
    std::int64_t* groups;        // [1]
    std::int64_t* counts;        // [E + 1]
    ExpertsLayout(const ExpertsCall& c, std::uintptr_t base, int) : arena(base) {
        const std::int64_t block = c.tokens < kExpertTokens ? c.tokens : kExpertTokens;
        most = block * c.chosen;
        terms = terms_for(c.matrices[0], c.u.dtype, c.q8_input);
        inner_terms = terms_for(c.matrices[1], c.short_inner ? kBFloat16 : kFloat32, c.q8_input);
        // as many as groups of any size can take: each may end with rows that are no token
        const std::int64_t groups_at_most = most < c.experts ? most : c.experts;
        const std::int64_t room = most + 15 * (most / kFewTokens < groups_at_most ? most / kFewTokens : groups_at_most);
        packed = arena.take<char>(room * packed_row_bytes(c.matrices[0], terms));
        inner_packed = arena.take<char>(room * packed_row_bytes(c.matrices[1], inner_terms));
        gated = arena.take<float>(most * c.inner);
        choices = arena.take<Choice>(most);
        bounds = arena.take<std::int64_t>(groups_at_most + 1);
        places = arena.take<std::int64_t>(groups_at_most);
        groups = arena.take<std::int64_t>(1);
        counts = arena.take<std::int64_t>(c.experts + 1);
    }
};

// the choices of tokens [first, last), sorted by expert and then by token: the order of every sum
static void order_choices(const ExpertsCall& c, const ExpertsLayout& at, std::int64_t first, std::int64_t last) {
    for (std::int64_t e = 0; e <= c.experts; e++) at.counts[e] = 0;
    for (std::int64_t i = first * c.chosen; i < last * c.chosen; i++) at.counts[(c.ids ? c.ids[i] : 0) + 1]++;
    std::int64_t groups = 0;
    for (std::int64_t e = 0; e < c.experts; e++) {
        if (at.counts[e + 1]) at.bounds[groups++] = at.counts[e];
        at.counts[e + 1] += at.counts[e];
    }
    at.bounds[groups] = (last - first) * c.chosen;
    *at.groups = groups;
    for (std::int64_t g = 0, place = 0; g < groups; g++) {
        at.places[g] = place;
        // of both products' packed rows, the more
        const std::int64_t n = at.bounds[g + 1] - at.bounds[g], a = packed_rows(c.matrices[0], n, at.terms), b = packed_rows(c.matrices[1], n, at.inner_terms);
        place += a > b ? a : b;
    }
    for (std::int64_t t = first; t < last; t++)
        for (std::int64_t k = 0; k < c.chosen; k++) {
            const std::int32_t e = c.ids ? c.ids[t * c.chosen + k] : 0;
            at.choices[at.counts[e]++] = Choice{static_cast<std::int32_t>(t), e, 0, c.weights ? c.weights[t * c.chosen + k] : 1.0f};
        }
    for (std::int64_t g = 0; g < groups; g++)
        for (std::int64_t i = at.bounds[g]; i < at.bounds[g + 1]; i++) at.choices[i].group = static_cast<std::int32_t>(g);
}

// gated[i] = weight * silu(min(gated[i], limit)) * clamp(v[i]), in rows of whatever length
static void gate(float* gated, const float* v, std::int64_t n, float weight, float limit, bool round) {
    alignas(64) float g[kBlock], u[kBlock];
    for (std::int64_t first = 0; first < n; first += kBlock) {
        const std::int64_t count = n - first < kBlock ? n - first : kBlock, padded = (count + W - 1) / W * W;
        for (std::int64_t i = count; i < padded; i++) g[i] = u[i] = 0;
        __builtin_memcpy(g, gated + first, static_cast<std::size_t>(count) * 4);
        __builtin_memcpy(u, v + first, static_cast<std::size_t>(count) * 4);
        if (round) {
            round_bf16(g, count);
            round_bf16(u, count);
        }
        for (std::int64_t i = 0; i < padded; i += W) {
            const F x = min(load(g + i), set(limit)), y = max(min(load(u + i), set(limit)), set(-limit));
            // far below zero the sigmoid is nothing, and its exponential must not overflow
            const F e = exponential(min(set(0) - x, set(87.0f)));
            store(g + i, x / (set(1.0f) + e) * y * set(weight));
        }
        if (round) round_bf16(g, count);
        __builtin_memcpy(gated + first, g, static_cast<std::size_t>(count) * 4);
    }
}

// Blocks of rows of one group after another are dealt by their number.
constexpr std::int64_t kGateRows = 32;
constexpr int kGatePhase = 0, kSumPhase = 1;

static void experts_of(const ExpertsCall& c, const ExpertsLayout& at, std::int64_t first, std::int64_t last, const Team& team) {
    if (team.rank == 0) order_choices(c, at, first, last);
    team.barrier();
    const std::int64_t groups = *at.groups, count = (last - first) * c.chosen;
    const std::int64_t blocks = blocks_of(c.width), row_bytes = packed_row_bytes(c.matrices[0], at.terms);
    alignas(64) float block[kBlock];
    const Span packs = share(count * blocks, team);
    for (std::int64_t unit = packs.begin; unit < packs.end; unit++) {
        const std::int64_t i = unit / blocks, b = unit % blocks, left = c.width - b * kBlock, n = left < kBlock ? left : kBlock;
        read_row(columns(c.u, b * kBlock), at.choices[i].token, n, block);
        if (c.q8_input) q8_round(block, n);
        const std::int64_t g = at.choices[i].group, begin = at.bounds[g];
        pack_values(c.matrices[0], block, n, b, at.terms, at.packed + at.places[g] * row_bytes, i - begin, at.bounds[g + 1] - begin);
    }
    team.barrier();
    const std::int64_t row_blocks = (c.inner + kGateRows - 1) / kGateRows;
    for (Span gates = {0, 0}; gates.begin < gates.end || team.take(kGatePhase, groups * row_blocks, 2, gates);) {
        const std::int64_t unit = gates.begin;
        // as many blocks of this group as are dealt to this member
        const std::int64_t g = unit / row_blocks, r0 = unit % row_blocks * kGateRows;
        const std::int64_t stop = gates.end < (g + 1) * row_blocks ? gates.end : (g + 1) * row_blocks;
        const std::int64_t r1 = (stop - g * row_blocks) * kGateRows < c.inner ? (stop - g * row_blocks) * kGateRows : c.inner;
        const std::int64_t begin = at.bounds[g], n = at.bounds[g + 1] - begin;
        const Matrix* m = c.matrices + 3 * at.choices[begin].expert;
        const char* rows = at.packed + at.places[g] * row_bytes;
        multiply(m[0], r0, r1, rows, n, at.terms, [&](std::int64_t t, std::int64_t row, const float* v, int k) {
            __builtin_memcpy(at.gated + (begin + t) * c.inner + row, v, static_cast<std::size_t>(k) * 4);
        });
        multiply(m[2], r0, r1, rows, n, at.terms, [&](std::int64_t t, std::int64_t row, const float* v, int k) {
            gate(at.gated + (begin + t) * c.inner + row, v, k, at.choices[begin + t].weight, c.limit, c.bf16_between);
        });
        gates.begin = stop;
    }
    team.barrier();
    const std::int64_t inner_blocks = blocks_of(c.inner), inner_bytes = packed_row_bytes(c.matrices[1], at.inner_terms);
    const Span inner = share(count * inner_blocks, team);
    for (std::int64_t unit = inner.begin; unit < inner.end; unit++) {
        const std::int64_t i = unit / inner_blocks, b = unit % inner_blocks, left = c.inner - b * kBlock, n = left < kBlock ? left : kBlock;
        __builtin_memcpy(block, at.gated + i * c.inner + b * kBlock, static_cast<std::size_t>(n) * 4);
        if (c.q8_input) q8_round(block, n);
        const std::int64_t g = at.choices[i].group, begin = at.bounds[g];
        pack_values(c.matrices[1], block, n, b, at.inner_terms, at.inner_packed + at.places[g] * inner_bytes, i - begin,
                    at.bounds[g + 1] - begin);
    }
    team.barrier();
    // a member sums the rows it takes for all tokens, expert after expert
    float* y = static_cast<float*>(c.y.data);
    const bool direct = c.y.dtype == kFloat32 && !c.routed;
    deal_rows(team, kSumPhase, c.width, last - first, [&](std::int64_t r0, std::int64_t r1) {
        if (direct)
            for (std::int64_t t = first; t < last; t++) __builtin_memset(y + t * c.y.stride + r0, 0, static_cast<std::size_t>(r1 - r0) * 4);
        for (std::int64_t g = 0; g < groups; g++) {
            const std::int64_t begin = at.bounds[g], n = at.bounds[g + 1] - begin;
            multiply(c.matrices[3 * at.choices[begin].expert + 1], r0, r1, at.inner_packed + at.places[g] * inner_bytes, n, at.inner_terms,
                     [&](std::int64_t t, std::int64_t row, const float* v, int k) {
                         const std::int64_t token = at.choices[begin + t].token;
                         float out[64];
                         for (int i = 0; i < k; i++) out[i] = c.bf16_between ? bf16_float(float_bf16(v[i])) : v[i];
                         if (direct) {
                             float* into = y + token * c.y.stride + row;
                             for (int i = 0; i < k; i++) into[i] += out[i];
                         } else {
                             for (int i = 0; i < k; i++) out[i] += c.routed[token * c.width + row + i];
                             write_row(c.y, token, row, k, out);
                         }
                     });
        }
    });
}

static void routed_experts(const void* arguments, const Team& team) {
    const ExpertsCall& c = *static_cast<const ExpertsCall*>(arguments);
    const ExpertsLayout at(c, workspace(), team.size);
    for (std::int64_t first = 0; first < c.tokens; first += kExpertTokens) {
        if (first) {
            team.barrier();
            if (team.rank == 0) team.deal_again();
        }
        experts_of(c, at, first, first + kExpertTokens < c.tokens ? first + kExpertTokens : c.tokens, team);
    }
}
