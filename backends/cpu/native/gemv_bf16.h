// Products of packed rows with a stored matrix where the processor multiplies BF16 pairs into float32 (AVX-512 BF16 + VBMI).
// Included inside a namespace of its level, after the target pragma.
//
// A float32 input is the exact sum of up to three BF16 terms, so one inner loop serves inputs that are BF16 already (one term) and
// float32 ones (three). Every (row, token) is summed in the same order whatever the batch and the number of threads are.

constexpr int kVectors = kBlock / 32;  // BF16 vectors of one block
constexpr std::int64_t kAhead = 2048;  // bytes of a matrix that are asked for before they are needed

using Packed = std::uint16_t;

// Which column of a 128-column block stands at place i of the operand order of an encoding: the order in which its columns are decoded.
struct Order {
    std::uint8_t fp8[kBlock], fp4[kBlock], fp4_groups[kBlock];
    constexpr Order() : fp8(), fp4(), fp4_groups() {
        for (int i = 0; i < kBlock; i++) {
            const int vector = i / 32, place = i % 32;
            // unpacking works inside 128-bit lanes
            fp8[i] = static_cast<std::uint8_t>(vector / 2 * 64 + (vector & 1) * 8 + place / 8 * 16 + place % 8);
            // a word holds four columns, and each vector takes one nibble of every word
            fp4[i] = static_cast<std::uint8_t>(4 * place + vector);
            // for tiles a vector holds one group of 32 columns: each half of it four times, shifted by one column each time
            fp4_groups[i] = static_cast<std::uint8_t>(32 * vector + 16 * (place / 4 % 2) + 4 * (place % 4) + place / 8);
        }
    }
};
static constexpr Order order;

// the places of an operand order as indices into two natural vectors
struct Places {
    alignas(64) std::uint16_t fp8[kBlock], fp4[kBlock], fp4_groups[kBlock];
    constexpr Places() : fp8(), fp4(), fp4_groups() {
        for (int i = 0; i < kBlock; i++) {
            fp8[i] = static_cast<std::uint16_t>(order.fp8[i] % 64);
            fp4[i] = static_cast<std::uint16_t>(order.fp4[i] % 64);
            fp4_groups[i] = static_cast<std::uint16_t>(order.fp4_groups[i] % 32);
        }
    }
};
static constexpr Places places;

// one block of one input row -> `terms` times kVectors vectors, zero beyond its end; `groups`: FP4 in the order of tiles
static void pack_terms(Encoding e, const float* x, std::int64_t n, int terms, bool groups, Packed* out) {
    alignas(64) float block[kBlock] = {};
    __builtin_memcpy(block, x, static_cast<std::size_t>(n) * 4);
    for (int t = 0; t < terms; t++, out += kBlock) {
        __m512i natural[kVectors];
        for (int v = 0; v < kVectors; v++) {
            __m512 a = _mm512_load_ps(block + 32 * v), b = _mm512_load_ps(block + 32 * v + 16);
            natural[v] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            if (t + 1 == terms) continue;
            const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(natural[v])), 16);
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(natural[v], 1)), 16);
            _mm512_store_ps(block + 32 * v, _mm512_sub_ps(a, _mm512_castsi512_ps(low)));
            _mm512_store_ps(block + 32 * v + 16, _mm512_sub_ps(b, _mm512_castsi512_ps(high)));
        }
        for (int v = 0; v < kVectors; v++) {
            __m512i placed = natural[v];
            if (e == kFp8) {
                const __m512i at = _mm512_load_si512(places.fp8 + 32 * v);
                placed = _mm512_permutex2var_epi16(natural[v / 2 * 2], at, natural[v / 2 * 2 + 1]);
            } else if (e == kFp4 && groups) {
                placed = _mm512_permutexvar_epi16(_mm512_load_si512(places.fp4_groups + 32 * v), natural[v]);
            } else if (e == kFp4) {
                const __m512i at = _mm512_load_si512(places.fp4 + 32 * v);
                const __m512i low = _mm512_permutex2var_epi16(natural[0], at, natural[1]);
                const __m512i high = _mm512_permutex2var_epi16(natural[2], at, natural[3]);
                placed = _mm512_mask_blend_epi16(0xffff0000u, low, high);
            }
            _mm512_storeu_si512(out + 32 * v, placed);
        }
    }
}

struct Codes {
    alignas(64) std::uint8_t fp8_low[128], fp8_high[128];  // every FP8 code without its sign
    alignas(64) std::uint16_t fp4[32];                     // every FP4 code, twice: a place is looked up by five bits
    constexpr Codes() : fp8_low(), fp8_high(), fp4() {
        for (int code = 0; code < 128; code++) {
            const int e = code >> 3, m = code & 7, top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
            int h = 0;
            if (code == 127) h = 0x7fc0;
            else if (e) h = (e + 120) << 7 | m << 4;
            else if (m) h = (127 + top - 9) << 7 | (m << (7 - top) & 127);
            fp8_low[code] = static_cast<std::uint8_t>(h & 255);
            fp8_high[code] = static_cast<std::uint8_t>(h >> 8);
        }
        constexpr int e2m1[8] = {0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0};
        for (int i = 0; i < 32; i++) fp4[i] = static_cast<std::uint16_t>(e2m1[i & 7] | (i & 8 ? 0x8000 : 0));
    }
};
static constexpr Codes codes;

struct Tables {
    __m512i fp8_low[2], fp8_high[2], fp4;
};
V4_INLINE Tables tables() {
    return {{_mm512_load_si512(codes.fp8_low), _mm512_load_si512(codes.fp8_low + 64)},
            {_mm512_load_si512(codes.fp8_high), _mm512_load_si512(codes.fp8_high + 64)},
            _mm512_load_si512(codes.fp4)};
}

// One block of one matrix row as BF16 operands.
template <Encoding E>
static inline __attribute__((always_inline)) void decode(const std::uint8_t* p, const Tables& t, __m512i w[kVectors]) {
    if constexpr (E == kBFloat16) {
        for (int v = 0; v < kVectors; v++) w[v] = _mm512_loadu_si512(p + 64 * v);
    } else if constexpr (E == kFp8) {
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        for (int half = 0; half < 2; half++) {
            const __m512i b = _mm512_loadu_si512(p + 64 * half);
            const __m512i lo = _mm512_permutex2var_epi8(t.fp8_low[0], b, t.fp8_low[1]);
            __m512i hi = _mm512_permutex2var_epi8(t.fp8_high[0], b, t.fp8_high[1]);
            hi = _mm512_ternarylogic_epi32(hi, b, sign, 0xf8);  // hi | (b & sign)
            w[2 * half] = _mm512_unpacklo_epi8(lo, hi);
            w[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
        }
    } else {
        const __m512i b = _mm512_loadu_si512(p);
        w[0] = _mm512_permutexvar_epi16(b, t.fp4);
        w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), t.fp4);
        w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 8), t.fp4);
        w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 12), t.fp4);
    }
}

// UE8M0 bytes, one a lane, as float32: as `ue8m0`
V4_INLINE __m512 scales_of(__m512i bytes) {
    const __m512i f = _mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000));
    const __mmask16 none = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(f, none, _mm512_set1_epi32(0x7fc00000)));
}

// The factor of every lane of a block's partial sums; `scale` is the row of scales that serves the matrix row.
template <Encoding E, ScaleKind S>
static inline __attribute__((always_inline)) __m512 factors(const std::uint8_t* scale, std::int64_t block, int groups) {
    (void)groups;
    if constexpr (E == kBFloat16) {
        return _mm512_set1_ps(1.0f);
    } else if constexpr (E == kFp8) {
        if constexpr (S == kUe8m0) return _mm512_set1_ps(ue8m0(scale[block]));
        float f;
        __builtin_memcpy(&f, scale + 4 * block, 4);
        return _mm512_set1_ps(f);
    } else {
        // four groups of 32 columns; operand order puts group g into lanes 4g..4g+3
        const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        std::uint32_t four = 0;
        __builtin_memcpy(&four, scale + 4 * block, static_cast<std::size_t>(groups));
        return _mm512_permutexvar_ps(spread, scales_of(_mm512_cvtepu8_epi32(_mm_cvtsi32_si128(static_cast<int>(four)))));
    }
}

static inline __attribute__((always_inline)) __m512 dot(const __m512i w[kVectors], const std::uint16_t* x, int terms) {
    __m512 sum = _mm512_setzero_ps();
    for (int t = 0; t < terms; t++)
        for (int v = 0; v < kVectors; v++)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)w[v], (__m512bh)_mm512_load_si512(x + t * kBlock + 32 * v));
    return sum;
}

// sums of sixteen vectors, in their order
V4_INLINE __m512 sums_of(__m512 r[16]) {
    __m512 t[8];
    for (int i = 0; i < 8; i++) t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    __m512 u[4];
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // lane L of u[i] holds partial sums of vectors 4i..4i+3
    const __m512 v0 = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    const __m512 v1 = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v0, v1, 0x88), _mm512_shuffle_f32x4(v0, v1, 0xdd));
}

// the sum of one vector, added in the order of `sums_of`
V4_INLINE float sum_of(__m512 v) {
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    return _mm512_cvtss_f32(v);
}

// emit(token, row, values, count) for rows [begin, end) and all tokens of packed input
template <Encoding E, ScaleKind S, int Terms, class Emit>
static void rows_with(const Matrix& m, std::int64_t begin, std::int64_t end, const Packed* x, std::int64_t x_stride,
                      std::int64_t tokens, Emit emit) {
    const Tables t = tables();
    const std::int64_t blocks = blocks_of(m.cols), whole = m.cols / kBlock;
    constexpr std::int64_t per_block = block_bytes(E);
    const std::size_t rest = static_cast<std::size_t>(m.row_bytes - whole * per_block);
    constexpr int kRows = 16;
    alignas(64) std::uint8_t tail[256] = {};
    std::int64_t row = begin;
    // One row after another: the memory is read as one stream (rows side by side reach half of the rate), and what comes next is asked for,
    // since decoding keeps the processor from looking that far ahead. The blocks of a row are independent until they meet in `total`.
    if (tokens == 1)
        for (; row < end; row += kRows) {
            const std::int64_t n = end - row < kRows ? end - row : kRows;
            __m512 totals[kRows];
            for (std::int64_t r = 0; r < n; r++) {
                __m512 total = _mm512_setzero_ps();
                const std::uint8_t* p = m.data + (row + r) * m.row_bytes;
                const std::uint8_t* scale = S == kNoScale ? nullptr : m.scale + (row + r) / m.tile_rows * m.scale_row_bytes;
                std::int64_t b = 0;
                if constexpr (E == kFp4)
                    for (; b + 4 <= whole; b += 4) {
                        // sixteen scales at once; of a block the next four, each for four lanes, as in `factors`
                        const __m512 all = scales_of(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + 4 * b))));
                        __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
#pragma GCC unroll 4
                        for (int k = 0; k < 4; k++) {
                            __m512i w[kVectors];
                            __builtin_prefetch(p + (b + k) * per_block + kAhead);
                            decode<E>(p + (b + k) * per_block, t, w);
                            total = _mm512_fmadd_ps(dot(w, x + (b + k) * Terms * kBlock, Terms), _mm512_permutexvar_ps(spread, all), total);
                            spread = _mm512_add_epi32(spread, _mm512_set1_epi32(4));
                        }
                    }
#pragma GCC unroll 2
                for (; b < whole; b++) {
                    __m512i w[kVectors];
                    for (std::int64_t line = 0; line < per_block; line += 64) __builtin_prefetch(p + b * per_block + kAhead + line);
                    decode<E>(p + b * per_block, t, w);
                    total = _mm512_fmadd_ps(dot(w, x + b * Terms * kBlock, Terms), factors<E, S>(scale, b, 4), total);
                }
                if (whole < blocks) {  // never read past the end of a row: it may be the end of the mapped file
                    __m512i w[kVectors];
                    __builtin_memcpy(tail, p + whole * per_block, rest);
                    decode<E>(tail, t, w);
                    const int groups = static_cast<int>((m.cols - whole * kBlock + 31) / 32);
                    total = _mm512_fmadd_ps(dot(w, x + whole * Terms * kBlock, Terms), factors<E, S>(scale, whole, groups), total);
                }
                totals[r] = total;
            }
            for (std::int64_t r = n; r < kRows; r++) totals[r] = _mm512_setzero_ps();
            alignas(64) float found[kRows];
            _mm512_store_ps(found, sums_of(totals));
            emit(0, row, found, static_cast<int>(n));
        }
    constexpr std::int64_t kTokens = 32;
    for (; row < end; row++) {
        const std::uint8_t* scale = S == kNoScale ? nullptr : m.scale + row / m.tile_rows * m.scale_row_bytes;
        for (std::int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
            const std::int64_t n = tokens - t0 < kTokens ? tokens - t0 : kTokens;
            __m512 total[kTokens];
            for (std::int64_t i = 0; i < n; i++) total[i] = _mm512_setzero_ps();
            for (std::int64_t b = 0; b < blocks; b++) {
                const std::uint8_t* p = m.data + row * m.row_bytes + b * per_block;
                int groups = 4;
                if (b == whole) {  // never read past the end of a row: it may be the end of the mapped file
                    __builtin_memcpy(tail, p, rest);
                    p = tail;
                    groups = static_cast<int>((m.cols - whole * kBlock + 31) / 32);
                }
                __m512i w[kVectors];
                decode<E>(p, t, w);
                const __m512 f = factors<E, S>(scale, b, groups);
                for (std::int64_t i = 0; i < n; i++)
                    total[i] = _mm512_fmadd_ps(dot(w, x + (t0 + i) * x_stride + b * Terms * kBlock, Terms), f, total[i]);
            }
            for (std::int64_t i = 0; i < n; i++) {
                const float found = sum_of(total[i]);
                emit(t0 + i, row, &found, 1);
            }
        }
    }
}

template <Encoding E, ScaleKind S, class Emit>
static void rows_of_terms(const Matrix& m, std::int64_t begin, std::int64_t end, const Packed* x, std::int64_t x_stride,
                          std::int64_t tokens, int terms, Emit emit) {
    if (terms == 1) rows_with<E, S, 1>(m, begin, end, x, x_stride, tokens, emit);
    else rows_with<E, S, 3>(m, begin, end, x, x_stride, tokens, emit);
}
