#pragma once
#include "arguments.h"

namespace v4 {

struct CompressCall {
    Matrix wkv, wgate;
    Rows x, norm;                   // [T, N], [e]
    const float *ape, *inv_freq;    // [ratio, w], [rope / 2]
    float* state;                   // [slots + 1, L, 2, w]
    Cache entries;
    Step step;
    std::int64_t ratio, length, half;  // L, rope / 2
    float eps;
    // roundings: of the entry to BF16, to FP8 (attention), by rotation to FP4 (index); entries are index keys
    std::int32_t bf16_activations, q8_kv, q4_index, is_index;
    std::int32_t unused;
};

struct IndexQueryCall {
    Matrix wq_b, weights_proj;
    Rows x, qr, q, w;    // [T, N], [T, R], [T, heads * e], [T, heads]
    const float* table;  // [T, rope]
    std::int64_t tokens, heads, rope;
    float scale;
    std::int32_t q8_b, q8_w, bf16_between, q4_index;
    std::int32_t unused;
};

}  // namespace v4
