#pragma once
#include "arguments.h"

namespace v4 {

struct IndexCall {
    Rows q;                  // [T, heads * dim]
    Rows w;                  // [T, heads]
    Cache keys;
    std::int32_t* picks;     // [T, K]
    Step step;
    std::int64_t heads, dim, topk, ratio;
    std::int32_t bf16_scores, unused;
};

}  // namespace v4
