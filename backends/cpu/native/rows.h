// Activations in whatever float type they have, row by row. Included inside the level's namespace.

V4_INLINE void read_row(const Rows& x, std::int64_t row, std::int64_t n, float* out) {
    if (x.dtype == kBFloat16) {
        const std::uint16_t* p = reinterpret_cast<const std::uint16_t*>(x.data) + row * x.stride;
        std::int64_t i = 0;
        for (; i + W <= n; i += W) store(out + i, load_bf16(p + i));
        for (; i < n; i++) out[i] = bf16_float(p[i]);
    } else {
        __builtin_memcpy(out, reinterpret_cast<const float*>(x.data) + row * x.stride, static_cast<std::size_t>(n) * 4);
    }
}

V4_INLINE void write_row(const Rows& y, std::int64_t row, std::int64_t first, std::int64_t n, const float* in) {
    if (y.dtype == kBFloat16) {
        std::uint16_t* p = reinterpret_cast<std::uint16_t*>(y.data) + row * y.stride + first;
        std::int64_t i = 0;
        for (; i + W <= n; i += W) store_bf16(p + i, load(in + i));
        for (; i < n; i++) p[i] = float_bf16(in[i]);
    } else {
        __builtin_memcpy(reinterpret_cast<float*>(y.data) + row * y.stride + first, in, static_cast<std::size_t>(n) * 4);
    }
}

V4_INLINE void write_one(const Rows& y, std::int64_t row, std::int64_t at, float value) {
    if (y.dtype == kBFloat16) reinterpret_cast<std::uint16_t*>(y.data)[row * y.stride + at] = float_bf16(value);
    else reinterpret_cast<float*>(y.data)[row * y.stride + at] = value;
}

// E4M3 of |x| <= 448 to the nearest, ties to even, and back: what storing in FP8 does to a value
V4_INLINE float fp8_grid(float x) {
    const float a = x < 0 ? -x : x;
    // the spacing of E4M3 at a: 2**-9 below 2**-6, else 2**(exponent - 3)
    const std::uint32_t e = float_bits(a) >> 23;
    const std::int32_t exponent = static_cast<std::int32_t>(e) - 127 < -6 ? -6 : static_cast<std::int32_t>(e) - 127;
    const float magic = bits_float(static_cast<std::uint32_t>(exponent - 3 + 127 + 23) << 23) * 1.5f;
    const float rounded = (a + magic) - magic;
    return x < 0 ? -rounded : rounded;
}

// the power of two that brings a group into E4M3: 2**ceil(log2(max(amax, 1e-4) / 448)), from the bits
V4_INLINE std::uint8_t fp8_scale_byte(float amax) {
    const std::uint32_t b = float_bits((amax < 1e-4f ? 1e-4f : amax) * (1.0f / 448.0f));
    return static_cast<std::uint8_t>((b >> 23 & 0xff) + ((b & 0x7fffff) != 0));
}

// round a group in place to the FP8 grid of `Q8`
V4_INLINE void q8_round(float* x, std::int64_t n) {
    float amax = 0;
    for (std::int64_t i = 0; i < n; i++) {
        const float a = x[i] < 0 ? -x[i] : x[i];
        amax = a > amax ? a : amax;
    }
    const std::uint8_t byte = fp8_scale_byte(amax);
    const float scale = ue8m0(byte), inverse = 1.0f / scale;
    for (std::int64_t i = 0; i < n; i++) {
        float v = x[i] * inverse;
        v = v > 448.0f ? 448.0f : v < -448.0f ? -448.0f : v;
        x[i] = fp8_grid(v) * scale;
    }
}
