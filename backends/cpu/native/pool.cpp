#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace v4 {
namespace {

constexpr std::int64_t spin_ns = 100'000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

// spins, then sleeps, until `word` no longer holds `old`
std::uint32_t wait_change(std::atomic<std::uint32_t>& word, std::atomic<int>& sleepers, std::uint32_t old) {
    for (std::int64_t until = now_ns() + spin_ns;;) {
        for (int i = 0; i < 64; i++) {
            std::uint32_t seen = word.load(std::memory_order_acquire);
            if (seen != old) return seen;
            relax();
        }
        if (now_ns() > until) break;
    }
    sleepers.fetch_add(1);
    std::uint32_t seen;
    while ((seen = word.load()) == old) {
#if defined(__linux__)
        syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
        word.wait(old);
#endif
    }
    sleepers.fetch_sub(1);
    return seen;
}

void wake(std::atomic<std::uint32_t>& word, std::atomic<int>& sleepers) {
    if (sleepers.load() == 0) return;
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    word.notify_all();
#endif
}

struct alignas(64) Padded {
    std::atomic<std::uint32_t> value{0};
    std::atomic<int> sleepers{0};
};

struct alignas(64) Dealt {
    std::atomic<std::int64_t> next[kPhases] = {};
};

struct Pool {
    std::vector<std::thread> workers;
    int size = 1;
    Padded start;      // generation of the current call
    Padded arrived;    // members at the current barrier
    Padded phase;      // generation of the barrier
    Dealt dealt;       // units of each phase of the current call that are taken
    Body body = nullptr;
    const void* arguments = nullptr;
    bool stopping = false;
    std::vector<int> processors;
};

Pool* the_pool = nullptr;

// a forked child has none of the threads: it starts with a pool of its own
void after_fork() {
    Pool* fresh = new Pool;
    fresh->size = the_pool->size;
    fresh->processors = the_pool->processors;
    the_pool = fresh;
}

Pool& pool() {
    if (!the_pool) {
        the_pool = new Pool;  // never destroyed: workers may outlive static destruction
        pthread_atfork(nullptr, nullptr, after_fork);
    }
    return *the_pool;
}

void pin(const Pool& p, int rank) {
#if defined(__linux__)
    if (p.processors.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(static_cast<std::size_t>(p.processors[static_cast<std::size_t>(rank) % p.processors.size()]), &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)p, (void)rank;
#endif
}

void sync(Pool& p) {
    if (p.size == 1) return;
    std::uint32_t phase = p.phase.value.load(std::memory_order_acquire);
    if (p.arrived.value.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(p.size)) {
        p.arrived.value.store(0, std::memory_order_relaxed);
        p.phase.value.fetch_add(1);
        wake(p.phase.value, p.phase.sleepers);
    } else {
        wait_change(p.phase.value, p.phase.sleepers, phase);
    }
}

void work(int rank, std::uint32_t seen) {
    Pool& p = pool();
    pin(p, rank);
    for (;;) {
        seen = wait_change(p.start.value, p.start.sleepers, seen);
        if (p.stopping) return;
        p.body(p.arguments, Team{rank, p.size});
        sync(p);
    }
}

void halt(Pool& p) {
    if (p.workers.empty()) return;
    p.stopping = true;
    p.start.value.fetch_add(1);
    wake(p.start.value, p.start.sleepers);
    for (std::thread& t : p.workers) t.join();
    p.workers.clear();
    p.stopping = false;
}

void begin(Pool& p) {
    p.arrived.value = 0;
    const std::uint32_t seen = p.start.value.load();
    for (int rank = 1; rank < p.size; rank++) p.workers.emplace_back(work, rank, seen);
}

}  // namespace

void* thread_buffer(std::size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        std::size_t bytes = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer mine;
    if (bytes > mine.bytes) {
        std::free(mine.data);
        mine.bytes = (bytes + 4095) / 4096 * 4096;
        mine.data = std::aligned_alloc(4096, mine.bytes);
        if (!mine.data) std::abort();  // a megabyte: there is no memory for anything
    }
    return mine.data;
}

void Team::barrier() const {
    if (size > 1) sync(pool());
}

void Team::deal_again() const {
    for (std::atomic<std::int64_t>& next : pool().dealt.next) next.store(0, std::memory_order_relaxed);
}

bool Team::take(int phase, std::int64_t count, std::int64_t least, Span& mine) const {
    std::atomic<std::int64_t>& next = pool().dealt.next[phase];
    std::int64_t begin = next.load(std::memory_order_relaxed), n;
    do {
        const std::int64_t left = count - begin;
        if (left <= 0) return false;
        n = size == 1 ? left : left * 3 / (4 * size);
        const std::int64_t floor = least > count / (8 * size) ? least : count / (8 * size);
        n = n > floor ? n : floor < left ? floor : left;
    } while (!next.compare_exchange_weak(begin, begin + n, std::memory_order_relaxed));
    mine = {begin, begin + n};
    return true;
}

void pool_resize(int threads) {
    Pool& p = pool();
    if (threads < 1) threads = 1;
    if (threads == p.size) return;
    halt(p);
    p.size = threads;
}

int pool_size() { return pool().size; }

void pool_affinity(const int* processors, int count) {
    Pool& p = pool();
    halt(p);
    p.processors.assign(processors, processors + count);
}

void pool_run(Body body, const void* arguments) {
    Pool& p = pool();
    Team{0, p.size}.deal_again();
    if (p.size == 1) {
        body(arguments, Team{0, 1});
        return;
    }
    if (p.workers.empty()) begin(p);
    p.body = body;
    p.arguments = arguments;
    p.start.value.fetch_add(1);
    wake(p.start.value, p.start.sleepers);
    body(arguments, Team{0, p.size});
    sync(p);
}

}  // namespace v4
