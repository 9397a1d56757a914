// The lightning indexer: scores of all visible entries, and the best of them. Included inside the level's namespace.
//
// Keys are decoded in tiles that meet all heads of a block of tokens, as matrix rows meet tokens elsewhere.

constexpr std::int64_t kIndexTokens = 16;   // tokens of one block of a prompt
constexpr std::int64_t kTilesPerUnit = 32;  // of a decode step

struct IndexLayout {
    Arena arena;
    bool decode, paired;
    std::int64_t depth, most, tile;  // dim in whole blocks; entries a row of scores has room for; keys of a tile
    std::int64_t tokens;             // of one block
    float* scores;                   // [T or team * tokens, most]
    char* queries;                   // per member [tokens * heads, depth], float32 or BF16
    float* keys;                     // per member [tile, depth]
    char* panel;                     // per member
    IndexLayout(const IndexCall& c, std::uintptr_t base, int threads) : arena(base) {
        decode = c.step.tokens == c.step.sequences;
        paired = false;
#if defined(V4_BF16)
        paired = c.q.dtype == kBFloat16;
#endif
        tile = kPanelRows;
#if defined(V4_BF16)
        tile = kPairRows;
#endif
        depth = blocks_of(c.dim) * kBlock;
        tokens = decode ? 1 : kIndexTokens;
        most = (most_visible(c) + tile - 1) / tile * tile;
        scores = arena.take<float>((decode ? c.step.tokens : threads * tokens) * most);
        queries = arena.take<char>(threads * tokens * c.heads * depth * 4);
        keys = arena.take<float>(threads * tile * depth);
        panel = arena.take<char>(threads * depth * tile * 4);
    }
    // of a recorded step the pages say it, so that its scratch need not grow while they fill; a prompt's positions are known
    std::int64_t most_visible(const IndexCall& c) const {
        if (decode) return c.step.pages * c.step.page_tokens / c.ratio;
        std::int64_t most = 0;
        for (std::int64_t t = 0; t < c.step.tokens; t++) {
            const std::int64_t visible = (c.step.positions[t] + 1) / c.ratio;
            most = visible > most ? visible : most;
        }
        return most;
    }
};

static void load_index_key(const Cache& cache, std::int64_t row, float* out, std::int64_t dim) {
    const std::uint8_t* p = cache.data + row * cache.row_bytes;
    if (cache.format == kCacheFloat32) {
        __builtin_memcpy(out, p, static_cast<std::size_t>(dim) * 4);
    } else if (cache.format == kCacheBFloat16) {
        read_row(Rows{const_cast<std::uint8_t*>(p), 0, kBFloat16, 0}, 0, dim, out);
    } else {
        static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
        for (std::int64_t g = 0; g < dim / 32; g++) {
            const float scale = ue8m0(p[dim / 2 + g]);
            for (std::int64_t i = 16 * g; i < 16 * g + 16; i++) {
                out[2 * i] = values[p[i] & 15] * scale;
                out[2 * i + 1] = values[p[i] >> 4] * scale;
            }
        }
    }
}

#if defined(V4_BF16)
// the same as BF16, of native and BF16 rows exactly; room for `dim` in whole groups of 32
static void load_index_pairs(const Cache& cache, std::int64_t row, std::uint16_t* out, std::int64_t dim) {
    const std::uint8_t *p = cache.data + row * cache.row_bytes, *scales = p + dim / 2;
    bool simple = cache.format == kCacheNative;
    for (std::int64_t g = 0; g < dim / 32 && simple; g++) simple = scales[g] >= 16 && scales[g] <= 232;
    if (!simple) {
        alignas(64) float wide[kMostDim];
        load_index_key(cache, row, wide, dim);
        for (std::int64_t i = 0; i < dim; i += 32)
            _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(wide + i + 16), _mm512_load_ps(wide + i)));
        return;
    }
    const __m512i four = tables().fp4;
    for (std::int64_t g = 0; g < dim / 32; g++) {
        // a byte is two codes: one stays where it is, the other goes to the word above; what else a word holds is nothing to the table
        const __m512i two = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * g)));
        const __m512i at = _mm512_or_si512(two, _mm512_slli_epi32(two, 12));
        const __m512i e = _mm512_set1_epi16(static_cast<short>((scales[g] - 127) * 128));
        _mm512_storeu_si512(out + 32 * g, _mm512_permutexvar_epi16(at, _mm512_mask_add_epi16(four, 0xfefefefeu, four, e)));
    }
}
#endif

struct IndexDesk {
    char* queries;
    float* keys;
    char* panel;
};

static void pack_queries(const IndexCall& c, const IndexLayout& at, std::int64_t first, std::int64_t count, const IndexDesk& desk) {
    for (std::int64_t r = 0; r < count * c.heads; r++) {
        const Rows from = columns(c.q, r % c.heads * c.dim);
        if (at.paired) {
            std::uint16_t* out = reinterpret_cast<std::uint16_t*>(desk.queries) + r * at.depth;
            __builtin_memcpy(out, static_cast<const std::uint16_t*>(from.data) + (first + r / c.heads) * from.stride, static_cast<std::size_t>(c.dim) * 2);
            __builtin_memset(out + c.dim, 0, static_cast<std::size_t>(at.depth - c.dim) * 2);
        } else {
            float* out = reinterpret_cast<float*>(desk.queries) + r * at.depth;
            read_row(from, first + r / c.heads, c.dim, out);
            for (std::int64_t i = c.dim; i < at.depth; i++) out[i] = 0;
        }
    }
}

#if defined(V4_AMX)
// What `score_tile` adds up, where tiles are whole: sixteen heads of a token at a time, weighed as they come. `panel` holds 32 keys as pairs.
static void score_heads(const IndexCall& c, const IndexLayout& at, const std::uint32_t* panel, std::int64_t first, std::int64_t token,
                        std::int64_t count, const IndexDesk& desk, float* scores) {
    constexpr std::int64_t per_step = 16 * kPairRows;  // dwords of 32 columns
    alignas(64) float found[16][kPairRows], weights[16];
    const std::int64_t steps = at.depth / 32;
    const std::uint16_t* q = reinterpret_cast<const std::uint16_t*>(desk.queries);
    tile_begin();
    for (std::int64_t t = 0; t < count; t++) {
        F low = set(0), high = low;
        for (std::int64_t h = 0; h < c.heads; h += 16, q += 16 * at.depth) {
            tile_zero<0>();
            tile_zero<1>();
            for (std::int64_t k = 0; k < steps; k++) {
                tile_load_rows<0>(q + 32 * k, at.depth * 2);
                tile_load_tokens<0>(panel + k * per_step, kPairRows * 4);
                tile_dot<0, 0, 0>();
                tile_load_tokens<1>(panel + k * per_step + 16, kPairRows * 4);
                tile_dot<1, 0, 1>();
            }
            read_row(columns(c.w, h), token + t, 16, weights);
            tile_store<0>(found[0], kPairRows * 4);
            tile_store<1>(found[0] + 16, kPairRows * 4);
            for (int j = 0; j < 16; j++) {
                low = fma(max(load(found[j]), set(0)), set(weights[j]), low);
                high = fma(max(load(found[j] + 16), set(0)), set(weights[j]), high);
            }
        }
        store(scores + t * at.most + first, low);
        store(scores + t * at.most + first + 16, high);
    }
    tile_end();
}
#endif

// scores of one tile of entries [first, first + n) for packed tokens; a row of scores belongs to each of them
static void score_tile(const IndexCall& c, const IndexLayout& at, std::int64_t b, std::int64_t first, std::int64_t n, std::int64_t token,
                       std::int64_t count, const IndexDesk& desk, float* scores) {
#if defined(V4_BF16)
    std::uint16_t* pairs = reinterpret_cast<std::uint16_t*>(desk.keys);
#endif
    for (std::int64_t i = 0; i < at.tile; i++) {
        const std::int64_t row = i < n ? entry_row(c.step, c.keys, b, first + i) : 0, filled = i < n ? c.dim : 0;
#if defined(V4_BF16)
        if (at.paired) {
            if (i < n) load_index_pairs(c.keys, row, pairs + i * at.depth, c.dim);
            __builtin_memset(pairs + i * at.depth + filled, 0, static_cast<std::size_t>(at.depth - filled) * 2);
            continue;
        }
#endif
        float* key = desk.keys + i * at.depth;
        if (i < n) load_index_key(c.keys, row, key, c.dim);
        for (std::int64_t d = filled; d < at.depth; d++) key[d] = 0;
    }
    bool whole = false;  // tiles do it all
#if defined(V4_AMX)
    whole = at.paired && c.heads % 16 == 0 && !c.bf16_scores;
#endif
    for (std::int64_t t = 0; t < count && !whole; t++)
        for (std::int64_t i = 0; i < at.tile; i++) scores[t * at.most + first + i] = 0;
    const auto add = [&](std::int64_t row, std::int64_t, const float* dots, int found) {
        const std::int64_t t = row / c.heads, h = row % c.heads;
        float w;
        read_row(columns(c.w, h), token + t, 1, &w);
        float* into = scores + t * at.most + first;
        if (c.bf16_scores) {
            w = bf16_float(float_bf16(w));
            for (int i = 0; i < found; i++) {
                const float dot = bf16_float(float_bf16(dots[i]));
                into[i] += bf16_float(float_bf16((dot > 0 ? dot : 0) * w));
            }
        } else {
            for (int i = 0; i < found; i++) into[i] += (dots[i] > 0 ? dots[i] : 0) * w;
        }
    };
    const std::int64_t rows = count * c.heads;
#if defined(V4_BF16)
    if (at.paired) {
        // pairs of columns, 32 keys side by side
        std::uint32_t* panel = reinterpret_cast<std::uint32_t*>(desk.panel);
        for (int half = 0; half < 2; half++)
            for (std::int64_t d = 0; d < at.depth; d += 32) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(pairs + (16 * half + i) * at.depth + d);
                transpose_16x16(r);
                for (int k = 0; k < 16; k++) _mm512_storeu_si512(panel + (d / 2 + k) * kPairRows + 16 * half, r[k]);
            }
#if defined(V4_AMX)
        if (whole) return score_heads(c, at, panel, first, token, count, desk, scores);
#endif
        pair_tiles(panel, at.depth / kBlock, 1, reinterpret_cast<const Packed*>(desk.queries), at.depth, rows, 0, n, add);
    } else
#endif
    {
        float* panel = reinterpret_cast<float*>(desk.panel);
        for (std::int64_t first_key = 0; first_key < at.tile; first_key += kPanelRows) {
            for (std::int64_t d = 0; d < at.depth; d++)
                for (int i = 0; i < kPanelRows; i++) panel[d * kPanelRows + i] = desk.keys[(first_key + i) * at.depth + d];
            const std::int64_t left = n - first_key < kPanelRows ? n - first_key : kPanelRows;
            if (left <= 0) break;
            float_tiles(panel, at.depth, reinterpret_cast<const float*>(desk.queries), at.depth, rows, 0, left, add);
        }
    }
    if (c.bf16_scores)
        for (std::int64_t t = 0; t < count; t++)
            for (std::int64_t i = 0; i < n; i++) scores[t * at.most + first + i] = bf16_float(float_bf16(scores[t * at.most + first + i]));
}

V4_INLINE std::uint32_t ordered(float x) {
    const std::uint32_t b = float_bits(x + 0.0f);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

// the `topk` best of scores [n], in ascending place, ties to the lowest; -1 beyond
static void take_best(const float* scores, std::int64_t n, std::int64_t topk, std::int32_t* picks) {
    if (n <= topk) {
        for (std::int64_t i = 0; i < topk; i++) picks[i] = i < n ? static_cast<std::int32_t>(i) : -1;
        return;
    }
    // the bits of the smallest score that is taken, eleven at a time
    std::uint32_t known = 0, mask = 0;
    std::int64_t wanted = topk;
    const int shifts[3] = {21, 10, 0};
    for (int pass = 0; pass < 3; pass++) {
        std::uint32_t histogram[2048] = {};
        const int shift = shifts[pass], bits = pass == 2 ? 10 : 11;
        const std::uint32_t digit = (1u << bits) - 1;
        for (std::int64_t i = 0; i < n; i++) {
            const std::uint32_t key = ordered(scores[i]);
            if ((key & mask) == known) histogram[key >> shift & digit]++;
        }
        std::uint32_t at = digit;
        while (histogram[at] < wanted) wanted -= histogram[at--];
        known |= at << shift;
        mask |= digit << shift;
    }
    // of those equal to the smallest, the first `wanted`
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < n && found < topk; i++) {
        const std::uint32_t key = ordered(scores[i]);
        if (key > known || (key == known && wanted-- > 0)) picks[found++] = static_cast<std::int32_t>(i);
    }
}

static void index_topk(const void* arguments, const Team& team) {
    const IndexCall& c = *static_cast<const IndexCall*>(arguments);
    const IndexLayout at(c, workspace(), team.size);
    const IndexDesk desk{at.queries + team.rank * at.tokens * c.heads * at.depth * 4, at.keys + team.rank * at.tile * at.depth,
                         at.panel + team.rank * at.depth * at.tile * 4};
    if (at.decode) {
        const std::int64_t units = (at.most / at.tile + kTilesPerUnit - 1) / kTilesPerUnit;
        // in turn: what lies beyond a position is no work
        for (std::int64_t unit = team.rank; unit < c.step.tokens * units; unit += team.size) {
            const std::int64_t t = unit / units, visible = (c.step.positions[t] + 1) / c.ratio;
            const std::int64_t first = unit % units * kTilesPerUnit * at.tile, end = first + kTilesPerUnit * at.tile;
            if (visible <= c.topk || first >= visible) continue;
            pack_queries(c, at, t, 1, desk);
            for (std::int64_t i = first; i < end && i < visible; i += at.tile)
                score_tile(c, at, c.step.seq_ids[t], i, visible - i < at.tile ? visible - i : at.tile, t, 1, desk, at.scores + t * at.most);
        }
        team.barrier();
        const Span mine = share(c.step.tokens, team);
        for (std::int64_t t = mine.begin; t < mine.end; t++)
            take_best(at.scores + t * at.most, (c.step.positions[t] + 1) / c.ratio, c.topk, c.picks + t * c.topk);
        return;
    }
    // blocks of tokens of one sequence, in turn: later ones see more
    float* scores = at.scores + team.rank * at.tokens * at.most;
    std::int64_t unit = 0;
    for (std::int64_t b = 0; b < c.step.sequences; b++)
        for (std::int64_t t = c.step.cu_seqlens[b]; t < c.step.cu_seqlens[b + 1]; t += at.tokens, unit++) {
            if (unit % team.size != team.rank) continue;
            const std::int64_t left = c.step.cu_seqlens[b + 1] - t, count = left < at.tokens ? left : at.tokens;
            const std::int64_t visible = (c.step.positions[t + count - 1] + 1) / c.ratio;
            if (visible > c.topk) {
                pack_queries(c, at, t, count, desk);
                for (std::int64_t i = 0; i < visible; i += at.tile)
                    score_tile(c, at, b, i, visible - i < at.tile ? visible - i : at.tile, t, count, desk, scores);
            }
            for (std::int64_t i = 0; i < count; i++)
                take_best(scores + i * at.most, (c.step.positions[t + i] + 1) / c.ratio, c.topk, c.picks + (t + i) * c.topk);
        }
}
