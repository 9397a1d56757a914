#include "residency.h"

#include <cerrno>
#include <ctime>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace v4 {
namespace {

// whole pages that only one unit uses
struct Pages {
    std::uintptr_t address;
    std::int64_t bytes, file, offset;
};

// one page that several units share, or a unit with something else
struct Edge {
    std::uintptr_t address;
    std::int64_t file, offset;
    std::int64_t users;  // units in memory; one more for a neighbour that is no unit, so that it never leaves
};

struct Span {
    std::uintptr_t address;
    std::int64_t bytes;
};

struct Unit {
    std::int32_t newer, older;
    std::int64_t last_call;
    bool resident;
};

double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

struct Counters {
    std::int64_t hits, misses, evictions, read_bytes, resident_bytes, budget_bytes;
    double read_s;
};

struct Residency {
    std::int64_t layers, experts, page_bytes, call = 0;
    std::vector<Span> read;
    std::vector<Pages> own;
    std::vector<Edge> edges;
    std::vector<std::int64_t> first_read, first_own, first_edge, edge_of, held_bytes, file_bytes;
    std::vector<int> files;
    // a ring of resident units, newest first; the last element is its head
    std::vector<Unit> units;
    std::vector<std::int32_t> missing;
    Counters counters{};
    std::mutex mutex;

    std::int32_t head() const { return static_cast<std::int32_t>(units.size()) - 1; }

    void unlink(std::int32_t u) {
        units[units[u].newer].older = units[u].older;
        units[units[u].older].newer = units[u].newer;
    }

    void link_newest(std::int32_t u) {
        Unit& ring = units[head()];
        units[u].newer = head();
        units[u].older = ring.older;
        units[ring.older].newer = u;
        ring.older = u;
    }

    void drop(std::uintptr_t address, std::int64_t bytes, std::int64_t file, std::int64_t offset) {
#if defined(__linux__)
        madvise(reinterpret_cast<void*>(address), static_cast<std::size_t>(bytes), MADV_DONTNEED);
        // a group with a limit is charged for what the page cache keeps, and would give up pages that every token needs for it
        if (files[file] >= 0) posix_fadvise(files[file], offset, bytes, POSIX_FADV_DONTNEED);
#endif
    }

    void evict(std::int32_t u) {
        unlink(u);
        units[u].resident = false;
        for (std::int64_t i = first_own[u]; i < first_own[u + 1]; i++)
            drop(own[i].address, own[i].bytes, own[i].file, own[i].offset);
        for (std::int64_t i = first_edge[u]; i < first_edge[u + 1]; i++) {
            Edge& e = edges[edge_of[i]];
            if (--e.users == 0) drop(e.address, page_bytes, e.file, e.offset);
        }
        counters.resident_bytes -= held_bytes[u];
        counters.evictions++;
    }

    void admit(std::int32_t u) {
        units[u].resident = true;
        link_newest(u);
        for (std::int64_t i = first_edge[u]; i < first_edge[u + 1]; i++) edges[edge_of[i]].users++;
        counters.resident_bytes += held_bytes[u];
        counters.read_bytes += file_bytes[u];
        missing.push_back(u);
    }

    // All that is missing is asked for before any of it is waited for: the disk sees one deep queue.
    void fetch() {
        const double start = now_s();
#if defined(__linux__)
        for (std::int32_t u : missing)
            for (std::int64_t i = first_read[u]; i < first_read[u + 1]; i++)
                madvise(reinterpret_cast<void*>(read[i].address), static_cast<std::size_t>(read[i].bytes), MADV_WILLNEED);
#endif
        for (std::int32_t u : missing)
            for (std::int64_t i = first_read[u]; i < first_read[u + 1]; i++) wait_for(read[i]);
        counters.read_s += now_s() - start;
    }

    void wait_for(const Span& span) {
#if defined(__linux__)
        if (madvise(reinterpret_cast<void*>(span.address), static_cast<std::size_t>(span.bytes), MADV_POPULATE_READ) == 0) return;
        if (errno != EINVAL) return;  // the computation that reads it will meet the fault
#endif
        // a system without the advice
        for (std::int64_t at = 0; at < span.bytes; at += page_bytes)
            static_cast<void>(*reinterpret_cast<const volatile char*>(span.address + static_cast<std::uintptr_t>(at)));
    }

    void need(std::int64_t layer, const std::int32_t* ids, std::int64_t count) {
        call++;
        missing.clear();
        for (std::int64_t i = 0; i < count; i++) {
            if (ids[i] < 0 || ids[i] >= experts) continue;
            const std::int32_t u = static_cast<std::int32_t>(layer * experts + ids[i]);
            if (units[u].last_call == call) continue;
            units[u].last_call = call;
            if (units[u].resident) {
                counters.hits++;
                unlink(u);
                link_newest(u);
            } else {
                counters.misses++;
                admit(u);
            }
        }
        if (missing.empty()) return;
        // before reading, so that the bound holds at every moment; what this call needs stays, whatever the budget
        for (std::int32_t u = units[head()].newer; counters.resident_bytes > counters.budget_bytes; u = units[head()].newer) {
            if (u == head() || units[u].last_call == call) break;
            evict(u);
        }
        fetch();
    }
};

void residency_need(Residency* residency, std::int64_t layer, const std::int32_t* ids, std::int64_t count) {
    std::lock_guard<std::mutex> only(residency->mutex);
    residency->need(layer, ids, count);
}

}  // namespace v4

#pragma GCC visibility push(default)
extern "C" {

// What Python found out about the files; every array is copied. Units are ordered by layer, then expert.
struct v4_residency_layout {
    std::int64_t layers, experts, page_bytes, budget_bytes;
    std::int64_t reads, owns, edges, unit_edges, files;
    const v4::Span* read;            // [reads], of unit u: first_read[u] to first_read[u + 1]
    const v4::Pages* own;            // [owns]
    const v4::Edge* edge;            // [edges]
    const std::int64_t *first_read, *first_own, *first_edge;  // [units + 1]
    const std::int64_t* edge_of;     // [unit_edges]
    const std::int64_t *held_bytes, *file_bytes;  // [units]
    const std::int64_t* file;        // [files], descriptors that now belong to the cache, -1 for none
};

v4::Residency* v4_residency_new(const v4_residency_layout* l) {
    v4::Residency* r = new (std::nothrow) v4::Residency;
    if (!r) return nullptr;
    const std::int64_t units = l->layers * l->experts;
    r->layers = l->layers;
    r->experts = l->experts;
    r->page_bytes = l->page_bytes;
    r->counters.budget_bytes = l->budget_bytes;
    r->read.assign(l->read, l->read + l->reads);
    r->own.assign(l->own, l->own + l->owns);
    r->edges.assign(l->edge, l->edge + l->edges);
    r->edge_of.assign(l->edge_of, l->edge_of + l->unit_edges);
    r->first_read.assign(l->first_read, l->first_read + units + 1);
    r->first_own.assign(l->first_own, l->first_own + units + 1);
    r->first_edge.assign(l->first_edge, l->first_edge + units + 1);
    r->held_bytes.assign(l->held_bytes, l->held_bytes + units);
    r->file_bytes.assign(l->file_bytes, l->file_bytes + units);
    r->files.assign(l->file, l->file + l->files);
    r->units.assign(static_cast<std::size_t>(units + 1), v4::Unit{0, 0, 0, false});
    r->units.back() = {r->head(), r->head(), 0, false};
    r->missing.reserve(static_cast<std::size_t>(l->experts));
    return r;
}

void v4_residency_need(v4::Residency* r, std::int64_t layer, const std::int32_t* ids, std::int64_t count) {
    v4::residency_need(r, layer, ids, count);
}

void v4_residency_counters(v4::Residency* r, v4::Counters* out) {
    std::lock_guard<std::mutex> only(r->mutex);
    *out = r->counters;
}

// Gives back the descriptors, not the pages: their mapping may be gone by now.
void v4_residency_delete(v4::Residency* r) {
#if defined(__linux__)
    for (int file : r->files)
        if (file >= 0) close(file);
#endif
    delete r;
}

}  // extern "C"
#pragma GCC visibility pop
