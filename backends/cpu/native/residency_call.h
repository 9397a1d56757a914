#pragma once
#include <cstdint>

#include "residency.h"

namespace v4 {

struct ResidencyCall {
    Residency* residency;
    const std::int32_t* ids;  // [count]
    std::int64_t layer, count;
};

}  // namespace v4
