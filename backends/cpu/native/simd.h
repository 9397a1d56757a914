// The vectors of one level: W floats at a time, and how stored numbers become them. Included inside the level's namespace.
// A level without instructions of its own uses the compiler's vectors, so every kernel has one text.

#if defined(V4_AVX512)
constexpr int W = 16;
using F = __m512;
using I = __m512i;
#define V4_INLINE static inline __attribute__((always_inline))
V4_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
V4_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
V4_INLINE F set(float a) { return _mm512_set1_ps(a); }
V4_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
V4_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
V4_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
V4_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
V4_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
V4_INLINE F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
V4_INLINE F load_bf16(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
// to nearest, ties to even, as `float_bf16`
V4_INLINE void store_bf16(std::uint16_t* p, F a) {
    const __m512i b = _mm512_castps_si512(a), high = _mm512_srli_epi32(b, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i found = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(found));
}
V4_INLINE F power_of_two(F n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }
// E4M3 -> half precision -> float32: halves keep E4M3's subnormals; the factor 2**8 is left to the caller's scale
V4_INLINE F load_fp8_256th(const std::uint8_t* p) {
    const __m256i b = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(b, 1), _mm256_set1_epi16(static_cast<short>(0xbfff))));
}
#elif defined(V4_AVX2)
constexpr int W = 8;
using F = __m256;
#define V4_INLINE static inline __attribute__((always_inline))
V4_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
V4_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
V4_INLINE F set(float a) { return _mm256_set1_ps(a); }
V4_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
V4_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
V4_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
V4_INLINE float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
V4_INLINE float largest(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
V4_INLINE F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
V4_INLINE F load_bf16(const std::uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
V4_INLINE F power_of_two(F n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
V4_INLINE F load_fp8_256th(const std::uint8_t* p) {
    const __m128i b = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8);
    return _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(b, 1), _mm_set1_epi16(static_cast<short>(0xbfff))));
}
#else
constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef std::int32_t I __attribute__((vector_size(16)));
#define V4_INLINE static inline __attribute__((always_inline))
V4_INLINE F load(const float* p) { F a; __builtin_memcpy(&a, p, sizeof a); return a; }
V4_INLINE void store(float* p, F a) { __builtin_memcpy(p, &a, sizeof a); }
V4_INLINE F set(float a) { return F{a, a, a, a}; }
V4_INLINE F fma(F a, F b, F c) { return a * b + c; }
V4_INLINE F max(F a, F b) { return a > b ? a : b; }
V4_INLINE F min(F a, F b) { return a < b ? a : b; }
V4_INLINE float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
V4_INLINE float largest(F a) { float m = a[0]; for (int i = 1; i < W; i++) m = a[i] > m ? a[i] : m; return m; }
V4_INLINE F round_even(F a) { const F magic = set(12582912.0f); return (a + magic) - magic; }
V4_INLINE F load_bf16(const std::uint16_t* p) { return F{bf16_float(p[0]), bf16_float(p[1]), bf16_float(p[2]), bf16_float(p[3])}; }
V4_INLINE F power_of_two(F n) { F r; for (int i = 0; i < W; i++) r[i] = bits_float(static_cast<std::uint32_t>(static_cast<int>(n[i]) + 127) << 23); return r; }
V4_INLINE F load_fp8_256th(const std::uint8_t* p) {
    F r;
    for (int i = 0; i < W; i++) {
        const int e = p[i] >> 3 & 15, m = p[i] & 7;
        const float a = e ? bits_float(static_cast<std::uint32_t>(e + 112) << 23 | static_cast<std::uint32_t>(m) << 20) : static_cast<float>(m) * 0x1p-17f;
        r[i] = p[i] & 128 ? -a : a;
    }
    return r;
}
#endif
#if !defined(V4_AVX512)
V4_INLINE void store_bf16(std::uint16_t* p, F a) {
    float x[W];
    store(x, a);
    for (int i = 0; i < W; i++) p[i] = float_bf16(x[i]);
}
#endif

// e**x for x <= 88, 0 below -87; relative error below 2e-7
V4_INLINE F exponential(F x) {
    x = max(x, set(-87.0f));
    const F n = round_even(x * set(1.44269504088896341f));
    F r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, r * r, r + set(1.0f));
    return p * power_of_two(n);
}

// sum of a[i] * b[i], four chains; a tail is read element by element, never past the end
V4_INLINE float dot_product(const float* a, const float* b, std::int64_t n) {
    F s0 = set(0), s1 = s0, s2 = s0, s3 = s0;
    std::int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        s0 = fma(load(a + i), load(b + i), s0);
        s1 = fma(load(a + i + W), load(b + i + W), s1);
        s2 = fma(load(a + i + 2 * W), load(b + i + 2 * W), s2);
        s3 = fma(load(a + i + 3 * W), load(b + i + 3 * W), s3);
    }
    for (; i + W <= n; i += W) s0 = fma(load(a + i), load(b + i), s0);
    float total = sum((s0 + s1) + (s2 + s3));
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

// sums over `streams` rows of n values each, `stride` apart in `a`, with T vectors of as many rows: out[t] of b[t] is the same whatever T is
template <int T>
V4_INLINE void dot_products(const float* a, std::int64_t stride, const float* const* b, std::int64_t b_stride, std::int64_t streams,
                            std::int64_t n, float* out) {
    F s[T][4];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < 4; i++) s[t][i] = set(0);
    for (std::int64_t j = 0; j < streams; j++) {
        const float* one = a + j * stride;
        std::int64_t i = 0;
        for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) {
                const F x = load(one + i + l * W);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) s[t][l] = fma(x, load(b[t] + j * b_stride + i + l * W), s[t][l]);
            }
        for (; i + W <= n; i += W)
            for (int t = 0; t < T; t++) s[t][0] = fma(load(one + i), load(b[t] + j * b_stride + i), s[t][0]);
        if (i < n) {
            // the rest of a row in a vector of its own, zero beyond its end
            alignas(64) float x[W] = {}, y[W];
            __builtin_memcpy(x, one + i, static_cast<std::size_t>(n - i) * 4);
            for (int t = 0; t < T; t++) {
                for (int l = 0; l < W; l++) y[l] = 0;
                __builtin_memcpy(y, b[t] + j * b_stride + i, static_cast<std::size_t>(n - i) * 4);
                s[t][1] = fma(load(x), load(y), s[t][1]);
            }
        }
    }
    for (int t = 0; t < T; t++) out[t] = sum((s[t][0] + s[t][1]) + (s[t][2] + s[t][3]));
}
