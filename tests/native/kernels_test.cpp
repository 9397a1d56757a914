// The kernels' library alone, without Python: products at odd sizes before an unmapped page, the team of threads, and what it does
// when a process forks. Built with sanitizers by run.sh.
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
            worst = gap <= worst ? worst : gap;  // a NaN is worst
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
            worst = gap <= worst ? worst : gap;
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
        std::printf("level %s\n", level);
    }
    forks();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
