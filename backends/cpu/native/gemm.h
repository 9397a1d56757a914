// Products of many tokens with a stored matrix: a panel of rows is decoded once into a buffer of the thread, scales folded in, and then
// meets all tokens in register blocks. Tokens are packed as for few of them. Included inside the level's namespace.

constexpr int kPanelVectors = 2;                  // vectors side by side in a panel
constexpr int kPanelRows = kPanelVectors * W;     // float panels
constexpr int kTile = 12;                         // tokens of one register block

// rows [first, first + n) of a matrix as float32 columns [blocks * 128][kPanelRows], absent rows zero
template <Encoding E, ScaleKind S>
static void float_panel(const Matrix& m, std::int64_t first, std::int64_t n, float* panel) {
    const std::int64_t blocks = blocks_of(m.cols), whole = m.cols / kBlock, per_block = block_bytes(E);
    alignas(64) float w[kBlock];
    std::uint8_t tail[512];
    for (std::int64_t r = 0; r < kPanelRows; r++)
        for (std::int64_t b = 0; b < blocks; b++) {
            float* out = panel + b * kBlock * kPanelRows + r;
            if (r >= n) {
                for (int i = 0; i < kBlock; i++) out[i * kPanelRows] = 0;
                continue;
            }
            const std::int64_t row = first + r;
            const std::uint8_t* p = m.data + row * m.row_bytes + b * per_block;
            const std::uint8_t* scale = S == kNoScale ? nullptr : m.scale + row / m.tile_rows * m.scale_row_bytes;
            if (b == whole) {
                __builtin_memset(tail, 0, sizeof tail);
                __builtin_memcpy(tail, p, static_cast<std::size_t>(m.row_bytes - whole * per_block));
                p = tail;
            }
            decode_wide<E>(p, w);
            if constexpr (E == kFp4) {
                for (int g = 0; g < 4; g++) {
                    const bool here = b * kBlock + 32 * g < m.cols;
                    const float f = here ? ue8m0(scale[b * 4 + g]) * unit<E> : 0.0f;
                    for (int i = 32 * g; i < 32 * g + 32; i++) out[i * kPanelRows] = w[i] * f;
                }
            } else {
                float f = 1.0f;
                if constexpr (S == kUe8m0) f = ue8m0(scale[b]);
                else if constexpr (S == kScaleFloat32) __builtin_memcpy(&f, scale + 4 * b, 4);
                for (int i = 0; i < kBlock; i++) out[i * kPanelRows] = w[i] * unit<E> * f;
            }
        }
}

template <int M, class Emit>
static inline __attribute__((always_inline)) void float_tile(const float* panel, std::int64_t depth, const float* x, std::int64_t stride,
                                                             std::int64_t token, std::int64_t row, std::int64_t n, Emit emit) {
    F sum[M][kPanelVectors];
    for (int t = 0; t < M; t++)
        for (int v = 0; v < kPanelVectors; v++) sum[t][v] = set(0);
    for (std::int64_t k = 0; k < depth; k++) {
        F w[kPanelVectors];
        for (int v = 0; v < kPanelVectors; v++) w[v] = load(panel + k * kPanelRows + v * W);
#pragma GCC unroll 12
        for (int t = 0; t < M; t++) {
            const F a = set(x[t * stride + k]);
            for (int v = 0; v < kPanelVectors; v++) sum[t][v] = fma(a, w[v], sum[t][v]);
        }
    }
    alignas(64) float out[kPanelRows];
    for (int t = 0; t < M; t++) {
        for (int v = 0; v < kPanelVectors; v++) store(out + v * W, sum[t][v]);
        emit(token + t, row, out, static_cast<int>(n));
    }
}

constexpr int kFloatTile = W == 16 ? 12 : 4;  // what the registers hold

template <class Emit>
static void float_tiles(const float* panel, std::int64_t depth, const float* x, std::int64_t stride, std::int64_t tokens,
                        std::int64_t row, std::int64_t n, Emit emit) {
    std::int64_t t = 0;
    for (; t + kFloatTile <= tokens; t += kFloatTile) float_tile<kFloatTile>(panel, depth, x + t * stride, stride, t, row, n, emit);
    for (; t + 4 <= tokens; t += 4) float_tile<4>(panel, depth, x + t * stride, stride, t, row, n, emit);
    for (; t < tokens; t++) float_tile<1>(panel, depth, x + t * stride, stride, t, row, n, emit);
}

template <Encoding E, ScaleKind S, class Emit>
static void many_floats(const Matrix& m, std::int64_t begin, std::int64_t end, const float* x, std::int64_t stride, std::int64_t tokens,
                        Emit emit) {
    const std::int64_t depth = blocks_of(m.cols) * kBlock;
    float* panel = static_cast<float*>(thread_buffer(static_cast<std::size_t>(depth) * kPanelRows * 4));
    for (std::int64_t row = begin; row < end; row += kPanelRows) {
        const std::int64_t n = end - row < kPanelRows ? end - row : kPanelRows;
        float_panel<E, S>(m, row, n, panel);
        float_tiles(panel, depth, x, stride, tokens, row, n, emit);
    }
}

#if defined(V4_BF16)
constexpr int kPairRows = 32;  // rows of a BF16 panel: two vectors of 16, each lane a pair of columns

V4_INLINE void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// a power of two times BF16 values, exactly; scales so extreme that an exponent could overflow take the slow way
V4_INLINE __m512i scaled(__m512i w, __m512i exponents, bool simple, const float* factors) {
    if (__builtin_expect(simple, 1)) {
        // neither zero nor NaN
        const __m512i size = _mm512_and_si512(w, _mm512_set1_epi16(0x7fff)), one = _mm512_set1_epi16(1);
        const __mmask32 number = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, one), _mm512_set1_epi16(0x7f7f));
        return _mm512_mask_add_epi16(w, number, w, exponents);
    }
    alignas(64) std::uint16_t v[32];
    _mm512_store_si512(v, w);
    for (int i = 0; i < 32; i++) v[i] = float_bf16(bf16_float(v[i]) * factors[i / 2]);
    return _mm512_load_si512(v);
}

#if !defined(V4_AMX)
// rows [first, first + n) as pairs [blocks * 64][32 rows] of BF16, scales folded in, absent rows zero
template <Encoding E>
static void pair_panel(const Matrix& m, std::int64_t first, std::int64_t n, std::uint32_t* panel) {
    const Tables tabs = tables();
    const std::int64_t blocks = blocks_of(m.cols), whole = m.cols / kBlock, per_block = block_bytes(E);
    alignas(64) std::uint8_t tail[256] = {};
    for (int half = 0; half < 2; half++)
        for (std::int64_t b = 0; b < blocks; b++) {
            __m512i rows[kVectors][16];
            for (int r = 0; r < 16; r++) {
                if (16 * half + r >= n) {
                    for (int v = 0; v < kVectors; v++) rows[v][r] = _mm512_setzero_si512();
                    continue;
                }
                const std::int64_t row = first + 16 * half + r;
                const std::uint8_t* p = m.data + row * m.row_bytes + b * per_block;
                if (b == whole) {
                    __builtin_memcpy(tail, p, static_cast<std::size_t>(m.row_bytes - whole * per_block));
                    p = tail;
                }
                __m512i w[kVectors];
                decode<E>(p, tabs, w);
                if constexpr (E == kFp8 || E == kFp4) {
                    const std::uint8_t* scale = m.scale + row / m.tile_rows * m.scale_row_bytes;
                    std::uint8_t bytes[4] = {127, 127, 127, 127};
                    if constexpr (E == kFp8) __builtin_memset(bytes, scale[b], 4);
                    else {
                        const std::int64_t left = (m.cols - b * kBlock + 31) / 32;
                        __builtin_memcpy(bytes, scale + 4 * b, static_cast<std::size_t>(left < 4 ? left : 4));
                    }
                    bool simple = true;
                    alignas(64) float factors[16];
                    for (int g = 0; g < 4; g++) simple = simple && bytes[g] >= 16 && bytes[g] <= 232;
                    __m512i exponents;
                    if constexpr (E == kFp8) {
                        exponents = _mm512_set1_epi16(static_cast<short>((bytes[0] - 127) * 128));
                    } else {
                        // group g stands in lanes 4g..4g+3
                        std::uint32_t four;
                        __builtin_memcpy(&four, bytes, 4);
                        const __m128i wide = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(static_cast<int>(four)));
                        const __m128i e = _mm_slli_epi32(_mm_sub_epi32(wide, _mm_set1_epi32(127)), 7);
                        const __m128i both = _mm_or_si128(_mm_and_si128(e, _mm_set1_epi32(0xffff)), _mm_slli_epi32(e, 16));
                        const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                        exponents = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(both));
                    }
                    if (!simple)
                        for (int i = 0; i < 16; i++) factors[i] = ue8m0(bytes[i / 4]);
                    for (int v = 0; v < kVectors; v++) w[v] = scaled(w[v], exponents, simple, factors);
                }
                for (int v = 0; v < kVectors; v++) rows[v][r] = w[v];
            }
            for (int v = 0; v < kVectors; v++) {
                transpose_16x16(rows[v]);
                for (int k = 0; k < 16; k++)
                    _mm512_store_si512(panel + ((b * 64 + v * 16 + k) * kPairRows + 16 * half), rows[v][k]);
            }
        }
}

#endif

// M tokens with a panel; a token's block is `terms` runs of 128 values, each of which meets the same pairs
template <int M, class Emit>
static inline __attribute__((always_inline)) void pair_tile(const std::uint32_t* panel, std::int64_t blocks, int terms, const Packed* x,
                                                            std::int64_t stride, std::int64_t token, std::int64_t row, std::int64_t n,
                                                            Emit emit) {
    __m512 sum[M][2];
    for (int t = 0; t < M; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (std::int64_t b = 0; b < blocks; b++)
        for (int term = 0; term < terms; term++) {
            const std::uint32_t* w = panel + b * 64 * kPairRows;
            const Packed* a = x + (b * terms + term) * kBlock;
            for (int k = 0; k < 64; k++) {
                const __m512bh w0 = (__m512bh)_mm512_load_si512(w + k * kPairRows), w1 = (__m512bh)_mm512_load_si512(w + k * kPairRows + 16);
#pragma GCC unroll 12
                for (int t = 0; t < M; t++) {
                    int pair;
                    __builtin_memcpy(&pair, a + t * stride + 2 * k, 4);
                    const __m512bh v = (__m512bh)_mm512_set1_epi32(pair);
                    sum[t][0] = _mm512_dpbf16_ps(sum[t][0], w0, v);
                    sum[t][1] = _mm512_dpbf16_ps(sum[t][1], w1, v);
                }
            }
        }
    alignas(64) float out[kPairRows];
    for (int t = 0; t < M; t++) {
        _mm512_store_ps(out, sum[t][0]);
        _mm512_store_ps(out + 16, sum[t][1]);
        emit(token + t, row, out, static_cast<int>(n));
    }
}

template <class Emit>
static void pair_tiles(const std::uint32_t* panel, std::int64_t blocks, int terms, const Packed* x, std::int64_t stride,
                       std::int64_t tokens, std::int64_t row, std::int64_t n, Emit emit) {
    std::int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile) pair_tile<kTile>(panel, blocks, terms, x + t * stride, stride, t, row, n, emit);
    for (; t + 4 <= tokens; t += 4) pair_tile<4>(panel, blocks, terms, x + t * stride, stride, t, row, n, emit);
    for (; t < tokens; t++) pair_tile<1>(panel, blocks, terms, x + t * stride, stride, t, row, n, emit);
}

#if !defined(V4_AMX)
template <Encoding E, class Emit>
static void many_terms(const Matrix& m, std::int64_t begin, std::int64_t end, const Packed* x, std::int64_t stride, std::int64_t tokens,
                       int terms, Emit emit) {
    const std::int64_t blocks = blocks_of(m.cols);
    std::uint32_t* panel = static_cast<std::uint32_t*>(thread_buffer(static_cast<std::size_t>(blocks) * 64 * kPairRows * 4));
    for (std::int64_t row = begin; row < end; row += kPairRows) {
        const std::int64_t n = end - row < kPairRows ? end - row : kPairRows;
        pair_panel<E>(m, row, n, panel);
        pair_tiles(panel, blocks, terms, x, stride, tokens, row, n, emit);
    }
}
#endif
#endif

// emit(token, row, values, count) for rows [begin, end): as `multiply`, for many tokens; false where this matrix has no such way
template <class Emit>
static bool multiply_many(const Matrix& m, std::int64_t begin, std::int64_t end, const char* packed, std::int64_t tokens, int terms,
                          Emit emit) {
    const std::int64_t stride = packed_row_bytes(m, terms) / (terms ? 2 : 4);
#if defined(V4_AMX)
    if (terms) return false;  // what is not for tiles
#elif defined(V4_BF16)
    if (terms) {
        const Packed* x = reinterpret_cast<const Packed*>(packed);
        if (m.encoding == kFp8 && m.scale_kind == kUe8m0 && m.tile_cols == kBlock) many_terms<kFp8>(m, begin, end, x, stride, tokens, terms, emit);
        else if (m.encoding == kFp4) many_terms<kFp4>(m, begin, end, x, stride, tokens, terms, emit);
        else if (m.encoding == kBFloat16) many_terms<kBFloat16>(m, begin, end, x, stride, tokens, terms, emit);
        else return false;  // a float32 scale times an FP8 value is no BF16 value
        return true;
    }
#endif
    const float* x = reinterpret_cast<const float*>(packed);
    if (m.encoding == kFp8 && m.scale_kind == kUe8m0) many_floats<kFp8, kUe8m0>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kFp8) many_floats<kFp8, kScaleFloat32>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kFp4) many_floats<kFp4, kUe8m0>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kBFloat16) many_floats<kBFloat16, kNoScale>(m, begin, end, x, stride, tokens, emit);
    else many_floats<kFloat32, kNoScale>(m, begin, end, x, stride, tokens, emit);
    return true;
}
