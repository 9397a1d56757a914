#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "calls.h"
#pragma GCC target("avx2,fma,f16c")
#define V4_AVX2 1
namespace v4 {
namespace avx2 {
#include "kernels.h"
}
}  // namespace v4
#endif
