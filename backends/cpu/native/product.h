// y = x . weight^T for a stored matrix: packing of the tokens, and the products of packed tokens. Included inside the level's namespace.
//
// `terms` says how tokens are packed: 0 as float32, 1 as BF16, 3 as three BF16 values whose sum is the float32 value exactly.

constexpr std::int64_t kFewTokens = 32;  // up to here a token's result does not depend on the others: a decode step

// does this level multiply BF16 pairs, and does this matrix lend itself to it
V4_INLINE int terms_for(const Matrix& m, Encoding x, bool q8) {
#if defined(V4_BF16)
    return m.encoding == kFloat32 ? 0 : x == kBFloat16 || q8 ? 1 : 3;
#else
    (void)m, (void)x, (void)q8;
    return 0;
#endif
}

// Whether these tokens meet this matrix in tiles of the matrix unit.
V4_INLINE bool in_tiles(const Matrix& m, std::int64_t tokens, int terms) {
#if defined(V4_AMX)
    // a float32 scale times an FP8 value is no BF16 value
    return terms && tokens > kFewTokens && !(m.encoding == kFp8 && (m.scale_kind != kUe8m0 || m.tile_cols != kBlock));
#else
    (void)m, (void)tokens, (void)terms;
    return false;
#endif
}

// Bytes of one packed token, and how many of them a group of tokens takes that are packed together and meet a matrix together. Packed
// tokens stand one after another; for tiles sixteen of them stand side by side, pair by pair of columns.
V4_INLINE std::int64_t packed_row_bytes(const Matrix& m, int terms) { return blocks_of(m.cols) * kBlock * (terms ? 2 * terms : 4); }
V4_INLINE std::int64_t packed_rows(const Matrix& m, std::int64_t tokens, int terms) {
    return in_tiles(m, tokens, terms) ? (tokens + 15) / 16 * 16 : tokens;
}
V4_INLINE std::int64_t packed_bytes(const Matrix& m, std::int64_t tokens, int terms) {
    return packed_rows(m, tokens, terms) * packed_row_bytes(m, terms);
}

// The rows of a matrix dealt among the team in whole panels: body(begin, end) for each piece this member takes.
template <class Body>
static void deal_rows(const Team& team, int phase, std::int64_t rows, std::int64_t tokens, Body body) {
    const std::int64_t panel = tokens > kFewTokens ? 32 : 16;
    for (Span piece; team.take(phase, (rows + panel - 1) / panel, 2, piece);)
        body(piece.begin * panel, piece.end * panel < rows ? piece.end * panel : rows);
}

// Block `b` of token `token` of a group of `tokens` that is packed at `packed`: `n` <= 128 values, the rest is zero.
V4_INLINE void pack_values(const Matrix& m, const float* values, std::int64_t n, std::int64_t b, int terms, char* packed, std::int64_t token,
                           std::int64_t tokens) {
    char* row = packed + token * packed_row_bytes(m, terms);
#if defined(V4_BF16)
    if (terms) {
        if (in_tiles(m, tokens, terms)) {
            constexpr int most = 3;
            alignas(64) Packed one[most * kBlock];
            pack_terms(m.encoding, values, n, terms, true, one);
            // a pair of columns of sixteen tokens takes 64 bytes
            char* into = packed + token / 16 * 16 * packed_row_bytes(m, terms) + b * terms * kBlock / 2 * 64 + token % 16 * 4;
            for (int pair = 0; pair < terms * kBlock / 2; pair++) __builtin_memcpy(into + pair * 64, one + 2 * pair, 4);
            return;
        }
        pack_terms(m.encoding, values, n, terms, false, reinterpret_cast<Packed*>(row) + b * kBlock * terms);
        return;
    }
#endif
    (void)m, (void)terms, (void)tokens;
    float* out = reinterpret_cast<float*>(row) + b * kBlock;
    std::int64_t i = 0;
    for (; i < n; i++) out[i] = values[i];
    for (; i < kBlock; i++) out[i] = 0;
}

V4_INLINE Rows columns(const Rows& x, std::int64_t first) {
    return Rows{static_cast<char*>(x.data) + first * (x.dtype == kBFloat16 ? 2 : 4), x.stride, x.dtype, 0};
}

// Pack tokens [.., cols] of `x` in the order this matrix is read in, the team sharing the blocks; a barrier must follow.
static void pack(const Rows& x, std::int64_t tokens, const Matrix& m, bool q8, int terms, char* out, const Team& team) {
    const std::int64_t blocks = blocks_of(m.cols);
    const Span mine = share(tokens * blocks, team);
    alignas(64) float block[kBlock];
    for (std::int64_t at = mine.begin; at < mine.end; at++) {
        const std::int64_t token = at / blocks, b = at % blocks, left = m.cols - b * kBlock, n = left < kBlock ? left : kBlock;
        read_row(columns(x, b * kBlock), token, n, block);
        if (q8) q8_round(block, n);
        pack_values(m, block, n, b, terms, out, token, tokens);
    }
}

#include "gemm.h"
#if defined(V4_AMX)
#include "amx.h"
#endif

// emit(token, row, values, count): `count` consecutive rows of one token, for rows [begin, end) of a stored matrix
template <class Emit>
static void multiply(const Matrix& m, std::int64_t begin, std::int64_t end, const char* packed, std::int64_t tokens, int terms,
                     Emit emit) {
#if defined(V4_AMX)
    if (in_tiles(m, tokens, terms)) {
        const Packed* x = reinterpret_cast<const Packed*>(packed);
        if (m.encoding == kFp8) tile_rows<kFp8>(m, begin, end, x, tokens, terms, emit);
        else if (m.encoding == kFp4) tile_rows<kFp4>(m, begin, end, x, tokens, terms, emit);
        else tile_rows<kBFloat16>(m, begin, end, x, tokens, terms, emit);
        return;
    }
#endif
    if (tokens > kFewTokens && multiply_many(m, begin, end, packed, tokens, terms, emit)) return;
    const std::int64_t stride = packed_row_bytes(m, terms) / (terms ? 2 : 4);
#if defined(V4_BF16)
    if (terms) {
        const Packed* x = reinterpret_cast<const Packed*>(packed);
        if (m.encoding == kFp8 && m.scale_kind == kUe8m0) rows_of_terms<kFp8, kUe8m0>(m, begin, end, x, stride, tokens, terms, emit);
        else if (m.encoding == kFp8) rows_of_terms<kFp8, kScaleFloat32>(m, begin, end, x, stride, tokens, terms, emit);
        else if (m.encoding == kFp4) rows_of_terms<kFp4, kUe8m0>(m, begin, end, x, stride, tokens, terms, emit);
        else rows_of_terms<kBFloat16, kNoScale>(m, begin, end, x, stride, tokens, terms, emit);
        return;
    }
#endif
    const float* x = reinterpret_cast<const float*>(packed);
    if (m.encoding == kFp8 && m.scale_kind == kUe8m0) rows_of_floats<kFp8, kUe8m0>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kFp8) rows_of_floats<kFp8, kScaleFloat32>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kFp4) rows_of_floats<kFp4, kUe8m0>(m, begin, end, x, stride, tokens, emit);
    else if (m.encoding == kBFloat16) rows_of_floats<kBFloat16, kNoScale>(m, begin, end, x, stride, tokens, emit);
    else rows_of_floats<kFloat32, kNoScale>(m, begin, end, x, stride, tokens, emit);
}
