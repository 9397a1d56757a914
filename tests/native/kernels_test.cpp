// The kernels' library alone, without Python: products at odd sizes before an unmapped page and with the ends of the scales, the team of
// threads, how it deals work, and what it does when a process forks. Built with sanitizers by run.sh.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../backends/cpu/native/calls.h"

extern "C" {
const char* v4_level(int index);
int v4_kernel(const char* level, const char* name, void** body, void** scratch, std::size_t* argument_bytes);
void v4_threads(int count);
void v4_affinity(const int* processors, int count);
std::size_t v4_run(const void* calls, std::size_t count);
void v4_rest();
}

namespace {

int failures = 0, checks = 0;

void check(bool ok, const std::string& what) {
    checks++;
    if (ok) return;
    failures++;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// the larger of two differences; a NaN is the largest, and stays
double worse(double worst, double gap) { return gap <= worst || std::isnan(worst) ? worst : gap; }

struct Call {
    void *body, *arguments, *scratch;
};

void run(const char* level, const char* name, void* arguments, std::size_t bytes) {
    Call call{};
    std::size_t expected = 0;
    check(v4_kernel(level, name, &call.body, &call.scratch, &expected) == 1, std::string(level) + " has " + name);
    check(bytes == expected, std::string("size of the arguments of ") + name);
    call.arguments = arguments;
    check(v4_run(&call, 1) == 0, std::string(name) + " has its scratch");
}

// bytes that end where the memory ends: reading one more faults
class Guarded {
public:
    explicit Guarded(std::size_t bytes) : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
        whole_ = (bytes + page_ - 1) / page_ * page_ + page_;
        base_ = static_cast<char*>(mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base_ + whole_ - page_, page_, PROT_NONE);
        data_ = reinterpret_cast<std::uint8_t*>(base_ + whole_ - page_ - bytes);
    }
    ~Guarded() { munmap(base_, whole_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    std::uint8_t* data() const { return data_; }

private:
    std::size_t page_, whole_;
    char* base_;
    std::uint8_t* data_;
};

double fp8_value(std::uint8_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    const double a = e ? std::ldexp(1.0 + m / 8.0, e - 7) : std::ldexp(m / 8.0, -6);
    return code & 128 ? -a : a;
}

double fp4_value(int code) {
    static const double values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -values[code & 7] : values[code & 7];
}

void products(const char* level, v4::Encoding encoding, v4::ScaleKind kind, int rows, int cols, int tokens) {
    std::mt19937 random(static_cast<unsigned>(rows * 7919 + cols * 31 + tokens));
    const std::string about = std::string(level) + " encoding " + std::to_string(encoding) + " scale " + std::to_string(kind) + " " +
                              std::to_string(rows) + "x" + std::to_string(cols) + " tokens " + std::to_string(tokens);
    const std::size_t row_bytes = static_cast<std::size_t>(encoding == v4::kFp4 ? cols / 2 : encoding == v4::kFp8 ? cols : encoding == v4::kBFloat16 ? 2 * cols : 4 * cols);
    const int tile_rows = encoding == v4::kFp8 ? 128 : 1, tile_cols = encoding == v4::kFp8 ? 128 : 32;
    const int scale_cols = (cols + tile_cols - 1) / tile_cols, scale_rows = (rows + tile_rows - 1) / tile_rows;
    const std::size_t item = kind == v4::kScaleFloat32 ? 4 : 1;
    Guarded data(row_bytes * static_cast<std::size_t>(rows)), scale(item * static_cast<std::size_t>(scale_rows * scale_cols));
    std::vector<double> weight(static_cast<std::size_t>(rows * cols));
    for (int r = 0; r < scale_rows; r++)
        for (int k = 0; k < scale_cols; k++) {
            if (kind == v4::kUe8m0) scale.data()[r * scale_cols + k] = static_cast<std::uint8_t>(120 + random() % 10);
            const float f = 0.75f + static_cast<float>(random() % 100) / 100.0f;
            if (kind == v4::kScaleFloat32) std::memcpy(scale.data() + 4 * (r * scale_cols + k), &f, 4);
        }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < cols; k++) {
            double f = 1.0;
            const int at = r / tile_rows * scale_cols + k / tile_cols;
            if (kind == v4::kUe8m0) f = std::ldexp(1.0, scale.data()[at] - 127);
            if (kind == v4::kScaleFloat32) {
                float g;
                std::memcpy(&g, scale.data() + 4 * at, 4);
                f = static_cast<double>(g);
            }
            std::uint8_t* row = data.data() + static_cast<std::size_t>(r) * row_bytes;
            double v = 0;
            if (encoding == v4::kFp8) {
                std::uint8_t code = static_cast<std::uint8_t>(random());
                if ((code & 127) == 127) code = 0;
                row[k] = code;
                v = fp8_value(code) / 64;
                f *= 64;
            } else if (encoding == v4::kFp4) {
                const int code = static_cast<int>(random() % 16);
                row[k / 2] = static_cast<std::uint8_t>(k % 2 ? (row[k / 2] & 15) | code << 4 : code);
                v = fp4_value(code);
            } else {
                const float x = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
                const std::uint16_t h = v4::float_bf16(x);
                if (encoding == v4::kBFloat16) std::memcpy(row + 2 * k, &h, 2);
                else std::memcpy(row + 4 * k, &x, 4);
                v = encoding == v4::kBFloat16 ? static_cast<double>(v4::bf16_float(h)) : static_cast<double>(x);
            }
            weight[static_cast<std::size_t>(r * cols + k)] = v * f;
        }
    Guarded x(static_cast<std::size_t>(4 * tokens * cols)), y(static_cast<std::size_t>(4 * tokens * rows));
    float *in = reinterpret_cast<float*>(x.data()), *out = reinterpret_cast<float*>(y.data());
    for (int i = 0; i < tokens * cols; i++) in[i] = static_cast<float>(random() % 20001) / 10000.0f - 1.0f;
    for (int i = 0; i < tokens * rows; i++) out[i] = std::numeric_limits<float>::quiet_NaN();
    v4::LinearCall call{};
    call.weight = v4::Matrix{data.data(), kind == v4::kNoScale ? nullptr : scale.data(), rows, cols, static_cast<std::int64_t>(row_bytes),
                             static_cast<std::int64_t>(item) * scale_cols, tile_rows, tile_cols, encoding, kind};
    call.x = v4::Rows{in, cols, v4::kFloat32, 0};
    call.y = v4::Rows{out, rows, v4::kFloat32, 0};
    call.tokens = tokens;
    run(level, "linear", &call, sizeof call);
    double worst = 0;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            double want = 0, size = 1e-3;
            for (int k = 0; k < cols; k++) {
                const double part = weight[static_cast<std::size_t>(r * cols + k)] * static_cast<double>(in[t * cols + k]);
                want += part;
                size += std::fabs(part);
            }
            const double gap = std::fabs(static_cast<double>(out[t * rows + r]) - want) / size;
            worst = worse(worst, gap);
        }
    check(worst < 2e-6, about + ": relative error " + std::to_string(worst));
}

// One scale in the middle of a row and its last one are `byte`, the others 1. Inputs make up for it, so that every block counts alike, and
// codes are such that no scaled value leaves the range of BF16; with `tiny` some are below its normal values, and may count as zero.
void extremes(const char* level, v4::Encoding encoding, v4::Encoding dtype, int rows, int cols, int tokens, std::uint8_t byte, bool tiny) {
    std::mt19937 random(static_cast<unsigned>(byte * 131 + tokens * 7 + cols));
    const std::string about = std::string(level) + " encoding " + std::to_string(encoding) + " input " + std::to_string(dtype) + " " +
                              std::to_string(rows) + "x" + std::to_string(cols) + " tokens " + std::to_string(tokens) + " scale byte " +
                              std::to_string(byte) + (tiny ? ", tiny values" : "");
    const bool fp8 = encoding == v4::kFp8;
    const unsigned none = byte == 255;  // NaN; all is above zero, so that no infinity becomes one
    const int tile_rows = fp8 ? 128 : 1, tile_cols = fp8 ? 128 : 32, row_bytes = fp8 ? cols : cols / 2;
    const int scale_cols = (cols + tile_cols - 1) / tile_cols, scale_rows = (rows + tile_rows - 1) / tile_rows;
    const int middle = scale_cols / 2, last = scale_cols - 1, touched = fp8 ? 0 : 3;  // row of scales
    const auto extreme = [&](int k) { return k / tile_cols == middle || k / tile_cols == last; };
    Guarded data(static_cast<std::size_t>(row_bytes * rows)), scale(static_cast<std::size_t>(scale_rows * scale_cols));
    std::memset(scale.data(), 127, static_cast<std::size_t>(scale_rows * scale_cols));
    for (int g : {middle, last}) scale.data()[touched * scale_cols + g] = byte;
    // values in [2, 6] stay normal below, up to 1.5 finite above
    static const std::uint8_t low[4] = {4, 5, 6, 7}, high[4] = {0, 1, 2, 3};
    std::vector<double> weight(static_cast<std::size_t>(rows * cols));
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < cols; k++) {
            std::uint8_t* row = data.data() + r * row_bytes;
            const auto sign = static_cast<std::uint8_t>(none ? 0 : random() % 2);
            double v;
            if (fp8) {
                std::uint8_t code = static_cast<std::uint8_t>(none + random() % (127 - none));
                if (byte == 0 && !tiny) code = static_cast<std::uint8_t>(0x40 + random() % 16);  // [2, 8)
                if (byte == 254) code = static_cast<std::uint8_t>(random() % 0x3e);  // up to 1.5
                row[k] = static_cast<std::uint8_t>(code | sign << 7);
                v = fp8_value(row[k]);
            } else {
                int code = static_cast<int>(none + random() % (8 - none));
                if (byte == 0 && !tiny) code = low[random() % 4];
                if (byte == 254) code = high[random() % 4];
                code |= sign << 3;
                row[k / 2] = static_cast<std::uint8_t>(k % 2 ? (row[k / 2] & 15) | code << 4 : code);
                v = fp4_value(code);
            }
            const int at = scale.data()[r / tile_rows * scale_cols + k / tile_cols];
            weight[static_cast<std::size_t>(r * cols + k)] = at == 255 ? std::nan("") : std::ldexp(v, at - 127);
        }
    // what an input can make up for: products stay far from the ends of float32
    const int room = byte == 255 ? 0 : 127 - byte, shift = room > 100 ? 100 : room < -100 ? -100 : room;
    std::vector<float> in(static_cast<std::size_t>(tokens * cols)), out(static_cast<std::size_t>(tokens * rows), std::nanf(""));
    std::vector<std::uint16_t> narrow(in.size());
    for (int i = 0; i < tokens * cols; i++) {
        const float u = (0.5f + static_cast<float>(random() % 1000) / 2000.0f) * (none || random() % 2 ? 1.0f : -1.0f);
        float& x = in[static_cast<std::size_t>(i)];
        x = std::ldexp(u, extreme(i % cols) ? shift : shift - room);
        if (dtype == v4::kBFloat16) x = v4::bf16_float(narrow[static_cast<std::size_t>(i)] = v4::float_bf16(x));
    }
    v4::LinearCall call{};
    call.weight = v4::Matrix{data.data(), scale.data(), rows, cols, row_bytes, scale_cols, tile_rows, tile_cols, encoding, v4::kUe8m0};
    call.x = v4::Rows{dtype == v4::kBFloat16 ? static_cast<void*>(narrow.data()) : in.data(), cols, dtype, 0};
    call.y = v4::Rows{out.data(), rows, v4::kFloat32, 0};
    call.tokens = tokens;
    run(level, "linear", &call, sizeof call);
    double worst = 0;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            double want = 0, size = 0, lost = 0;
            for (int k = 0; k < cols; k++) {
                const double w = weight[static_cast<std::size_t>(r * cols + k)], x = static_cast<double>(in[static_cast<std::size_t>(t * cols + k)]);
                want += w * x;
                size += std::fabs(w * x);
                if (std::fabs(w) < 0x1p-126) lost += std::fabs(w * x);
            }
            const double found = static_cast<double>(out[static_cast<std::size_t>(t * rows + r)]);
            const double apart = std::fabs(found - want) - lost;
            const double gap = std::isnan(want) ? (std::isnan(found) ? 0.0 : 1.0) : (apart < 0 ? 0.0 : apart) / size;
            worst = worse(worst, gap);
        }
    check(worst < 2e-6, about + ": relative error " + std::to_string(worst));
}

void norms(const char* level, int threads) {
    const int tokens = 5, width = 203;
    std::vector<float> x(tokens * width), w(width), y(tokens * width, std::nanf(""));
    for (int i = 0; i < tokens * width; i++) x[static_cast<std::size_t>(i)] = static_cast<float>(i % 17) - 8.0f;
    for (int i = 0; i < width; i++) w[static_cast<std::size_t>(i)] = 1.0f + static_cast<float>(i) / 1000.0f;
    v4::NormCall call{};
    call.x = v4::Rows{x.data(), width, v4::kFloat32, 0};
    call.weight = v4::Rows{w.data(), 0, v4::kFloat32, 0};
    call.y = v4::Rows{y.data(), width, v4::kFloat32, 0};
    call.tokens = tokens;
    call.width = width;
    call.eps = 1e-6f;
    run(level, "rms_norm", &call, sizeof call);
    double worst = 0;
    for (int t = 0; t < tokens; t++) {
        double square = 0;
        for (int i = 0; i < width; i++) square += static_cast<double>(x[static_cast<std::size_t>(t * width + i)]) * static_cast<double>(x[static_cast<std::size_t>(t * width + i)]);
        for (int i = 0; i < width; i++) {
            const auto at = static_cast<std::size_t>(t * width + i);
            const double want = static_cast<double>(x[at]) * static_cast<double>(w[static_cast<std::size_t>(i)]) / std::sqrt(square / width + 1e-6);
            const double gap = std::fabs(static_cast<double>(y[at]) - want);
            worst = worse(worst, gap);
        }
    }
    check(worst < 1e-5, std::string(level) + ": rms_norm with " + std::to_string(threads) + " threads");
}

std::atomic<int>* visits_of(const void* arguments) { return *static_cast<std::atomic<int>* const*>(arguments); }

// every member counts itself, waits, and must then see all of them
void count_members(const void* arguments, const v4::Team& team) {
    std::atomic<int>* visits = visits_of(arguments);
    visits[0]++;
    team.barrier();
    if (visits[0] % team.size) visits[1]++;
    team.barrier();
}

void teams() {
    std::atomic<int> visits[2];
    std::atomic<int>* pointer = visits;
    for (int threads : {1, 2, 3, 4, 2, 1}) {
        v4_threads(threads);
        visits[0] = visits[1] = 0;
        Call call{reinterpret_cast<void*>(count_members), &pointer, nullptr};
        for (int i = 0; i < 500; i++) v4_run(&call, 1);
        usleep(2000);  // long enough for the members to fall asleep
        for (int i = 0; i < 500; i++) v4_run(&call, 1);
        check(visits[0] == 1000 * threads, "every member of " + std::to_string(threads) + " ran every call");
        check(visits[1] == 0, "a barrier of " + std::to_string(threads) + " waits for all");
    }
    v4_threads(2);
    const int first = 0;
    v4_affinity(&first, 1);
    Call call{reinterpret_cast<void*>(count_members), &pointer, nullptr};
    v4_run(&call, 1);
    v4_affinity(nullptr, 0);
    v4_rest();
    v4_run(&call, 1);
}

struct Deal {
    std::int64_t count, least;
    std::atomic<int>*taken, *bad;  // [kPhases, count]; pieces that are none
};

// every member takes what it gets of every phase, twice
void take_all(const void* arguments, const v4::Team& team) {
    const Deal& deal = **static_cast<Deal* const*>(arguments);
    for (int round = 0; round < 2; round++) {
        for (int phase = 0; phase < v4::kPhases; phase++)
            for (v4::Span piece; team.take(phase, deal.count, deal.least, piece);) {
                const bool last = piece.end == deal.count;
                if (piece.begin < 0 || piece.begin >= piece.end || piece.end > deal.count) deal.bad[0]++;
                else
                    for (std::int64_t i = piece.begin; i < piece.end; i++) deal.taken[phase * deal.count + i]++;
                if (piece.end - piece.begin < deal.least && !last) deal.bad[0]++;
            }
        team.barrier();
        if (team.rank == 0) team.deal_again();
        team.barrier();
    }
}

void deals() {
    for (int threads : {1, 2, 3, 7}) {
        v4_threads(threads);
        for (std::int64_t count : {0, 1, 2, 5, 64, 1000})
            for (std::int64_t least : {1, 2, 7, 64, 2000}) {
                std::vector<std::atomic<int>> taken(static_cast<std::size_t>(v4::kPhases * count + 1));
                Deal deal{count, least, taken.data(), taken.data() + v4::kPhases * count}, *pointer = &deal;
                Call call{reinterpret_cast<void*>(take_all), &pointer, nullptr};
                const std::string about = std::to_string(count) + " units, at least " + std::to_string(least) + ", " + std::to_string(threads) + " threads";
                for (int again = 1; again <= 3; again++) {
                    v4_run(&call, 1);
                    bool once = true;
                    for (std::int64_t i = 0; i < v4::kPhases * count; i++) once = once && taken[static_cast<std::size_t>(i)] == 2 * again;
                    check(once, "every unit is dealt once a round: " + about);
                }
                check(*deal.bad == 0, "pieces lie in the whole and are long enough: " + about);
            }
    }
    v4_rest();
}

void forks() {
    v4_threads(2);
    norms(v4_level(0)[0] ? v4_level(0) : "scalar", 2);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a child that waits for threads it does not have
        const int before = failures;
        std::string level = "scalar";
        norms(level.c_str(), 2);
        _exit(failures == before ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child runs kernels with a team of its own");
    v4_rest();
}

}  // namespace

int main() {
    teams();
    deals();
    for (int i = 0; const char* level = v4_level(i); i++) {
        if (!level[0]) continue;
        for (int threads : {1, 3}) {
            v4_threads(threads);
            norms(level, threads);
            for (int tokens : {1, 2, 5, 33, 70}) {
                products(level, v4::kFloat32, v4::kNoScale, 19, 67, tokens);
                products(level, v4::kBFloat16, v4::kNoScale, 37, 131, tokens);
                products(level, v4::kFp8, v4::kUe8m0, 130, 200, tokens);
                products(level, v4::kFp8, v4::kScaleFloat32, 33, 259, tokens);
                products(level, v4::kFp4, v4::kUe8m0, 35, 96, tokens);
                products(level, v4::kFp4, v4::kUe8m0, 7, 288, tokens);
            }
        }
        for (int tokens : {1, 5, 33, 70})
            for (v4::Encoding dtype : {v4::kFloat32, v4::kBFloat16})
                for (int byte : {0, 15, 16, 232, 233, 254, 255}) {
                    const auto b = static_cast<std::uint8_t>(byte);
                    for (bool tiny : {false, true}) {
                        if (tiny && byte) continue;
                        extremes(level, v4::kFp8, dtype, 130, 259, tokens, b, tiny);
                        extremes(level, v4::kFp4, dtype, 19, 288, tokens, b, tiny);
                        extremes(level, v4::kFp4, dtype, 35, 672, tokens, b, tiny);
                    }
                }
        std::printf("level %s\n", level);
    }
    forks();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
