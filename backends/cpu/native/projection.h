// Projections around attention: queries, the key-value latent, the grouped output. Included inside the level's namespace.

V4_INLINE void round_to(Encoding dtype, float* x, std::int64_t n) {
    if (dtype == kBFloat16) round_bf16(x, n);
}

// a float32 row in the order of a matrix, rounded to FP8 in groups first where asked for
static void pack_row(const Matrix& m, float* x, bool q8, int terms, char* packed, std::int64_t token, std::int64_t tokens) {
    for (std::int64_t b = 0; b < blocks_of(m.cols); b++) {
        const std::int64_t left = m.cols - b * kBlock, n = left < kBlock ? left : kBlock;
        if (q8) q8_round(x + b * kBlock, n);
        pack_values(m, x + b * kBlock, n, b, terms, packed, token, tokens);
    }
}

struct QueryLayout {
    Arena arena;
    int terms_a, terms_b;
    char *packed_a, *packed_b;
    float *low, *rows;  // [T, R]; per member one row of R or D
    std::int64_t widest;
    QueryLayout(const QueryCall& c, std::uintptr_t base, int threads) : arena(base) {
        terms_a = terms_for(c.wq_a, c.x.dtype, c.q8_a);
        terms_b = terms_for(c.wq_b, c.qr.dtype, c.q8_b);
        packed_a = arena.take<char>(packed_bytes(c.wq_a, c.tokens, terms_a));
        packed_b = arena.take<char>(packed_bytes(c.wq_b, c.tokens, terms_b));
        low = arena.take<float>(c.tokens * c.wq_a.rows);
        const std::int64_t dim = c.wq_b.rows / c.heads;
        widest = ((dim > c.wq_a.rows ? dim : c.wq_a.rows) + 15) / 16 * 16;
        rows = arena.take<float>(widest * threads);
    }
};

static void normalise_head(float* q, std::int64_t n, float eps, bool bf16_steps) {
    if (!bf16_steps) {
        const float factor = 1.0f / __builtin_sqrtf(dot_product(q, q, n) / static_cast<float>(n) + eps);
        for (std::int64_t i = 0; i < n; i++) q[i] *= factor;
        return;
    }
    round_bf16(q, n);
    float total = 0;
    for (std::int64_t i = 0; i < n; i++) total += bf16_float(float_bf16(q[i] * q[i]));
    const float mean = bf16_float(float_bf16(total / static_cast<float>(n)));
    const float factor = bf16_float(float_bf16(1.0f / __builtin_sqrtf(bf16_float(float_bf16(mean + eps)))));
    for (std::int64_t i = 0; i < n; i++) q[i] = bf16_float(float_bf16(q[i] * factor));
}

static void q_project(const void* arguments, const Team& team) {
    const QueryCall& c = *static_cast<const QueryCall*>(arguments);
    const QueryLayout at(c, workspace(), team.size);
    const std::int64_t rank_rows = c.wq_a.rows, dim = c.wq_b.rows / c.heads;
    float* row = at.rows + team.rank * at.widest;
    pack(c.x, c.tokens, c.wq_a, c.q8_a, at.terms_a, at.packed_a, team);
    team.barrier();
    deal_rows(team, 0, rank_rows, c.tokens, [&](std::int64_t begin, std::int64_t end) {
        multiply(c.wq_a, begin, end, at.packed_a, c.tokens, at.terms_a, [&](std::int64_t t, std::int64_t r, const float* v, int n) {
            __builtin_memcpy(at.low + t * rank_rows + r, v, static_cast<std::size_t>(n) * 4);
        });
    });
    team.barrier();
    const Span tokens = share(c.tokens, team);
    for (std::int64_t t = tokens.begin; t < tokens.end; t++) {
        float* x = at.low + t * rank_rows;
        if (c.bf16_between) round_bf16(x, rank_rows);
        normalise(x, c.norm, rank_rows, c.eps);
        round_to(c.qr.dtype, x, rank_rows);
        write_row(c.qr, t, 0, rank_rows, x);
        pack_row(c.wq_b, x, c.q8_b, at.terms_b, at.packed_b, t, c.tokens);
    }
    team.barrier();
    // a member finishes the heads it computed; between the two they lie in the result, in its dtype
    for (Span heads; team.take(1, c.heads, 1, heads);) {
        multiply(c.wq_b, heads.begin * dim, heads.end * dim, at.packed_b, c.tokens, at.terms_b,
                 [&](std::int64_t t, std::int64_t r, const float* v, int n) { write_row(c.q, t, r, n, v); });
        for (std::int64_t t = 0; t < c.tokens; t++)
            for (std::int64_t h = heads.begin; h < heads.end; h++) {
                read_row(columns(c.q, h * dim), t, dim, row);
                normalise_head(row, dim, c.eps, c.bf16_norm);
                if (c.bf16_between) round_bf16(row, dim);
                rotate(row + dim - c.rope, c.table + t * c.rope, c.rope / 2, false);
                write_row(c.q, t, h * dim, dim, row);
            }
    }
}

struct KvLayout {
    Arena arena;
    int terms;
    char* packed;
    float *rows, *row;  // [T, D]; per member one row
    KvLayout(const KvCall& c, std::uintptr_t base, int threads) : arena(base) {
        terms = terms_for(c.wkv, c.x.dtype, c.q8_input);
        packed = arena.take<char>(packed_bytes(c.wkv, c.step.tokens, terms));
        rows = arena.take<float>(c.step.tokens * c.wkv.rows);
        row = arena.take<float>((c.wkv.rows + 15) / 16 * 16 * threads);
    }
};

static void kv_project_store(const void* arguments, const Team& team) {
    const KvCall& c = *static_cast<const KvCall*>(arguments);
    const KvLayout at(c, workspace(), team.size);
    const std::int64_t dim = c.wkv.rows, plain = dim - c.rope, length = c.window.rows;
    const bool decode = c.step.tokens == c.step.sequences;
    const std::int64_t history = decode ? 0 : c.step.sequences * length;
    pack(c.x, c.step.tokens, c.wkv, c.q8_input, at.terms, at.packed, team);
    // the rings as they stand, before anything new is stored
    const Span old = share(history, team);
    float* row = at.row + team.rank * ((dim + 15) / 16 * 16);
    for (std::int64_t i = old.begin; i < old.end; i++) {
        load_kv(c.window, c.step.slots[i / length] * length + i % length, row, dim, c.rope);
        write_row(c.y, i, 0, dim, row);
    }
    team.barrier();
    deal_rows(team, 0, dim, c.step.tokens, [&](std::int64_t begin, std::int64_t end) {
        multiply(c.wkv, begin, end, at.packed, c.step.tokens, at.terms, [&](std::int64_t t, std::int64_t r, const float* v, int n) {
            __builtin_memcpy(at.rows + t * dim + r, v, static_cast<std::size_t>(n) * 4);
        });
    });
    team.barrier();
    const Span tokens = share(c.step.tokens, team);
    for (std::int64_t t = tokens.begin; t < tokens.end; t++) {
        float* x = at.rows + t * dim;
        if (c.bf16_between) round_bf16(x, dim);
        normalise(x, c.norm, dim, c.eps);
        round_to(c.y.dtype, x, dim);
        rotate(x + plain, c.table + t * c.rope, c.rope / 2, false);
        round_to(c.y.dtype, x + plain, c.rope);
        if (c.q8_kv)
            for (std::int64_t g = 0; g < plain; g += 64) q8_round(x + g, plain - g < 64 ? plain - g : 64);
        write_row(c.y, history + t, 0, dim, x);
        const std::int64_t b = c.step.seq_ids[t];
        // of a long prompt only the last rows stay
        if (!decode && c.step.cu_seqlens[b + 1] - t > length) continue;
        store_kv(c.window, c.step.slots[b] * length + c.step.positions[t] % length, x, dim, c.rope);
    }
}

struct OutputLayout {
    Arena arena;
    int terms_a, terms_b;
    char *packed_a, *packed_b;  // [groups, T], [T]
    char* between;              // [T, groups * L], float32 or BF16
    float* rows;                // per member [H / groups * D]
    OutputLayout(const OutputCall& c, std::uintptr_t base, int threads) : arena(base) {
        terms_a = terms_for(c.wo_a, c.o.dtype, false);
        terms_b = terms_for(c.wo_b, c.short_between ? kBFloat16 : kFloat32, c.q8_b);
        packed_a = arena.take<char>(c.groups * packed_bytes(c.wo_a, c.tokens, terms_a));
        packed_b = arena.take<char>(packed_bytes(c.wo_b, c.tokens, terms_b));
        between = arena.take<char>(c.tokens * c.wo_a.rows * (c.short_between ? 2 : 4));
        rows = arena.take<float>((c.wo_a.cols + 15) / 16 * 16 * threads);
    }
};

static void grouped_out(const void* arguments, const Team& team) {
    const OutputCall& c = *static_cast<const OutputCall*>(arguments);
    const OutputLayout at(c, workspace(), team.size);
    const std::int64_t cols = c.wo_a.cols, rank = c.wo_a.rows / c.groups;
    const std::int64_t group_bytes = packed_bytes(c.wo_a, c.tokens, at.terms_a);
    float* row = at.rows + team.rank * ((cols + 15) / 16 * 16);
    const Span units = share(c.tokens * c.groups, team);
    for (std::int64_t unit = units.begin; unit < units.end; unit++) {
        const std::int64_t t = unit / c.groups, g = unit % c.groups;
        read_row(columns(c.o, g * cols), t, cols, row);
        for (std::int64_t h = 0; h < cols / c.dim; h++) {
            float* tail = row + (h + 1) * c.dim - c.rope;
            rotate(tail, c.table + t * c.rope, c.rope / 2, true);
            round_to(c.o.dtype, tail, c.rope);
        }
        pack_row(c.wo_a, row, false, at.terms_a, at.packed_a + g * group_bytes, t, c.tokens);
    }
    team.barrier();
    const Rows z{at.between, c.wo_a.rows, c.short_between ? kBFloat16 : kFloat32, 0};
    deal_rows(team, 0, c.wo_a.rows, c.tokens, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t g = first / rank; g * rank < last; g++) {
            const std::int64_t begin = first > g * rank ? first : g * rank, end = last < (g + 1) * rank ? last : (g + 1) * rank;
            multiply(c.wo_a, begin, end, at.packed_a + g * group_bytes, c.tokens, at.terms_a,
                     [&](std::int64_t t, std::int64_t r, const float* v, int n) { write_row(z, t, r, n, v); });
        }
    });
    team.barrier();
    pack(z, c.tokens, c.wo_b, c.q8_b, at.terms_b, at.packed_b, team);
    team.barrier();
    deal_rows(team, 1, c.wo_b.rows, c.tokens, [&](std::int64_t begin, std::int64_t end) {
        multiply(c.wo_b, begin, end, at.packed_b, c.tokens, at.terms_b,
                 [&](std::int64_t t, std::int64_t r, const float* v, int n) { write_row(c.y, t, r, n, v); });
    });
}
