#pragma once
#include "arguments.h"

namespace v4 {

struct NormCall {
    Rows x, weight, y;
    std::int64_t tokens, width;
    float eps;
    std::int32_t unused;
};

}  // namespace v4
