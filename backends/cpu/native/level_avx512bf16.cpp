#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "calls.h"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512bf16")
#define V4_AVX512 1
#define V4_BF16 1
namespace v4 {
namespace avx512bf16 {
#include "kernels.h"
}
}  // namespace v4
#endif
