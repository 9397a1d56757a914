#pragma once
#include "arguments.h"

namespace v4 {

struct AttentionCall {
    Rows q, kv, out;                // [T, H * D], [B * W + T, D] (prefill), [T, H * D]
    Cache window, entries;          // entries without data: none
    const std::int32_t* picks;      // [T, K], -1 absent, or null: all visible entries
    const float* sink;              // [H]
    Step step;
    std::int64_t heads, dim, rope, ratio, most_picks;
    std::int32_t bf16_numerators;   // of the weighted sum, as the reference rounds them
    std::int32_t unused;
};

}  // namespace v4
