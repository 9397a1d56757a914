// Tokens in sixteens against a panel by tiles of the matrix unit. Included inside the level's namespace.
//
// A panel's pairs are laid out as the unit wants its second operand, and packed tokens as its first, so tiles are loaded where they lie.
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
V4_INLINE void tile_load_tokens(const void* p, std::int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tile_unit.a[A][r], static_cast<const char*>(p) + r * stride, 64);
}
template <int B>
V4_INLINE void tile_load_pairs(const void* p, std::int64_t stride) {
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
// in assembly, since tile numbers come from templates, which the compiler's macros cannot take; sums are tiles 0-3, tokens 4-5, pairs 6-7
template <int C>
V4_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(C)); }
template <int A>
V4_INLINE void tile_load_tokens(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(4 + A) : "memory");
}
template <int B>
V4_INLINE void tile_load_pairs(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(6 + B) : "memory");
}
template <int C, int A, int B>
V4_INLINE void tile_dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(4 + A), "i"(6 + B)); }
template <int C>
V4_INLINE void tile_store(float* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(C) : "memory");
}
#endif

template <int Groups, class Emit>
static void amx_tile(const std::uint32_t* panel, std::int64_t blocks, int terms, const Packed* x, std::int64_t stride, std::int64_t token,
                     std::int64_t row, std::int64_t n, Emit emit) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (Groups == 2) {
        tile_zero<2>();
        tile_zero<3>();
    }
    for (std::int64_t b = 0; b < blocks; b++)
        for (int term = 0; term < terms; term++)
            for (int step = 0; step < kVectors; step++) {
                const std::uint32_t* pairs = panel + (b * 64 + 16 * step) * kPairRows;
                const Packed* tokens = x + (b * terms + term) * kBlock + 32 * step;
                tile_load_pairs<0>(pairs, kPairRows * 4);
                tile_load_pairs<1>(pairs + 16, kPairRows * 4);
                tile_load_tokens<0>(tokens, stride * 2);
                tile_dot<0, 0, 0>();
                tile_dot<1, 0, 1>();
                if constexpr (Groups == 2) {
                    tile_load_tokens<1>(tokens + 16 * stride, stride * 2);
                    tile_dot<2, 1, 0>();
                    tile_dot<3, 1, 1>();
                }
            }
    alignas(64) float out[16 * Groups][kPairRows];
    tile_store<0>(out[0], kPairRows * 4);
    tile_store<1>(out[0] + 16, kPairRows * 4);
    if constexpr (Groups == 2) {
        tile_store<2>(out[16], kPairRows * 4);
        tile_store<3>(out[16] + 16, kPairRows * 4);
    }
    for (int t = 0; t < 16 * Groups; t++) emit(token + t, row, out[t], static_cast<int>(n));
}

// as `pair_tiles`, which takes the tokens that do not fill a tile
template <class Emit>
static void amx_tiles(const std::uint32_t* panel, std::int64_t blocks, int terms, const Packed* x, std::int64_t stride,
                      std::int64_t tokens, std::int64_t row, std::int64_t n, Emit emit) {
    std::int64_t t = 0;
    tile_begin();
    for (; t + 32 <= tokens; t += 32) amx_tile<2>(panel, blocks, terms, x + t * stride, stride, t, row, n, emit);
    for (; t + 16 <= tokens; t += 16) amx_tile<1>(panel, blocks, terms, x + t * stride, stride, t, row, n, emit);
    tile_end();
    pair_tiles(panel, blocks, terms, x + t * stride, stride, tokens - t, row, n,
               [&](std::int64_t token, std::int64_t r, const float* v, int count) { emit(t + token, r, v, count); });
}
