// What kernels are given: rows, matrices, caches and the packed step, as raw addresses. Python builds the same structures
// (arguments.py); their sizes are compared when the library is loaded. Every address stays valid as long as the block is used.
#pragma once
#include <cstddef>

#include "matrix.h"
#include "pool.h"

namespace v4 {

// activations [T, n]; a missing tensor has no data
struct Rows {
    void* data;
    std::int64_t stride;  // elements between rows
    Encoding dtype;       // kFloat32 or kBFloat16
    std::int32_t unused;
};

// the packed step: `v4sdk.ops.Batch`
struct Step {
    const std::int64_t *token_ids, *seq_ids;           // [T]
    const std::int32_t *positions;                     // [T]
    const std::int32_t *cu_seqlens, *slots, *block_table;  // [B + 1], [B], [B, P]
    std::int64_t tokens, sequences, pages, page_tokens;
};

enum CacheFormat : std::int32_t { kCacheFloat32 = 0, kCacheBFloat16 = 1, kCacheNative = 2 };

// cache rows [outer, rows, row_bytes]: outer is a slot or a page, the last of which belongs to nobody
struct Cache {
    std::uint8_t* data;
    std::int64_t outer, rows, row_bytes;
    CacheFormat format;
    std::int32_t unused;
};

// The scratch of a kernel, laid out by one function that is also asked for its size (base 0, nothing is touched).
struct Arena {
    std::uintptr_t base;
    std::size_t used = 0;
    explicit Arena(std::uintptr_t at) : base(at) {}
    template <class T>
    T* take(std::int64_t count) {
        used = (used + 63) / 64 * 64;
        T* p = reinterpret_cast<T*>(base + used);
        used += static_cast<std::size_t>(count) * sizeof(T);
        return p;
    }
};

// scratch of the call that runs now; 64-byte aligned
std::uintptr_t workspace();

struct Kernel {
    const char* name;
    Body body;
    std::size_t (*scratch)(const void* arguments, int threads);
    std::size_t argument_bytes;
};

template <class Layout, class Call>
static inline std::size_t scratch_of(const void* arguments, int threads) {
    return Layout(*static_cast<const Call*>(arguments), 0, threads).arena.used;
}

}  // namespace v4
