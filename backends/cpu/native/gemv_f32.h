// Products with a stored matrix in float32 arithmetic. Included inside a namespace of its level.
// Every (row, token) is summed block by block in one order, whatever the batch and the number of threads are.

// 128 elements of a matrix row; FP8 as 2**-8 of their value, FP4 as twice their value, see `unit`
template <Encoding E>
V4_INLINE void decode_wide(const std::uint8_t* p, float* out) {
    if constexpr (E == kFloat32) {
        __builtin_memcpy(out, p, 512);
    } else if constexpr (E == kBFloat16) {
        for (int i = 0; i < kBlock; i += W) store(out + i, load_bf16(reinterpret_cast<const std::uint16_t*>(p) + i));
    } else if constexpr (E == kFp8) {
        for (int i = 0; i < kBlock; i += W) store(out + i, load_fp8_256th(p + i));
    } else {
#if defined(V4_AVX2) || defined(V4_AVX512)
        const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), low = _mm_set1_epi8(15);
        for (int i = 0; i < kBlock; i += 32) {
            const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i / 2));
            const __m128i even = _mm_shuffle_epi8(values, _mm_and_si128(b, low));
            const __m128i odd = _mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(b, 4), low));
            const __m128i half[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
            for (int h = 0; h < 2; h++) {
#if defined(V4_AVX512)
                _mm512_storeu_ps(out + i + 16 * h, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(half[h])));
#else
                _mm256_storeu_ps(out + i + 16 * h, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half[h])));
                _mm256_storeu_ps(out + i + 16 * h + 8, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(half[h], 8))));
#endif
            }
        }
#else
        static const float twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
        for (int i = 0; i < kBlock / 2; i++) {
            out[2 * i] = twice[p[i] & 15];
            out[2 * i + 1] = twice[p[i] >> 4];
        }
#endif
    }
}
template <Encoding E>
constexpr float unit = E == kFp8 ? 256.0f : E == kFp4 ? 0.5f : 1.0f;

// sum over one block; FP4 has a scale for every 32 columns
template <Encoding E, ScaleKind S>
V4_INLINE F block_sum(const float* w, const float* x, const std::uint8_t* scale, std::int64_t block, std::int64_t groups, F total) {
    if constexpr (E == kFp4) {
        for (int g = 0; g < 4 && block * 4 + g < groups; g++) {
            F part = set(0);
            for (int i = 32 * g; i < 32 * g + 32; i += W) part = fma(load(w + i), load(x + i), part);
            total = fma(part, set(ue8m0(scale[block * 4 + g]) * unit<E>), total);
        }
        return total;
    } else {
        F a = set(0), b = a;
        for (int i = 0; i < kBlock; i += 2 * W) {
            a = fma(load(w + i), load(x + i), a);
            b = fma(load(w + i + W), load(x + i + W), b);
        }
        if constexpr (S == kNoScale) return total + (a + b);
        float f;
        if constexpr (S == kUe8m0) f = ue8m0(scale[block]);
        else __builtin_memcpy(&f, scale + 4 * block, 4);
        // not to the scale, which may be so large that this would be infinite
        return fma((a + b) * set(unit<E>), set(f), total);
    }
}

// emit(token, row, values, count) for rows [begin, end) and all tokens
template <Encoding E, ScaleKind S, class Emit>
static void rows_of_floats(const Matrix& m, std::int64_t begin, std::int64_t end, const float* x, std::int64_t x_stride,
                           std::int64_t tokens, Emit emit) {
    const std::int64_t blocks = blocks_of(m.cols), whole = m.cols / kBlock, per_block = block_bytes(E), groups = (m.cols + 31) / 32;
    constexpr std::int64_t kTokens = 32;
    alignas(64) float w[kBlock];
    std::uint8_t tail[512];
    for (std::int64_t row = begin; row < end; row++) {
        const std::uint8_t* scale = S == kNoScale ? nullptr : m.scale + row / m.tile_rows * m.scale_row_bytes;
        for (std::int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
            const std::int64_t n = tokens - t0 < kTokens ? tokens - t0 : kTokens;
            F total[kTokens];
            for (std::int64_t i = 0; i < n; i++) total[i] = set(0);
            for (std::int64_t b = 0; b < blocks; b++) {
                const std::uint8_t* p = m.data + row * m.row_bytes + b * per_block;
                if (b == whole) {  // never read past the end of a row: it may be the end of the mapped file
                    __builtin_memset(tail, 0, sizeof tail);
                    __builtin_memcpy(tail, p, static_cast<std::size_t>(m.row_bytes - whole * per_block));
                    p = tail;
                }
                decode_wide<E>(p, w);
                for (std::int64_t i = 0; i < n; i++)
                    total[i] = block_sum<E, S>(w, x + (t0 + i) * x_stride + b * kBlock, scale, b, groups, total[i]);
            }
            for (std::int64_t i = 0; i < n; i++) {
                const float found = sum(total[i]);
                emit(t0 + i, row, &found, 1);
            }
        }
    }
}
