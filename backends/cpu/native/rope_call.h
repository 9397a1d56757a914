#pragma once
#include "arguments.h"

namespace v4 {

struct RopeTableCall {
    const std::int32_t* positions;
    const float* inv_freq;
    float* table;  // [T, 2 * half], cosines first
    std::int64_t tokens, half;
};

// what was drawn becomes the next input, one position further
struct FeedCall {
    const std::int64_t* drawn;
    std::int64_t* token_ids;
    std::int32_t* positions;
    std::int64_t tokens;
};

}  // namespace v4
