#pragma once
#include "arguments.h"

namespace v4 {

struct SampleCall {
    const float *logits, *bias, *temperature;  // [T, V], [T, V] or null, [T] or null
    const std::int32_t* top_k;                 // [T], 0 for all
    const float *top_p, *min_p, *uniform;      // [T]
    std::int64_t* ids;                         // [T]
    float* logprobs;                           // [T]
    std::int64_t* top_ids;                     // [T, top]
    float* top_logprobs;                       // [T, top]
    std::int64_t tokens, vocab, top;
};

struct Ranked {
    float value;
    std::int32_t id;
};

// One token of `count` candidates by falling value and rising id; `sum` is the sum of exp(value - largest) over the whole row.
// Reorders the candidates.
std::int64_t draw(Ranked* candidates, std::int64_t count, std::int64_t vocab, double sum, std::int32_t top_k, float top_p,
                  float min_p, float uniform);
// The `top` largest of a row, falling, ties to the lowest id; `space` holds one per entry of the row.
void largest_of(const float* row, std::int64_t vocab, std::int64_t top, Ranked* space, std::int64_t* ids, float* values);

}  // namespace v4
