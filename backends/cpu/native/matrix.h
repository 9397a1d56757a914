// A matrix as stored in the checkpoint, and the ways its elements are encoded.
#pragma once
#include <cstdint>

namespace v4 {

enum Encoding : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFp8 = 2, kFp4 = 3 };
enum ScaleKind : std::int32_t { kNoScale = 0, kUe8m0 = 1, kScaleFloat32 = 2 };

constexpr int kBlock = 128;  // columns that share one pass of the inner loop; FP8 tiles and four FP4 groups fit exactly

struct Matrix {
    const std::uint8_t* data;   // [rows, row_bytes]
    const std::uint8_t* scale;  // [ceil(rows / tile_rows), scale_row_bytes]
    std::int64_t rows, cols, row_bytes, scale_row_bytes;
    std::int32_t tile_rows, tile_cols;
    Encoding encoding;
    ScaleKind scale_kind;
};

static inline std::int64_t blocks_of(std::int64_t cols) { return (cols + kBlock - 1) / kBlock; }
static inline constexpr std::int64_t block_bytes(Encoding e) { return e == kFloat32 ? 512 : e == kBFloat16 ? 256 : e == kFp8 ? 128 : 64; }

static inline float bits_float(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
static inline std::uint32_t float_bits(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
static inline float ue8m0(std::uint8_t byte) {
    return byte == 255 ? bits_float(0x7fc00000) : bits_float(byte ? std::uint32_t{byte} << 23 : 0x00400000);
}
static inline float bf16_float(std::uint16_t h) { return bits_float(std::uint32_t{h} << 16); }
// to nearest, ties to even
static inline std::uint16_t float_bf16(float x) {
    std::uint32_t b = float_bits(x);
    if ((b & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>((b >> 16) | 0x40);
    return static_cast<std::uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

}  // namespace v4
