// Compressed entries and index queries. Included inside the level's namespace.

// the Sylvester matrix times a vector, scaled by n**-0.5
static void hadamard(float* x, std::int64_t n) {
    for (std::int64_t span = 1; span < n; span *= 2)
        for (std::int64_t i = 0; i < n; i += 2 * span)
            for (std::int64_t j = i; j < i + span; j++) {
                const float a = x[j], b = x[j + span];
                x[j] = a + b;
                x[j + span] = a - b;
            }
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(n));
    for (std::int64_t i = 0; i < n; i++) x[i] *= scale;
}

// the nearest of E2M1, ties to the even code
V4_INLINE std::uint8_t fp4_code(float x) {
    const float a = x < 0 ? -x : x;
    const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return static_cast<std::uint8_t>(code | (float_bits(x) >> 31) << 3);
}

V4_INLINE std::uint8_t fp4_scale_byte(const float* x) {
    float amax = 6.0f * 0x1p-126f;
    for (int i = 0; i < 32; i++) {
        const float a = x[i] < 0 ? -x[i] : x[i];
        amax = a > amax ? a : amax;
    }
    const std::uint32_t b = float_bits(amax * (1.0f / 6.0f));
    return static_cast<std::uint8_t>((b >> 23 & 0xff) + ((b & 0x7fffff) != 0));
}

// groups of 32 in place to the FP4 grid
static void q4_round(float* x, std::int64_t n) {
    static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    for (std::int64_t g = 0; g < n; g += 32) {
        const float scale = ue8m0(fp4_scale_byte(x + g)), inverse = 1.0f / scale;
        for (std::int64_t i = g; i < g + 32; i++) {
            float v = x[i] * inverse;
            v = v > 6.0f ? 6.0f : v < -6.0f ? -6.0f : v;
            x[i] = values[fp4_code(v)] * scale;
        }
    }
}

static void store_index_key(const Cache& cache, std::int64_t row, const float* x, std::int64_t dim) {
    std::uint8_t* p = cache.data + row * cache.row_bytes;
    if (cache.format == kCacheFloat32) {
        __builtin_memcpy(p, x, static_cast<std::size_t>(dim) * 4);
    } else if (cache.format == kCacheBFloat16) {
        for (std::int64_t i = 0; i < dim; i++) reinterpret_cast<std::uint16_t*>(p)[i] = float_bf16(x[i]);
    } else {
        for (std::int64_t g = 0; g < dim / 32; g++) {
            p[dim / 2 + g] = fp4_scale_byte(x + 32 * g);
            const float inverse = 1.0f / ue8m0(p[dim / 2 + g]);
            for (std::int64_t i = 16 * g; i < 16 * g + 16; i++)
                p[i] = static_cast<std::uint8_t>(fp4_code(x[2 * i] * inverse) | fp4_code(x[2 * i + 1] * inverse) << 4);
        }
    }
}

constexpr std::int64_t kMostPooled = 512;  // positions that may join one entry

struct CompressLayout {
    Arena arena;
    int terms_kv, terms_gate;
    char *packed_kv, *packed_gate;
    float *pair, *rows, *table;  // [T, 2, w]; per member [e] and [2 * half]
    std::int64_t width;
    CompressLayout(const CompressCall& c, std::uintptr_t base, int threads) : arena(base) {
        terms_kv = terms_for(c.wkv, c.x.dtype, false);
        terms_gate = terms_for(c.wgate, c.x.dtype, false);
        packed_kv = arena.take<char>(packed_bytes(c.wkv, c.step.tokens, terms_kv));
        packed_gate = arena.take<char>(packed_bytes(c.wgate, c.step.tokens, terms_gate));
        pair = arena.take<float>(c.step.tokens * 2 * c.wkv.rows);
        width = (c.wkv.rows + 15) / 16 * 16;
        rows = arena.take<float>(width * threads);
        table = arena.take<float>(2 * c.half * threads);
    }
};

// per channel the softmax over positions of `z`, and the sum of `k` by it
static void pool(const float* const* k, const float* const* z, std::int64_t count, std::int64_t width, float* out) {
    for (std::int64_t at = 0; at < width; at += W) {
        const std::int64_t n = width - at < W ? width - at : W;
        alignas(64) float gate[W] = {}, value[W] = {};
        const auto read = [&](const float* p, float* space) {
            if (n == W) return load(p + at);
            __builtin_memcpy(space, p + at, static_cast<std::size_t>(n) * 4);
            return load(space);
        };
        F top = read(z[0], gate);
        for (std::int64_t i = 1; i < count; i++) top = max(top, read(z[i], gate));
        F total = set(0), sum_of = total;
        for (std::int64_t i = 0; i < count; i++) {
            const F p = exponential(read(z[i], gate) - top);
            total = total + p;
            sum_of = fma(p, read(k[i], value), sum_of);
        }
        alignas(64) float found[W];
        store(found, sum_of / total);
        __builtin_memcpy(out + at, found, static_cast<std::size_t>(n) * 4);
    }
}

static void compress(const void* arguments, const Team& team) {
    const CompressCall& c = *static_cast<const CompressCall*>(arguments);
    const CompressLayout at(c, workspace(), team.size);
    const std::int64_t w = c.wkv.rows, overlap = c.length == 2 * c.ratio, e = overlap ? w / 2 : w;
    pack(c.x, c.step.tokens, c.wkv, false, at.terms_kv, at.packed_kv, team);
    pack(c.x, c.step.tokens, c.wgate, false, at.terms_gate, at.packed_gate, team);
    team.barrier();
    deal_rows(team, 0, w, c.step.tokens, [&](std::int64_t r0, std::int64_t r1) {
        multiply(c.wkv, r0, r1, at.packed_kv, c.step.tokens, at.terms_kv, [&](std::int64_t t, std::int64_t r, const float* v, int n) {
            __builtin_memcpy(at.pair + 2 * t * w + r, v, static_cast<std::size_t>(n) * 4);
        });
        multiply(c.wgate, r0, r1, at.packed_gate, c.step.tokens, at.terms_gate, [&](std::int64_t t, std::int64_t r, const float* v, int n) {
            const float* ape = c.ape + c.step.positions[t] % c.ratio * w + r;
            for (int i = 0; i < n; i++) at.pair[(2 * t + 1) * w + r + i] = v[i] + ape[i];
        });
    });
    team.barrier();
    float *row = at.rows + team.rank * at.width, *table = at.table + team.rank * 2 * c.half;
    const float *k[kMostPooled], *z[kMostPooled];
    for (std::int64_t t = 0, unit = 0; t < c.step.tokens; t++) {
        const std::int64_t position = c.step.positions[t];
        if ((position + 1) % c.ratio) continue;
        if (unit++ % team.size != team.rank) continue;
        const std::int64_t b = c.step.seq_ids[t], block = position / c.ratio;
        std::int64_t count = 0;
        for (std::int64_t i = 0; i < c.length; i++) {
            const std::int64_t back = c.length - 1 - i, from = position - back;
            if (from < 0) continue;
            // with overlap the block before joins with the first halves of its channels
            const std::int64_t half = overlap && i >= c.ratio ? e : 0;
            const float* source = t - back >= c.step.cu_seqlens[b] ? at.pair + 2 * (t - back) * w
                                                                  : c.state + (c.step.slots[b] * c.length + from % c.length) * 2 * w;
            k[count] = source + half;
            z[count++] = source + w + half;
        }
        pool(k, z, count, e, row);
        if (c.bf16_activations) round_bf16(row, e);
        normalise(row, c.norm, e, c.eps);
        if (c.bf16_activations) round_bf16(row, e);
        for (std::int64_t i = 0; i < c.half; i++) {
            const float angle = static_cast<float>(block * c.ratio) * c.inv_freq[i];
            table[i] = __builtin_cosf(angle);
            table[c.half + i] = __builtin_sinf(angle);
        }
        const std::int64_t plain = e - 2 * c.half;
        rotate(row + plain, table, c.half, false);
        if (c.bf16_activations) round_bf16(row + plain, 2 * c.half);
        const std::int64_t to = entry_row(c.step, c.entries, b, block);
        if (c.is_index) {
            if (c.q4_index) {
                hadamard(row, e);
                if (c.bf16_activations) round_bf16(row, e);
                q4_round(row, e);
            }
            store_index_key(c.entries, to, row, e);
        } else {
            if (c.q8_kv)
                for (std::int64_t g = 0; g < plain; g += 64) q8_round(row + g, plain - g < 64 ? plain - g : 64);
            store_kv(c.entries, to, row, e, 2 * c.half);
        }
    }
    team.barrier();
    const Span tokens = share(c.step.tokens, team);
    for (std::int64_t t = tokens.begin; t < tokens.end; t++) {
        const std::int64_t b = c.step.seq_ids[t];
        if (c.step.cu_seqlens[b + 1] - t > c.length) continue;
        __builtin_memcpy(c.state + (c.step.slots[b] * c.length + c.step.positions[t] % c.length) * 2 * w, at.pair + 2 * t * w,
                         static_cast<std::size_t>(2 * w) * 4);
    }
}

struct IndexQueryLayout {
    Arena arena;
    int terms_q, terms_w;
    char *packed_q, *packed_w;
    float* rows;  // [T, heads * e]
    IndexQueryLayout(const IndexQueryCall& c, std::uintptr_t base, int) : arena(base) {
        terms_q = terms_for(c.wq_b, c.qr.dtype, c.q8_b);
        terms_w = terms_for(c.weights_proj, c.x.dtype, c.q8_w);
        packed_q = arena.take<char>(packed_bytes(c.wq_b, c.tokens, terms_q));
        packed_w = arena.take<char>(packed_bytes(c.weights_proj, c.tokens, terms_w));
        rows = arena.take<float>(c.tokens * c.wq_b.rows);
    }
};

static void index_query(const void* arguments, const Team& team) {
    const IndexQueryCall& c = *static_cast<const IndexQueryCall*>(arguments);
    const IndexQueryLayout at(c, workspace(), team.size);
    const std::int64_t width = c.wq_b.rows, e = width / c.heads;
    pack(c.qr, c.tokens, c.wq_b, c.q8_b, at.terms_q, at.packed_q, team);
    pack(c.x, c.tokens, c.weights_proj, c.q8_w, at.terms_w, at.packed_w, team);
    team.barrier();
    const Span heads = share(c.heads, team);
    if (heads.begin < heads.end) {
        multiply(c.wq_b, heads.begin * e, heads.end * e, at.packed_q, c.tokens, at.terms_q,
                 [&](std::int64_t t, std::int64_t r, const float* v, int n) {
                     __builtin_memcpy(at.rows + t * width + r, v, static_cast<std::size_t>(n) * 4);
                 });
        multiply(c.weights_proj, heads.begin, heads.end, at.packed_w, c.tokens, at.terms_w,
                 [&](std::int64_t t, std::int64_t r, const float* v, int n) {
                     float scaled_by[64];
                     for (int i = 0; i < n; i++) scaled_by[i] = (c.bf16_between ? bf16_float(float_bf16(v[i])) : v[i]) * c.scale;
                     write_row(c.w, t, r, n, scaled_by);
                 });
    }
    for (std::int64_t t = 0; t < c.tokens; t++)
        for (std::int64_t h = heads.begin; h < heads.end; h++) {
            float* q = at.rows + t * width + h * e;
            if (c.bf16_between) round_bf16(q, e);
            rotate(q + e - c.rope, c.table + t * c.rope, c.rope / 2, false);
            round_to(c.q.dtype, q, e);
            if (c.q4_index) {
                hadamard(q, e);
                round_to(c.q.dtype, q, e);
                q4_round(q, e);
            }
            write_row(c.q, t, h * e, e, q);
        }
}
