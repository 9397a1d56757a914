#pragma once
#include "arguments.h"

namespace v4 {

struct EmbedCall {
    const std::int64_t* token_ids;
    Rows weight, y;  // [V, N], [T, M * N]
    std::int64_t tokens, streams, width;
};

}  // namespace v4
