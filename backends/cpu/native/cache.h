// Cache rows: how KV rows and index keys are stored, and where an entry lies. Included inside the level's namespace.

V4_INLINE void round_bf16(float* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; i++) x[i] = bf16_float(float_bf16(x[i]));
}

// E4M3 code of a value already on its grid, |x| <= 448
V4_INLINE std::uint8_t fp8_code(float x) {
    const std::uint32_t b = float_bits(x), sign = b >> 24 & 0x80;
    const std::int32_t e = static_cast<std::int32_t>(b >> 23 & 0xff) - 127;
    if ((b & 0x7fffffff) == 0) return static_cast<std::uint8_t>(sign);
    if (e < -6) return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>((x < 0 ? -x : x) * 512.0f));
    return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(e + 7) << 3 | (b >> 20 & 7));
}

// one row of `dim` values, the last `rope` of them rotary; FP8 roundings of the plain part are exact if it is on the grid already
static void store_kv(const Cache& cache, std::int64_t row, const float* x, std::int64_t dim, std::int64_t rope) {
    std::uint8_t* p = cache.data + row * cache.row_bytes;
    if (cache.format == kCacheFloat32) {
        __builtin_memcpy(p, x, static_cast<std::size_t>(dim) * 4);
    } else if (cache.format == kCacheBFloat16) {
        for (std::int64_t i = 0; i < dim; i++) reinterpret_cast<std::uint16_t*>(p)[i] = float_bf16(x[i]);
    } else {
        const std::int64_t plain = dim - rope, groups = (plain + 63) / 64;
        std::uint16_t* tail = reinterpret_cast<std::uint16_t*>(p + plain);
        std::uint8_t* scales = p + plain + 2 * rope;
        for (std::int64_t g = 0; g < groups; g++) {
            const std::int64_t first = g * 64, n = plain - first < 64 ? plain - first : 64;
            float amax = 0;
            for (std::int64_t i = 0; i < n; i++) {
                const float a = x[first + i] < 0 ? -x[first + i] : x[first + i];
                amax = a > amax ? a : amax;
            }
            scales[g] = fp8_scale_byte(amax);
            const float inverse = 1.0f / ue8m0(scales[g]);
            for (std::int64_t i = 0; i < n; i++) {
                float v = x[first + i] * inverse;
                v = v > 448.0f ? 448.0f : v < -448.0f ? -448.0f : v;
                p[first + i] = fp8_code(fp8_grid(v));
            }
        }
        for (std::int64_t i = 0; i < rope; i++) tail[i] = float_bf16(x[plain + i]);
        for (std::int64_t at = plain + 2 * rope + groups; at < cache.row_bytes; at++) p[at] = 0;
    }
}

static void load_kv(const Cache& cache, std::int64_t row, float* out, std::int64_t dim, std::int64_t rope) {
    const std::uint8_t* p = cache.data + row * cache.row_bytes;
    if (cache.format == kCacheFloat32) {
        __builtin_memcpy(out, p, static_cast<std::size_t>(dim) * 4);
    } else if (cache.format == kCacheBFloat16) {
        read_row(Rows{const_cast<std::uint8_t*>(p), 0, kBFloat16, 0}, 0, dim, out);
    } else {
        const std::int64_t plain = dim - rope;
        for (std::int64_t first = 0; first < plain; first += 64) {
            const std::int64_t n = plain - first < 64 ? plain - first : 64;
            // FP8 is read as a 256th of its value
            const float scale = ue8m0(p[plain + 2 * rope + first / 64]) * 256.0f;
            std::int64_t i = 0;
            for (; i + W <= n; i += W) store(out + first + i, load_fp8_256th(p + first + i) * set(scale));
            if (i < n) {
                std::uint8_t rest[16] = {};
                float wide[16];
                __builtin_memcpy(rest, p + first + i, static_cast<std::size_t>(n - i));
                store(wide, load_fp8_256th(rest));
                for (std::int64_t k = 0; i + k < n; k++) out[first + i + k] = wide[k] * scale;
            }
        }
        read_row(Rows{const_cast<std::uint8_t*>(p) + plain, 0, kBFloat16, 0}, 0, rope, out + plain);
    }
}

// flat row of an entry of sequence `b`; an absent entry or page lies in the last page, which belongs to nobody
V4_INLINE std::int64_t entry_row(const Step& s, const Cache& cache, std::int64_t b, std::int64_t entry) {
    const std::int64_t at = entry / cache.rows;
    const std::int64_t page = entry < 0 || at >= s.pages ? -1 : s.block_table[b * s.pages + at];
    return page < 0 ? (cache.outer - 1) * cache.rows : page * cache.rows + entry % cache.rows;
}
