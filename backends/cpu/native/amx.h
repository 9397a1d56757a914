// Products by tiles of the matrix unit: rows of a stored matrix, decoded with their scales into tiles, meet packed tokens, which stand side by
// side as the unit wants its second operand. Included inside the level's namespace.
//
// Tiles 0-3 hold sums (16 rows by 16 tokens, float32), 4-5 rows (16 by 32 columns, BF16), 6-7 tokens (16 pairs of columns by 16).
// With V4_AMX_EMULATED the same text runs on any processor of the level below, tile operations being plain loops: a test's stand-in.

#if defined(V4_AMX_EMULATED)
struct EmulatedTiles {
    float sum[4][16][16];
    std::uint16_t a[2][16][32], b[2][16][32];
};
static thread_local EmulatedTiles tile_unit;

V4_INLINE void tile_begin() {}
V4_INLINE void tile_end() {}
template <int C>
V4_INLINE void tile_zero() { __builtin_memset(tile_unit.sum[C], 0, sizeof tile_unit.sum[C]); }
template <int A>
V4_INLINE void tile_load_rows(const void* p, std::int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tile_unit.a[A][r], static_cast<const char*>(p) + r * stride, 64);
}
template <int B>
V4_INLINE void tile_load_tokens(const void* p, std::int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tile_unit.b[B][r], static_cast<const char*>(p) + r * stride, 64);
}
template <int C, int A, int B>
V4_INLINE void tile_dot() {
    // a row of sums at a time, by vectors: sanitizers watch every access of a loop over numbers
    for (int m = 0; m < 16; m++) {
        __m512 sum = _mm512_loadu_ps(tile_unit.sum[C][m]);
        for (int k = 0; k < 16; k++) {
            const __m512i pairs = _mm512_loadu_si512(tile_unit.b[B][k]);
            const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
            sum = _mm512_fmadd_ps(_mm512_set1_ps(bf16_float(tile_unit.a[A][m][2 * k])), low, sum);
            sum = _mm512_fmadd_ps(_mm512_set1_ps(bf16_float(tile_unit.a[A][m][2 * k + 1])), high, sum);
        }
        _mm512_storeu_ps(tile_unit.sum[C][m], sum);
    }
}
template <int C>
V4_INLINE void tile_store(float* p, std::int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(reinterpret_cast<char*>(p) + r * stride, tile_unit.sum[C][r], 64);
}
#else
V4_INLINE void tile_begin() {
    // palette 1: eight tiles of 16 rows of 64 bytes
    struct alignas(64) Config {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
}
V4_INLINE void tile_end() { asm volatile("tilerelease"); }
// in assembly, since tile numbers come from templates, which the compiler's macros cannot take
template <int C>
V4_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(C)); }
template <int A>
V4_INLINE void tile_load_rows(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(4 + A) : "memory");
}
template <int B>
V4_INLINE void tile_load_tokens(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(6 + B) : "memory");
}
template <int C, int A, int B>
V4_INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(4 + A), "i"(6 + B)); }
template <int C>
V4_INLINE void tile_store(float* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(C) : "memory");
}
#endif

// the scales of sixteen groups of 32 columns
V4_INLINE __m128i group_scales(const std::uint8_t* scale, std::int64_t groups) {
    if (__builtin_expect(groups >= 16, 1)) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale));
    return _mm_mask_loadu_epi8(_mm_set1_epi8(127), static_cast<__mmask16>((1u << groups) - 1), scale);
}

// their exponents as they are added to pairs of BF16
V4_INLINE void group_exponents(__m128i scales, std::int32_t* out) {
    // each byte as two words
    const __m512i words = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(scales), _mm512_set1_epi32(0x00010001));
    _mm512_store_si512(out, _mm512_sub_epi16(_mm512_slli_epi16(words, 7), _mm512_set1_epi16(127 << 7)));
}

constexpr std::int64_t kTileBytes = 1024;  // 16 rows of 32 BF16
constexpr std::int64_t kRun = 4;           // blocks of a row decoded at a time

// 32 FP4 codes, one in the lowest bits of every word (a table repeats, so that what stands above them is nothing), in the order of tiles
V4_INLINE __m512i fp4_shifts() { return _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0); }
V4_INLINE __m512i fp4_codes(const std::uint8_t* p, __m512i shifts) {
    return _mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), shifts);
}

// 16 rows of a matrix, or fewer at its end, decoded in runs of kRun blocks, row after row.
template <Encoding E>
struct TilePanel {
    static constexpr bool scaled_by_blocks = E == kFp8 || E == kFp4;
    const Matrix& m;
    const Tables tabs = tables();
    std::int64_t first = 0, rows = 0, whole, groups;

    explicit TilePanel(const Matrix& matrix) : m(matrix), whole(matrix.cols / kBlock), groups((matrix.cols + 31) / 32) {}

    void start(std::int64_t row, std::int64_t n) {
        first = row;
        rows = n;
    }

    // blocks [begin, end) of row `r` into line `r` of their tiles, scales folded in; a row beyond the last is zero
    inline __attribute__((always_inline)) void decode_row(std::int64_t r, std::int64_t begin, std::int64_t end, char* tiles) const {
        constexpr std::int64_t per_block = block_bytes(E);
        tiles += 64 * r;
        if (__builtin_expect(r >= rows, 0)) {
            for (std::int64_t v = 0; v < (end - begin) * kVectors; v++) _mm512_store_si512(tiles + v * kTileBytes, _mm512_setzero_si512());
            return;
        }
        const std::uint8_t *p = m.data + (first + r) * m.row_bytes + begin * per_block, *scale = nullptr;
        if constexpr (scaled_by_blocks) scale = m.scale + (first + r) / m.tile_rows * m.scale_row_bytes;
        alignas(64) std::uint8_t tail[256];
        alignas(64) std::int32_t exponents[16];
        bool simple = true;
        if constexpr (E == kFp4) {
            const __m128i scales = group_scales(scale + 4 * begin, groups - 4 * begin);
            group_exponents(scales, exponents);
            simple = _mm_cmpgt_epu8_mask(_mm_sub_epi8(scales, _mm_set1_epi8(16)), _mm_set1_epi8(static_cast<char>(232 - 16))) == 0;
        }
        const __m512i shifts = fp4_shifts(), four = tabs.fp4;
        const __mmask32 nonzero = 0xfefefefeu;
#pragma GCC unroll 1
        for (std::int64_t b = begin; b < end; b++, p += per_block, tiles += kVectors * kTileBytes) {
            for (std::int64_t line = 0; line < per_block; line += 64) __builtin_prefetch(p + kAhead + line, 0, 3);
            const std::uint8_t* from = p;
            if (__builtin_expect(b == whole, 0)) {  // never read past the end of a row: it may be the end of the mapped file
                __builtin_memset(tail, 0, sizeof tail);
                __builtin_memcpy(tail, p, static_cast<std::size_t>(m.row_bytes - whole * per_block));
                from = tail;
            }
            if constexpr (E == kFp4) {
                if (__builtin_expect(!simple, 0)) {
                    decode_slowly(from, scale, b, tiles);
                    continue;
                }
                const std::int32_t* e = exponents + 4 * (b - begin);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) {
                    // all codes but the zeros are scaled in the table
                    const __m512i table = _mm512_mask_add_epi16(four, nonzero, four, _mm512_set1_epi32(e[v]));
                    _mm512_store_si512(tiles + v * kTileBytes, _mm512_permutexvar_epi16(fp4_codes(from + 16 * v, shifts), table));
                }
            } else if constexpr (E == kFp8) {
                const int byte = scale[b];
                if (__builtin_expect(byte < 16 || byte > 232, 0)) {
                    decode_slowly(from, scale, b, tiles);
                    continue;
                }
                const __m512i e = _mm512_set1_epi16(static_cast<short>((byte - 127) * 128));
                __m512i w[kVectors];
                decode<E>(from, tabs, w);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) _mm512_store_si512(tiles + v * kTileBytes, scaled(w[v], e, true, nullptr));
            } else {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) _mm512_store_si512(tiles + v * kTileBytes, _mm512_loadu_si512(from + 64 * v));
            }
        }
    }

private:
    // with scales whose exponents cannot simply be added
    __attribute__((noinline)) void decode_slowly(const std::uint8_t* from, const std::uint8_t* scale, std::int64_t b, char* tiles) const {
        __m512i w[kVectors];
        if constexpr (E == kFp4)
            for (int v = 0; v < kVectors; v++) w[v] = _mm512_permutexvar_epi16(fp4_codes(from + 16 * v, fp4_shifts()), tabs.fp4);
        else decode<E>(from, tabs, w);
        for (int v = 0; v < kVectors; v++) {
            const std::int64_t at = E == kFp4 ? 4 * b + v : b;
            const int byte = E == kFp8 || at < groups ? scale[at] : 127;
            float factors[16];
            for (float& f : factors) f = ue8m0(static_cast<std::uint8_t>(byte));
            w[v] = scaled(w[v], _mm512_set1_epi16(static_cast<short>((byte - 127) * 128)), byte >= 16 && byte <= 232, factors);
            _mm512_store_si512(tiles + v * kTileBytes, w[v]);
        }
    }
};

// sums of 16 rows (a tile as stored) given out token by token
template <class Emit>
V4_INLINE void emit_tile(const float* sums, std::int64_t token, std::int64_t tokens, std::int64_t row, std::int64_t n, Emit emit) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
    transpose_16x16(r);
    alignas(64) float out[16];
    for (std::int64_t t = 0; t < tokens && t < 16; t++) {
        _mm512_store_si512(out, r[t]);
        emit(token + t, row, out, static_cast<int>(n));
    }
}

V4_INLINE void tiles_zero() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
}

// emit(token, row, values, count) as `multiply`: 32 rows meet 32 tokens at a time
template <Encoding E, class Emit>
static void tile_rows(const Matrix& m, std::int64_t begin, std::int64_t end, const Packed* x, std::int64_t tokens, int terms, Emit emit) {
    const std::int64_t blocks = blocks_of(m.cols), half = blocks * kVectors * kTileBytes, group = half * terms;
    char* tiles = static_cast<char*>(thread_buffer(static_cast<std::size_t>(2 * half)));
    alignas(64) float sums[4][256];
    TilePanel<E> panel(m);
    tile_begin();
    for (std::int64_t row = begin; row < end; row += 32) {
        const std::int64_t n = end - row < 16 ? end - row : 16, left = end - row - 16, more = left < 0 ? 0 : left < 16 ? left : 16;
        for (int part = 0; part < 2; part++) {
            panel.start(row + 16 * part, part ? more : n);
            for (std::int64_t b = 0; b < blocks; b += kRun)
                for (std::int64_t r = 0; r < 16; r++)
                    panel.decode_row(r, b, b + kRun < blocks ? b + kRun : blocks, tiles + part * half + b * kVectors * kTileBytes);
        }
        const char* a = reinterpret_cast<const char*>(x);
        for (std::int64_t t = 0; t < tokens; t += 32, a += 2 * group) {
            const bool both = tokens - t > 16;
            tiles_zero();
            const char *w = tiles, *one = a;
            for (std::int64_t b = 0; b < blocks; b++, w += kVectors * kTileBytes)
                for (int step = 0; step < kVectors * terms; step++, one += kTileBytes) {
                    const char* at = w + step % kVectors * kTileBytes;
                    tile_load_rows<0>(at, 64);
                    tile_load_tokens<0>(one, 64);
                    tile_dot<0, 0, 0>();
                    tile_load_rows<1>(at + half, 64);
                    tile_dot<1, 1, 0>();
                    if (!both) continue;
                    tile_load_tokens<1>(one + group, 64);
                    tile_dot<2, 0, 1>();
                    tile_dot<3, 1, 1>();
                }
            tile_store<0>(sums[0], 64);
            tile_store<1>(sums[1], 64);
            emit_tile(sums[0], t, tokens - t, row, n, emit);
            if (more > 0) emit_tile(sums[1], t, tokens - t, row + 16, more, emit);
            if (!both) continue;
            tile_store<2>(sums[2], 64);
            tile_store<3>(sums[3], 64);
            emit_tile(sums[2], t + 16, tokens - t - 16, row, n, emit);
            if (more > 0) emit_tile(sums[3], t + 16, tokens - t - 16, row + 16, more, emit);
        }
    }
    tile_end();
}
