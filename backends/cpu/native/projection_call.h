#pragma once
#include "arguments.h"

namespace v4 {

struct QueryCall {
    Matrix wq_a, wq_b;
    Rows x, norm, qr, q;     // [T, N], [R], [T, R], [T, H * D]
    const float* table;      // [T, rope]
    std::int64_t tokens, heads, rope;
    float eps;
    std::int32_t q8_a, q8_b, bf16_between, bf16_norm;
    std::int32_t unused;
};

struct KvCall {
    Matrix wkv;
    Rows x, norm, y;     // [T, N], [D], decode [T, D] else [B * W + T, D]
    const float* table;  // [T, rope]
    Cache window;
    Step step;
    std::int64_t rope;
    float eps;
    std::int32_t q8_input, bf16_between, q8_kv;
};

struct OutputCall {
    Matrix wo_a, wo_b;
    Rows o, y;           // [T, H * D], [T, N]
    const float* table;  // [T, rope]
    std::int64_t tokens, heads, dim, rope, groups;
    std::int32_t q8_b, short_between;  // what goes from wo_a to wo_b may be BF16
};

}  // namespace v4
