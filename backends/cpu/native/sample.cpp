// Ordering and drawing. One text for all levels: it sorts, and sorting is not what vectors are for.
#include <algorithm>
#include <cmath>

#include "sample_call.h"

namespace v4 {

namespace {
bool before(const Ranked& a, const Ranked& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }
}  // namespace

std::int64_t draw(Ranked* candidates, std::int64_t count, std::int64_t vocab, double sum, std::int32_t top_k, float top_p,
                  float min_p, float uniform) {
    std::int64_t within = count;
    if (top_k > 0 && top_k < vocab) {
        within = std::min<std::int64_t>(top_k, count);
        std::partial_sort(candidates, candidates + within, candidates + count, before);
    } else {
        std::sort(candidates, candidates + count, before);
    }
    const float largest = candidates[0].value;
    if (within < count || (top_k > 0 && top_k < vocab)) {
        sum = 0;
        for (std::int64_t i = 0; i < within; i++) sum += static_cast<double>(std::exp(candidates[i].value - largest));
    }
    const float total = static_cast<float>(sum), first = 1.0f / total;
    // the float32 roundings of the reference, whose running sums are kept in double
    double running = 0;
    std::int64_t kept = 0;
    double mass = 0;
    for (; kept < within; kept++) {
        const float p = std::exp(candidates[kept].value - largest) / total;
        running += static_cast<double>(p);
        const float ahead = static_cast<float>(running) - p;
        if (kept > 0 && ((top_p < 1.0f && ahead >= top_p) || p < min_p * first || p == 0.0f)) break;
        mass += static_cast<double>(p);
    }
    const float limit = uniform * static_cast<float>(mass);
    running = 0;
    for (std::int64_t i = 0; i < kept; i++) {
        running += static_cast<double>(std::exp(candidates[i].value - largest) / total);
        if (static_cast<float>(running) > limit) return candidates[i].id;
    }
    return candidates[kept - 1].id;
}

void largest_of(const float* row, std::int64_t vocab, std::int64_t top, Ranked* space, std::int64_t* ids, float* values) {
    for (std::int64_t i = 0; i < vocab; i++) space[i] = {row[i], static_cast<std::int32_t>(i)};
    std::partial_sort(space, space + top, space + vocab, before);
    for (std::int64_t i = 0; i < top; i++) {
        ids[i] = space[i].id;
        values[i] = space[i].value;
    }
}

}  // namespace v4
