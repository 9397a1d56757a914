// One team of threads for all kernels: fork-join by spinning at most 100 microseconds, then sleeping on a futex.
#pragma once
#include <cstddef>
#include <cstdint>

namespace v4 {

// units [begin, end)
struct Span {
    std::int64_t begin, end;
};

// What a kernel sees of its team. `barrier` waits for every member; the work between two barriers may read what was written
// before the first.
struct Team {
    int rank;
    int size;
    void barrier() const;
    // The next piece of `count` units, at least `least` of them; false when all are dealt. Pieces are large first, and a member that
    // is held up takes fewer. Each phase of a kernel counts for itself, 0 to kPhases - 1, once per call of the kernel.
    bool take(int phase, std::int64_t count, std::int64_t least, Span& mine) const;
    // Has all phases count from zero; one member calls it, between two barriers.
    void deal_again() const;
};
constexpr int kPhases = 2;

using Body = void (*)(const void* arguments, const Team& team);

// Sets the size of the team; its threads start with the next call, and pool_resize(1) ends them. The caller is member 0.
void pool_resize(int threads);
int pool_size();
// Processors the team may run on, member by member, repeated as needed; none: wherever the system puts them.
void pool_affinity(const int* processors, int count);
// One call at a time: the caller holds the lock of the library.
void pool_run(Body body, const void* arguments);

// A buffer of the calling thread, 64-byte aligned, kept and grown; its content lasts until the thread asks again.
void* thread_buffer(std::size_t bytes);

// units of this member when `count` of them are dealt evenly
static inline Span share(std::int64_t count, const Team& team) {
    return {count * team.rank / team.size, count * (team.rank + 1) / team.size};
}

}  // namespace v4
