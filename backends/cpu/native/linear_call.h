#pragma once
#include "arguments.h"

namespace v4 {

struct LinearCall {
    Matrix weight;
    Rows x, y;
    std::int64_t tokens;
    std::int32_t q8_input;  // round inputs to FP8 in groups of 128 first
    std::int32_t unused;
};

}  // namespace v4
