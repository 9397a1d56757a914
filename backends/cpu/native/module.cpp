// What the shared library gives to Python: levels, kernels by name, the team of threads, and the running of argument blocks.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "arguments.h"

namespace v4 {
namespace scalar { extern const Kernel kernels[]; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernel kernels[]; }
namespace avx512 { extern const Kernel kernels[]; }
namespace avx512bf16 { extern const Kernel kernels[]; }
namespace amx { extern const Kernel kernels[]; }
#if defined(V4_AMX_EMULATED)
namespace amx_emulated { extern const Kernel kernels[]; }
#endif
#endif

namespace {

struct Level {
    const char* name;
    const Kernel* kernels;
    bool (*here)();
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

// the processor has the tiles, and the system lets this process use them: it must be asked once, for their state is large
bool has_amx() {
    unsigned a, b, c, d;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    if ((d & bf16) == 0 || (d & tile) == 0) return false;
#if defined(__linux__)
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return permitted;
#else
    return false;
#endif
}
#endif

// best first
const Level levels[] = {
#if defined(__x86_64__)
    {"amx", amx::kernels, has_amx},
    {"avx512bf16", avx512bf16::kernels, has_avx512bf16},
    {"avx512", avx512::kernels, has_avx512},
    {"avx2", avx2::kernels, has_avx2},
    {"scalar", scalar::kernels, always},
#if defined(V4_AMX_EMULATED)
    // last: never taken unless it is named
    {"amx_emulated", amx_emulated::kernels, has_avx512bf16},
#endif
#elif defined(__aarch64__)
    {"neon", scalar::kernels, always},
#else
    {"scalar", scalar::kernels, always},
#endif
};
constexpr int level_count = sizeof levels / sizeof levels[0];

struct Call {
    Body body;
    const void* arguments;
    std::size_t (*scratch)(const void* arguments, int threads);
};

// level `empty`: what a step costs without its kernels
void nothing(const void*, const Team&) {}

void* scratch = nullptr;
std::size_t scratch_bytes = 0;
// one call at a time, whichever thread of the process makes it
std::mutex calls;

bool reserve(std::size_t bytes) {
    if (bytes <= scratch_bytes) return true;
    std::free(scratch);
    scratch_bytes = 0;
    // a tenth more, so that lengths that creep upwards do not allocate every time
    bytes = (bytes + bytes / 10 + 4095) / 4096 * 4096;
    scratch = std::aligned_alloc(4096, bytes);
    if (scratch) scratch_bytes = bytes;
    return scratch;
}

}  // namespace

std::uintptr_t workspace() { return reinterpret_cast<std::uintptr_t>(scratch); }

}  // namespace v4

#pragma GCC visibility push(default)
extern "C" {

// Name of level `index`, empty if this processor lacks it, null beyond the last.
const char* v4_level(int index) {
    if (index < 0 || index >= v4::level_count) return nullptr;
    return v4::levels[index].here() ? v4::levels[index].name : "";
}

// The kernel `name` of a level: 1 and its body, scratch function and size of arguments, or 0.
int v4_kernel(const char* level, const char* name, void** body, void** scratch, std::size_t* argument_bytes) {
    const bool empty = !std::strcmp(level, "empty");
    for (const v4::Level& l : v4::levels)
        if (l.here() && (empty || !std::strcmp(l.name, level)))
            for (const v4::Kernel* k = l.kernels; k->name; k++)
                if (!std::strcmp(k->name, name)) {
                    *body = reinterpret_cast<void*>(empty ? v4::nothing : k->body);
                    *scratch = reinterpret_cast<void*>(empty ? nullptr : k->scratch);
                    *argument_bytes = k->argument_bytes;
                    return 1;
                }
    return 0;
}

void v4_threads(int count) {
    std::lock_guard<std::mutex> only(v4::calls);
    v4::pool_resize(count);
}

void v4_affinity(const int* processors, int count) {
    std::lock_guard<std::mutex> only(v4::calls);
    v4::pool_affinity(processors, count);
}

// Runs calls in order; 0, or the bytes of scratch that could not be had (nothing ran then).
std::size_t v4_run(const v4::Call* list, std::size_t count) {
    std::lock_guard<std::mutex> only(v4::calls);
    const int threads = v4::pool_size();
    std::size_t most = 0;
    for (std::size_t i = 0; i < count; i++) {
        const std::size_t bytes = list[i].scratch ? list[i].scratch(list[i].arguments, threads) : 0;
        most = bytes > most ? bytes : most;
    }
    if (!v4::reserve(most)) return most;
    for (std::size_t i = 0; i < count; i++) v4::pool_run(list[i].body, list[i].arguments);
    return 0;
}

// Ends the threads and gives the scratch back; the next call makes both again.
void v4_rest() {
    std::lock_guard<std::mutex> only(v4::calls);
    const int threads = v4::pool_size();
    v4::pool_resize(1);
    v4::pool_resize(threads);
    std::free(v4::scratch);
    v4::scratch = nullptr;
    v4::scratch_bytes = 0;
}

}  // extern "C"
#pragma GCC visibility pop
