#pragma once
#include "arguments.h"

namespace v4 {

// hc_post where y_in is given, then hc_pre (or hc_head) where fn is given, then the norm where norm_weight is given
struct HyperCall {
    Rows y_in, x_in;    // [T, N], [T, M * N]
    Rows x_out, u_out;  // [T, M * N], [T, N]
    const float *post_in, *comb_in;
    float *post_out, *comb_out;
    const float *fn, *base, *scale;
    Rows norm_weight;
    std::int64_t tokens, streams, width;
    std::int32_t iterations, head;
    float norm_eps, hc_eps;
};

}  // namespace v4
