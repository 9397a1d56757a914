// Attention of all heads of a token over its window and its compressed entries. Included inside the level's namespace.
//
// A token's keys are a list: first the window, then entries. They are walked in chunks; in a decode step a few spans of chunks of each
// token are separate units, so that one token has work for a team, and are joined in their order. How keys are cut depends on the token
// alone.

constexpr std::int64_t kChunkKeys = 64;
#if defined(V4_AMX)
constexpr std::int64_t kPromptKeys = 256;  // of a chunk of a prompt: tiles keep the sums of a chunk to themselves
#else
constexpr std::int64_t kPromptKeys = kChunkKeys;
#endif
constexpr std::int64_t kMostExpanded = 64 << 20;  // bytes of entries that are decoded ahead
constexpr std::int64_t kSpans = 8;        // at most, per token of a decode step
constexpr std::int64_t kMostDim = 4096, kMostHeads = 1024;
constexpr std::int64_t kHeadGroup = 16;   // heads of one unit of a decode step

struct AttentionLayout {
    Arena arena;
    bool decode, paired;          // one token per sequence; products of BF16 pairs
    std::int64_t padded;          // D rounded up to whole vectors
    std::int64_t chunk;           // keys
    std::int64_t expanded;        // entries that are decoded once for all tokens of a prompt: all of every sequence, or none
    std::uint16_t* entries;       // [expanded, padded], sequence after sequence
    std::int64_t spans;
    // per span: sums [units, D] in the order they were computed in, largest logit and total [units]
    float *sums, *largest, *total;
    // per member
    float *keys, *logits, *own_sums, *own_state;
    std::uint16_t *pair_keys, *pair_values, *numerators, *turned;
    const std::uint16_t** pointers;
    std::int32_t* picked;
    std::int64_t heads_at_once;
    AttentionLayout(const AttentionCall& c, std::uintptr_t base, int threads) : arena(base) {
        decode = c.step.tokens == c.step.sequences;
        paired = false;
#if defined(V4_BF16)
        paired = c.q.dtype == kBFloat16 && c.dim % 32 == 0;
#endif
        padded = (c.dim + 31) / 32 * 32;
        chunk = decode ? kChunkKeys : kPromptKeys;
        expanded = paired && !decode ? worth_expanding(c, padded * 2) : 0;
        entries = arena.take<std::uint16_t>(expanded * padded);
        spans = decode ? kSpans : 1;
        heads_at_once = decode && c.heads > kHeadGroup ? kHeadGroup : c.heads;
        const std::int64_t units = decode ? c.step.tokens * spans * c.heads : 0, heads = (heads_at_once + 15) / 16 * 16;
        sums = arena.take<float>(units * padded);
        largest = arena.take<float>(units);
        total = arena.take<float>(units);
        keys = arena.take<float>(paired ? 0 : threads * chunk * padded);
        pair_keys = arena.take<std::uint16_t>(paired ? threads * chunk * padded : 0);
        pair_values = arena.take<std::uint16_t>(paired ? threads * chunk * padded : 0);
        numerators = arena.take<std::uint16_t>(paired ? threads * heads * chunk : 0);
        turned = arena.take<std::uint16_t>(paired ? threads * heads * padded : 0);
        pointers = arena.take<const std::uint16_t*>(threads * chunk);
        logits = arena.take<float>(threads * heads * chunk);
        own_sums = arena.take<float>(threads * heads * padded);
        own_state = arena.take<float>(threads * heads * 2);
        picked = arena.take<std::int32_t>(threads * (c.most_picks + 1));
    }
    // how many entries the last token of a sequence may see
    static std::int64_t visible(const AttentionCall& c, std::int64_t b) {
        const std::int64_t end = c.step.cu_seqlens[b + 1];
        return end == c.step.cu_seqlens[b] ? 0 : (c.step.positions[end - 1] + 1) / c.ratio;
    }
    // those of all sequences, if their tokens would decode more of them one by one
    static std::int64_t worth_expanding(const AttentionCall& c, std::int64_t row_bytes) {
        if (!c.entries.data || !c.ratio) return 0;
        std::int64_t all = 0, one_by_one = 0;
        for (std::int64_t b = 0; b < c.step.sequences; b++) {
            const std::int64_t seen = visible(c, b), each = c.picks && c.most_picks < seen ? c.most_picks : seen;
            all += seen;
            one_by_one += (c.step.cu_seqlens[b + 1] - c.step.cu_seqlens[b]) * each;
        }
        return all <= one_by_one && all * row_bytes <= kMostExpanded ? all : 0;
    }
};

// what a member works with
struct Desk {
    float *keys, *logits, *sums, *state;
    std::uint16_t *pair_keys, *pair_values, *numerators, *turned;
    const std::uint16_t** pointers;
    std::int32_t* picked;
};

static Desk desk_of(const AttentionCall& c, const AttentionLayout& at, int rank) {
    const std::int64_t heads = (at.heads_at_once + 15) / 16 * 16;
    return Desk{at.keys + (at.paired ? 0 : rank * at.chunk * at.padded),
                 at.logits + rank * heads * at.chunk,
                 at.own_sums + rank * heads * at.padded,
                 at.own_state + rank * heads * 2,
                 at.pair_keys + (at.paired ? rank * at.chunk * at.padded : 0),
                 at.pair_values + (at.paired ? rank * at.chunk * at.padded : 0),
                 at.numerators + (at.paired ? rank * heads * at.chunk : 0),
                 at.turned + (at.paired ? rank * heads * at.padded : 0),
                 at.pointers + rank * at.chunk,
                 at.picked + rank * (c.most_picks + 1)};
}

// the keys of one token
struct KeyList {
    std::int64_t token, sequence, position, window, count;  // `window` of the keys are of the window
    const std::int32_t* picked;                             // entries after them, or null for 0, 1, 2, ...
    const std::uint16_t* entries;                           // the first `expanded` of them, decoded
    std::int64_t expanded;
};

static KeyList keys_of(const AttentionCall& c, const AttentionLayout& at, std::int64_t t, std::int32_t* picked) {
    KeyList k;
    k.token = t;
    k.sequence = c.step.seq_ids[t];
    k.position = c.step.positions[t];
    k.window = k.position + 1 < c.window.rows ? k.position + 1 : c.window.rows;
    k.picked = nullptr;
    k.entries = at.entries;
    k.expanded = at.expanded ? AttentionLayout::visible(c, k.sequence) : 0;
    for (std::int64_t b = 0; b < k.sequence && at.expanded; b++) k.entries += AttentionLayout::visible(c, b) * at.padded;
    std::int64_t entries = 0;
    if (c.entries.data && c.picks) {
        const std::int32_t* all = c.picks + t * c.most_picks;
        for (std::int64_t i = 0; i < c.most_picks; i++)
            if (all[i] >= 0) picked[entries++] = all[i];
        k.picked = picked;
    } else if (c.entries.data && c.ratio) {
        entries = (k.position + 1) / c.ratio;
    }
    k.count = k.window + entries;
    return k;
}

// row of a window key, oldest first: of the ring in a decode step, else of the ring as it was or of this step's rows
V4_INLINE std::int64_t window_row(const AttentionCall& c, const KeyList& k, std::int64_t i, bool decode) {
    const std::int64_t position = k.position - k.window + 1 + i, length = c.window.rows;
    if (decode) return c.step.slots[k.sequence] * length + position % length;
    const std::int64_t first = c.step.cu_seqlens[k.sequence], start = c.step.positions[first];
    return position >= start ? c.step.sequences * length + first + position - start : k.sequence * length + position % length;
}

static void load_key(const AttentionCall& c, const KeyList& k, std::int64_t i, bool decode, float* out) {
    if (i < k.window) {
        const std::int64_t row = window_row(c, k, i, decode);
        if (decode) load_kv(c.window, row, out, c.dim, c.rope);
        else read_row(c.kv, row, c.dim, out);
    } else {
        const std::int64_t entry = k.picked ? k.picked[i - k.window] : i - k.window;
        load_kv(c.entries, entry_row(c.step, c.entries, k.sequence, entry), out, c.dim, c.rope);
    }
}

// a chunk of float32 keys for heads [h0, h1): logits, running maximum and total, weighted sums
static void attend_floats(const AttentionCall& c, const KeyList& k, std::int64_t first, std::int64_t n, std::int64_t h0, std::int64_t h1,
                          const AttentionLayout& at, const Desk& b) {
    const std::int64_t padded = at.padded;
    const bool decode = at.decode;
    for (std::int64_t i = 0; i < n; i++) load_key(c, k, first + i, decode, b.keys + i * padded);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(c.dim));
    for (std::int64_t h = h0; h < h1; h++) {
        alignas(64) float q[kMostDim];
        read_row(columns(c.q, h * c.dim), k.token, c.dim, q);
        float *s = b.logits + (h - h0) * at.chunk, *sums = b.sums + (h - h0) * padded;
        float &top = b.state[2 * (h - h0)], &total = b.state[2 * (h - h0) + 1];
        float most = top;
        for (std::int64_t i = 0; i < n; i++) {
            s[i] = dot_product(q, b.keys + i * padded, c.dim) * scale;
            most = s[i] > most ? s[i] : most;
        }
        const float factor = top == most ? 1.0f : __builtin_expf(top - most);
        top = most;
        total *= factor;
        for (std::int64_t i = 0; i < n; i++) {
            s[i] = __builtin_expf(s[i] - most);
            total += s[i];
            if (c.bf16_numerators) s[i] = bf16_float(float_bf16(s[i]));
        }
        std::int64_t d = 0;
        for (; d + 4 * W <= c.dim; d += 4 * W) {
            F a0 = load(sums + d) * set(factor), a1 = load(sums + d + W) * set(factor), a2 = load(sums + d + 2 * W) * set(factor),
              a3 = load(sums + d + 3 * W) * set(factor);
            for (std::int64_t i = 0; i < n; i++) {
                const float* v = b.keys + i * padded + d;
                const F p = set(s[i]);
                a0 = fma(p, load(v), a0);
                a1 = fma(p, load(v + W), a1);
                a2 = fma(p, load(v + 2 * W), a2);
                a3 = fma(p, load(v + 3 * W), a3);
            }
            store(sums + d, a0);
            store(sums + d + W, a1);
            store(sums + d + 2 * W, a2);
            store(sums + d + 3 * W, a3);
        }
        for (; d < c.dim; d++) {
            float a = sums[d] * factor;
            for (std::int64_t i = 0; i < n; i++) a += s[i] * b.keys[i * padded + d];
            sums[d] = a;
        }
    }
}

#if defined(V4_BF16)
// a native row as BF16: FP8 values times a power of two, then the rotary part as it is
static void load_pairs(const Cache& cache, std::int64_t row, std::uint16_t* out, std::int64_t dim, std::int64_t rope) {
    const std::uint8_t* p = cache.data + row * cache.row_bytes;
    const std::int64_t plain = dim - rope;
    if (cache.format != kCacheNative || plain % 64) {
        alignas(64) float wide[kMostDim];
        load_kv(cache, row, wide, dim, rope);
        for (std::int64_t i = 0; i < dim; i += 32)
            _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(wide + i + 16), _mm512_load_ps(wide + i)));
        return;
    }
    for (std::int64_t i = 0; i < plain; i += 32) {
        const __m512 scale = _mm512_set1_ps(ue8m0(p[plain + 2 * rope + i / 64]) * 256.0f);
        const __m512 low = _mm512_mul_ps(load_fp8_256th(p + i), scale), high = _mm512_mul_ps(load_fp8_256th(p + i + 16), scale);
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    __builtin_memcpy(out + plain, p + plain, static_cast<std::size_t>(2 * rope));
}

template <int H>
V4_INLINE void weigh(const std::uint16_t* numerators, std::int64_t chunk, const std::uint16_t* values, std::int64_t pairs,
                     std::int64_t padded, const float* factors, float* sums) {
    // heads side by side, four vectors of columns at a time
    for (std::int64_t d = 0; d < padded; d += 64) {
        const int vectors = padded - d >= 64 ? 4 : 2;
        __m512 a[H][4];
        for (int h = 0; h < H; h++)
            for (int v = 0; v < vectors; v++) a[h][v] = _mm512_mul_ps(_mm512_loadu_ps(sums + h * padded + d + 16 * v), _mm512_set1_ps(factors[h]));
        if (vectors == 4) {
            for (std::int64_t i = 0; i < pairs; i++) {
                const std::uint16_t* at = values + i * 2 * padded + 2 * d;
                __m512bh w[4];
                for (int v = 0; v < 4; v++) w[v] = (__m512bh)_mm512_loadu_si512(at + 32 * v);
#pragma GCC unroll 4
                for (int h = 0; h < H; h++) {
                    int pair;
                    __builtin_memcpy(&pair, numerators + h * chunk + 2 * i, 4);
                    const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
                    for (int v = 0; v < 4; v++) a[h][v] = _mm512_dpbf16_ps(a[h][v], w[v], p);
                }
            }
        } else {
            for (std::int64_t i = 0; i < pairs; i++) {
                const std::uint16_t* at = values + i * 2 * padded + 2 * d;
                for (int h = 0; h < H; h++) {
                    int pair;
                    __builtin_memcpy(&pair, numerators + h * chunk + 2 * i, 4);
                    const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
                    for (int v = 0; v < 2; v++) a[h][v] = _mm512_dpbf16_ps(a[h][v], (__m512bh)_mm512_loadu_si512(at + 32 * v), p);
                }
            }
        }
        for (int h = 0; h < H; h++)
            for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + h * padded + d + 16 * v, a[h][v]);
    }
}

// logits of heads side by side with keys [0, even), a multiple of four
static void score_pairs(const AttentionCall& c, std::int64_t token, std::int64_t even, std::int64_t h0, std::int64_t h1, std::int64_t chunk,
                        const Desk& b, float scale) {
    const std::uint16_t* q = static_cast<const std::uint16_t*>(c.q.data) + token * c.q.stride;
    for (std::int64_t h = h0; h < h1; h += 4) {
        const std::uint16_t* heads[4];
        for (int j = 0; j < 4; j++) heads[j] = q + (h + j < h1 ? h + j : h1 - 1) * c.dim;
        for (std::int64_t i = 0; i < even; i += 4) {
            __m512 s[16];
            for (int j = 0; j < 16; j++) s[j] = _mm512_setzero_ps();
            for (std::int64_t d = 0; d < c.dim; d += 32) {
                __m512bh key[4];
                for (int j = 0; j < 4; j++) key[j] = (__m512bh)_mm512_loadu_si512(b.pointers[i + j] + d);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const __m512bh a = (__m512bh)_mm512_loadu_si512(heads[j] + d);
                    for (int l = 0; l < 4; l++) s[4 * j + l] = _mm512_dpbf16_ps(s[4 * j + l], a, key[l]);
                }
            }
            alignas(64) float found[16];
            _mm512_store_ps(found, _mm512_mul_ps(sums_of(s), _mm512_set1_ps(scale)));
            for (int j = 0; j < 4; j++) __builtin_memcpy(b.logits + (h - h0 + j) * chunk + i, found + 4 * j, 16);
        }
    }
}

V4_INLINE bool in_head_tiles(std::int64_t heads) {
#if defined(V4_AMX)
    return heads % 16 == 0;
#else
    (void)heads;
    return false;
#endif
}

#if defined(V4_AMX)
// queries of sixteen heads at a time as tiles of pairs: the second operand
static void turn_queries(const AttentionCall& c, std::int64_t token, std::int64_t h0, std::int64_t h1, const Desk& b) {
    const std::uint16_t* q = static_cast<const std::uint16_t*>(c.q.data) + token * c.q.stride;
    std::uint16_t* out = b.turned;
    for (std::int64_t h = h0; h < h1; h += 16)
        for (std::int64_t d = 0; d < c.dim; d += 32, out += kTileBytes / 2) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(q + (h + i) * c.dim + d);
            transpose_16x16(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, r[i]);
        }
}

// as `score_pairs` by tiles, heads in sixteens: sixteen keys meet sixteen heads; `even` is a multiple of sixteen
static void score_tiles(const AttentionCall& c, std::int64_t even, std::int64_t h0, std::int64_t h1, std::int64_t chunk, std::int64_t padded,
                        const Desk& b, float scale) {
    alignas(64) float sums[2][256];
    tile_begin();
    for (std::int64_t i = 0; i < even; i += 16) {
        // where rows do not lie at one distance from each other they are brought together
        const std::uint16_t* rows = b.pointers[i];
        std::int64_t step = b.pointers[i + 1] - rows;
        bool evenly = true;
        for (int j = 2; j < 16; j++) evenly = evenly && b.pointers[i + j] - b.pointers[i + j - 1] == step;
        if (!evenly) {
            std::uint16_t* together = b.pair_keys + i * padded;
            for (int j = 0; j < 16; j++)
                if (b.pointers[i + j] != together + j * padded)
                    for (std::int64_t d = 0; d < c.dim; d += 32) _mm512_store_si512(together + j * padded + d, _mm512_loadu_si512(b.pointers[i + j] + d));
            rows = together;
            step = padded;
        }
        const std::uint16_t* q = b.turned;
        for (std::int64_t h = h0; h < h1; h += 16) {
            tile_zero<0>();
            tile_zero<1>();
            std::int64_t d = 0;
            for (; d + 64 <= c.dim; d += 64, q += kTileBytes) {
                tile_load_rows<0>(rows + d, step * 2);
                tile_load_tokens<0>(q, 64);
                tile_dot<0, 0, 0>();
                tile_load_rows<1>(rows + d + 32, step * 2);
                tile_load_tokens<1>(q + kTileBytes / 2, 64);
                tile_dot<1, 1, 1>();
            }
            for (; d < c.dim; d += 32, q += kTileBytes / 2) {
                tile_load_rows<0>(rows + d, step * 2);
                tile_load_tokens<0>(q, 64);
                tile_dot<0, 0, 0>();
            }
            tile_store<0>(sums[0], 64);
            tile_store<1>(sums[1], 64);
            __m512i r[16];
            for (int j = 0; j < 16; j++)
                r[j] = _mm512_castps_si512(_mm512_mul_ps(_mm512_add_ps(load(sums[0] + 16 * j), load(sums[1] + 16 * j)), set(scale)));
            transpose_16x16(r);
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(b.logits + (h - h0 + j) * chunk + i, r[j]);
        }
    }
    tile_end();
}

// as `weigh` by tiles, heads in sixteens, over `keys`, a multiple of 32
static void weigh_tiles(std::int64_t heads, std::int64_t keys, std::int64_t chunk, std::int64_t padded, const Desk& b, const float* factors) {
    alignas(64) float found[4][256];
    tile_begin();
    for (std::int64_t h = 0; h < heads; h += 16)
        for (std::int64_t d = 0; d < padded; d += 64) {
            // sixteen columns are a tile of pairs of keys
            const int tiles = padded - d >= 64 ? 4 : 2;
            tile_zero<0>();
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
            for (std::int64_t i = 0; i < keys; i += 32) {
                const std::uint16_t* at = b.pair_values + i * padded + 2 * d;
                tile_load_rows<0>(b.numerators + h * chunk + i, chunk * 2);
                tile_load_tokens<0>(at, padded * 4);
                tile_dot<0, 0, 0>();
                tile_load_tokens<1>(at + 32, padded * 4);
                tile_dot<1, 0, 1>();
                if (tiles == 2) continue;
                tile_load_tokens<0>(at + 64, padded * 4);
                tile_dot<2, 0, 0>();
                tile_load_tokens<1>(at + 96, padded * 4);
                tile_dot<3, 0, 1>();
            }
            tile_store<0>(found[0], 64);
            tile_store<1>(found[1], 64);
            tile_store<2>(found[2], 64);
            tile_store<3>(found[3], 64);
            for (int v = 0; v < tiles; v++)
                for (int j = 0; j < 16; j++) {
                    float* sums = b.sums + (h + j) * padded + d + 16 * v;
                    store(sums, fma(load(sums), set(factors[h + j]), load(found[v] + 16 * j)));
                }
        }
    tile_end();
}
#endif

// the same of BF16 keys; sums stand in the order that interleaving two rows gives
static void attend_pairs(const AttentionCall& c, const KeyList& k, std::int64_t first, std::int64_t n, std::int64_t h0, std::int64_t h1,
                         const AttentionLayout& layout, const Desk& b) {
    const std::int64_t padded = layout.padded, chunk = layout.chunk;
    const bool decode = layout.decode;
    const bool tiled = in_head_tiles(h1 - h0);
    const std::int64_t unit = tiled ? 32 : 4, even = (n + unit - 1) / unit * unit;
    for (std::int64_t i = 0; i < n; i++) {
        const std::int64_t at = first + i;
        if (at < k.window && !decode) {
            b.pointers[i] = static_cast<const std::uint16_t*>(c.kv.data) + window_row(c, k, at, false) * c.kv.stride;
            continue;
        }
        std::uint16_t* out = b.pair_keys + i * padded;
        if (at < k.window) {
            load_pairs(c.window, window_row(c, k, at, true), out, c.dim, c.rope);
        } else {
            const std::int64_t entry = k.picked ? k.picked[at - k.window] : at - k.window;
            if (entry < k.expanded) {
                b.pointers[i] = k.entries + entry * padded;
                continue;
            }
            load_pairs(c.entries, entry_row(c.step, c.entries, k.sequence, entry), out, c.dim, c.rope);
        }
        b.pointers[i] = out;
    }
    for (std::int64_t i = n; i < even; i++) b.pointers[i] = b.pointers[n - 1];
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(c.dim));
#if defined(V4_AMX)
    if (tiled) {
        score_tiles(c, even, h0, h1, chunk, padded, b, scale);
    } else
#endif
        score_pairs(c, k.token, even, h0, h1, chunk, b, scale);
    const std::int64_t pairs = tiled ? even / 2 : (n + 1) / 2;
    for (std::int64_t i = 0; i < 2 * pairs; i += 2) {
        std::uint16_t* out = b.pair_values + i * padded;
        const std::uint16_t *one = i < n ? b.pointers[i] : nullptr, *two = i + 1 < n ? b.pointers[i + 1] : nullptr;
        for (std::int64_t d = 0; d < c.dim; d += 32) {
            const __m512i x = one ? _mm512_loadu_si512(one + d) : _mm512_setzero_si512(), y = two ? _mm512_loadu_si512(two + d) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + 2 * d, _mm512_unpacklo_epi16(x, y));
            _mm512_storeu_si512(out + 2 * d + 32, _mm512_unpackhi_epi16(x, y));
        }
    }
    float factors[kMostHeads];
    const std::int64_t used = (n + 31) / 32 * 32;
    for (std::int64_t h = h0; h < h1; h++) {
        float* s = b.logits + (h - h0) * chunk;
        float &top = b.state[2 * (h - h0)], &total = b.state[2 * (h - h0) + 1];
        float most = top;
        for (std::int64_t i = 0; i < n; i++) most = s[i] > most ? s[i] : most;
        factors[h - h0] = top == most ? 1.0f : __builtin_expf(top - most);
        top = most;
        for (std::int64_t i = n; i < used; i++) s[i] = most - 100.0f;
        F part = set(0);
        std::uint16_t* p = b.numerators + (h - h0) * chunk;
        for (std::int64_t i = 0; i < used; i += 32) {
            F x = exponential(load(s + i) - set(most)), y = exponential(load(s + i + 16) - set(most));
            const __mmask16 left = n - i >= 16 ? 0xffff : n > i ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0;
            const __mmask16 right = n - i >= 32 ? 0xffff : n > i + 16 ? static_cast<__mmask16>((1u << (n - i - 16)) - 1) : 0;
            x = _mm512_maskz_mov_ps(left, x);
            y = _mm512_maskz_mov_ps(right, y);
            part = part + x + y;
            _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(y, x));
        }
        total = total * factors[h - h0] + sum(part);
    }
#if defined(V4_AMX)
    if (tiled) return weigh_tiles(h1 - h0, even, chunk, padded, b, factors);
#endif
    std::int64_t h = h0;
    for (; h + 4 <= h1; h += 4)
        weigh<4>(b.numerators + (h - h0) * chunk, chunk, b.pair_values, pairs, padded, factors + (h - h0), b.sums + (h - h0) * padded);
    for (; h < h1; h++)
        weigh<1>(b.numerators + (h - h0) * chunk, chunk, b.pair_values, pairs, padded, factors + (h - h0), b.sums + (h - h0) * padded);
}
#endif

static void attend(const AttentionCall& c, const AttentionLayout& at, const KeyList& k, std::int64_t first, std::int64_t last,
                   std::int64_t h0, std::int64_t h1, const Desk& b) {
    for (std::int64_t i = 0; i < (h1 - h0) * at.padded; i++) b.sums[i] = 0;
    for (std::int64_t h = 0; h < h1 - h0; h++) {
        b.state[2 * h] = -__builtin_inff();
        b.state[2 * h + 1] = 0;
    }
#if defined(V4_AMX)
    if (at.paired && in_head_tiles(h1 - h0)) turn_queries(c, k.token, h0, h1, b);
#endif
    for (std::int64_t i = first; i < last; i += at.chunk) {
        const std::int64_t n = last - i < at.chunk ? last - i : at.chunk;
#if defined(V4_BF16)
        if (at.paired) {
            attend_pairs(c, k, i, n, h0, h1, at, b);
            continue;
        }
#endif
        attend_floats(c, k, i, n, h0, h1, at, b);
    }
}

// spans of one head joined and divided by their total, the sink among it
static void join(const AttentionCall& c, const AttentionLayout& at, std::int64_t t, std::int64_t h, const float* sums, const float* largest,
                 const float* total, std::int64_t spans, std::int64_t step) {
    float top = -__builtin_inff();
    for (std::int64_t s = 0; s < spans; s++) top = largest[s * step] > top ? largest[s * step] : top;
    alignas(64) float out[kMostDim], placed[32];
    for (std::int64_t d = 0; d < at.padded; d++) out[d] = 0;
    float all = 0;
    for (std::int64_t s = 0; s < spans; s++) {
        if (total[s * step] == 0.0f) continue;
        const float factor = __builtin_expf(largest[s * step] - top);
        all += total[s * step] * factor;
        const float* from = sums + s * step * at.padded;
        for (std::int64_t d = 0; d < at.padded; d++) out[d] += from[d] * factor;
    }
    const float divisor = all == 0.0f ? 1.0f : all + __builtin_expf(c.sink[h] - top);
    for (std::int64_t d = 0; d < c.dim; d += 32) {
        const std::int64_t n = c.dim - d < 32 ? c.dim - d : 32;
        for (int i = 0; i < 32; i++) {
            // interleaved rows: columns 0-3, 8-11, 16-19, 24-27, then the others
            const int column = at.paired ? i % 16 / 4 * 8 + i / 16 * 4 + i % 4 : i;
            placed[column] = out[d + i] / divisor;
        }
        write_row(c.out, t, h * c.dim + d, n, placed);
    }
}

static void sparse_attn(const void* arguments, const Team& team) {
    const AttentionCall& c = *static_cast<const AttentionCall*>(arguments);
    const AttentionLayout at(c, workspace(), team.size);
    const Desk b = desk_of(c, at, team.rank);
    if (!at.decode) {
#if defined(V4_BF16)
        if (at.expanded) {
            std::uint16_t* into = at.entries;
            for (std::int64_t s = 0; s < c.step.sequences; s++) {
                const std::int64_t seen = AttentionLayout::visible(c, s);
                const Span mine = share(seen, team);
                for (std::int64_t i = mine.begin; i < mine.end; i++)
                    load_pairs(c.entries, entry_row(c.step, c.entries, s, i), into + i * at.padded, c.dim, c.rope);
                into += seen * at.padded;
            }
            team.barrier();
        }
#endif
        // dealt one by one in turn: later tokens of a prompt see more entries
        for (std::int64_t t = team.rank; t < c.step.tokens; t += team.size) {
            const KeyList k = keys_of(c, at, t, b.picked);
            attend(c, at, k, 0, k.count, 0, c.heads, b);
            for (std::int64_t h = 0; h < c.heads; h++)
                join(c, at, t, h, b.sums + h * at.padded, b.state + 2 * h, b.state + 2 * h + 1, 1, 1);
        }
        return;
    }
    const std::int64_t groups = (c.heads + kHeadGroup - 1) / kHeadGroup;
    const Span mine = share(c.step.tokens * groups * kSpans, team);
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / (groups * kSpans), g = unit / kSpans % groups, s = unit % kSpans;
        const std::int64_t h0 = g * kHeadGroup, h1 = h0 + kHeadGroup < c.heads ? h0 + kHeadGroup : c.heads;
        const KeyList k = keys_of(c, at, t, b.picked);
        const std::int64_t chunks = (k.count + kChunkKeys - 1) / kChunkKeys;
        const std::int64_t first = chunks * s / kSpans * kChunkKeys, end = chunks * (s + 1) / kSpans * kChunkKeys;
        attend(c, at, k, first, end < k.count ? end : k.count, h0, h1, b);
        for (std::int64_t h = h0; h < h1; h++) {
            const std::int64_t to = (t * kSpans + s) * c.heads + h;
            __builtin_memcpy(at.sums + to * at.padded, b.sums + (h - h0) * at.padded, static_cast<std::size_t>(at.padded) * 4);
            at.largest[to] = b.state[2 * (h - h0)];
            at.total[to] = b.state[2 * (h - h0) + 1];
        }
    }
    team.barrier();
    const Span heads = share(c.step.tokens * c.heads, team);
    for (std::int64_t unit = heads.begin; unit < heads.end; unit++) {
        const std::int64_t t = unit / c.heads, h = unit % c.heads, from = t * kSpans * c.heads + h;
        join(c, at, t, h, at.sums + from * at.padded, at.largest + from, at.total + from, kSpans, c.heads);
    }
}
