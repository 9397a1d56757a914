#pragma once
#include "arguments.h"

namespace v4 {

struct RouteCall {
    Matrix gate;                    // [E, N]
    Rows u;                         // [T, N]
    const float* bias;              // [E], or null where experts come from a table
    const void* table;              // [V, K] ids, or null
    const std::int64_t* token_ids;  // [T], with `table`
    std::int32_t* ids;              // [T, K]
    float* weights;                 // [T, K]
    std::int64_t tokens, experts, chosen;
    float scale;
    std::int32_t wide_table;        // ids of 8 bytes, else 4
};

struct ExpertsCall {
    const Matrix* matrices;  // [E][3]: w1, w2, w3
    Rows u;                  // [T, N]
    const std::int32_t* ids;        // [T, K], or null where every token chooses expert 0
    const float *weights, *routed;  // [T, K], or null for ones; [T, N] to add to, or null
    Rows y;                         // [T, N]
    std::int64_t tokens, chosen, experts, width, inner;
    float limit;
    // round inputs of products to FP8; round what is handed on to BF16; what is handed to w2 may be BF16
    std::int32_t q8_input, bf16_between, short_inner;
};

}  // namespace v4
