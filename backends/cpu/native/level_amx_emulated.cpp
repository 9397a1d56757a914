#if defined(__x86_64__) && defined(V4_AMX_EMULATED)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "calls.h"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512bf16")
#define V4_AVX512 1
#define V4_BF16 1
#define V4_AMX 1
namespace v4 {
namespace amx_emulated {
#include "kernels.h"
}
}  // namespace v4
#endif
