// Hyper-connections: streams written back, collapsed and normalised in one call. Included inside the level's namespace.
//
// Sums over the hidden size are taken in chunks of fixed size and added in their order, so the result depends neither on the number
// of threads nor on the other tokens of the batch.

constexpr std::int64_t kChunk = 256;
constexpr int kMaxStreams = 8, kMaxMixes = (2 + kMaxStreams) * kMaxStreams;

V4_INLINE float sigmoid(float x) { return 1.0f / (1.0f + __builtin_expf(-x)); }

// what a token's streams say about themselves: pre [M], post [M], comb [M, M]
struct Mixing {
    float pre[kMaxStreams], post[kMaxStreams], comb[kMaxStreams * kMaxStreams];
};

static void mix(const HyperCall& c, const float* sums, std::int64_t chunks, Mixing& out) {
    const int m = static_cast<int>(c.streams), rows = c.head ? m : (2 + m) * m;
    float total[kMaxMixes + 1] = {};
    for (std::int64_t k = 0; k < chunks; k++)
        for (int r = 0; r <= rows; r++) total[r] += sums[k * (kMaxMixes + 1) + r];
    const float factor = 1.0f / __builtin_sqrtf(total[rows] / static_cast<float>(m * c.width) + c.norm_eps);
    for (int j = 0; j < m; j++) out.pre[j] = sigmoid(total[j] * factor * c.scale[0] + c.base[j]) + c.hc_eps;
    if (c.head) return;
    for (int j = 0; j < m; j++) out.post[j] = 2.0f * sigmoid(total[m + j] * factor * c.scale[1] + c.base[m + j]);
    float* a = out.comb;
    for (int j = 0; j < m; j++) {  // row softmax
        float top = -3.4e38f, sum = 0;
        for (int k = 0; k < m; k++) {
            a[j * m + k] = total[2 * m + j * m + k] * factor * c.scale[2] + c.base[2 * m + j * m + k];
            top = a[j * m + k] > top ? a[j * m + k] : top;
        }
        for (int k = 0; k < m; k++) sum += a[j * m + k] = __builtin_expf(a[j * m + k] - top);
        for (int k = 0; k < m; k++) a[j * m + k] = a[j * m + k] / sum + c.hc_eps;
    }
    for (int step = 0; step < c.iterations; step++) {
        if (step)
            for (int j = 0; j < m; j++) {
                float sum = 0;
                for (int k = 0; k < m; k++) sum += a[j * m + k];
                for (int k = 0; k < m; k++) a[j * m + k] /= sum + c.hc_eps;
            }
        for (int k = 0; k < m; k++) {
            float sum = 0;
            for (int j = 0; j < m; j++) sum += a[j * m + k];
            for (int j = 0; j < m; j++) a[j * m + k] /= sum + c.hc_eps;
        }
    }
}

struct HyperLayout {
    Arena arena;
    float *sums, *squares;  // [T, chunks, kMaxMixes + 1], [T, chunks]
    Mixing* mixing;         // [T]
    HyperLayout(const HyperCall& c, std::uintptr_t base, int) : arena(base) {
        const std::int64_t units = c.tokens * ((c.width + kChunk - 1) / kChunk);
        sums = arena.take<float>(units * (kMaxMixes + 1));
        squares = arena.take<float>(units);
        mixing = arena.take<Mixing>(c.tokens);
    }
};

static void hyper(const void* arguments, const Team& team) {
    const HyperCall& c = *static_cast<const HyperCall*>(arguments);
    const std::int64_t n = c.width, m = c.streams, chunks = (n + kChunk - 1) / kChunk, units = c.tokens * chunks;
    const int rows = !c.fn ? 0 : static_cast<int>(c.head ? m : (2 + m) * m);
    const HyperLayout at(c, workspace(), team.size);
    float *sums = at.sums, *squares = at.squares;
    Mixing* mixing = at.mixing;
    const Rows& streams = c.y_in.data ? c.x_out : c.x_in;
    const Span mine = share(units, team);
    alignas(64) float x[kMaxStreams][kChunk], y[kChunk], out[kChunk];
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / chunks, first = unit % chunks * kChunk, w = n - first < kChunk ? n - first : kChunk;
        for (std::int64_t j = 0; j < m; j++) read_row(columns(c.x_in, j * n + first), t, w, x[j]);
        if (c.y_in.data) {  // hc_post
            const float *post = c.post_in + t * m, *comb = c.comb_in + t * m * m;
            alignas(64) float mixed[kMaxStreams][kChunk];
            read_row(columns(c.y_in, first), t, w, y);
            for (std::int64_t k = 0; k < m; k++) {
                for (std::int64_t i = 0; i < w; i++) {
                    float sum = 0;
                    for (std::int64_t j = 0; j < m; j++) sum += comb[j * m + k] * x[j][i];
                    mixed[k][i] = post[k] * y[i] + sum;
                }
                write_row(c.x_out, t, k * n + first, w, mixed[k]);
            }
            // what was stored is what the next half sees
            for (std::int64_t k = 0; k < m; k++) read_row(columns(c.x_out, k * n + first), t, w, x[k]);
        }
        if (!c.fn) continue;
        float* into = sums + unit * (kMaxMixes + 1);
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (std::int64_t j = 0; j < m; j++) sum += dot_product(c.fn + (r * m + j) * n + first, x[j], w);
            into[r] = sum;
        }
        float square = 0;
        for (std::int64_t j = 0; j < m; j++) square += dot_product(x[j], x[j], w);
        into[rows] = square;
    }
    if (!c.fn) return;
    team.barrier();
    const Span tokens = share(c.tokens, team);
    for (std::int64_t t = tokens.begin; t < tokens.end; t++) {
        mix(c, sums + t * chunks * (kMaxMixes + 1), chunks, mixing[t]);
        if (c.head) continue;
        __builtin_memcpy(c.post_out + t * m, mixing[t].post, static_cast<std::size_t>(m) * 4);
        __builtin_memcpy(c.comb_out + t * m * m, mixing[t].comb, static_cast<std::size_t>(m * m) * 4);
    }
    team.barrier();
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / chunks, first = unit % chunks * kChunk, w = n - first < kChunk ? n - first : kChunk;
        for (std::int64_t j = 0; j < m; j++) read_row(columns(streams, j * n + first), t, w, x[j]);
        for (std::int64_t i = 0; i < w; i++) {
            float sum = 0;
            for (std::int64_t j = 0; j < m; j++) sum += mixing[t].pre[j] * x[j][i];
            out[i] = sum;
        }
        write_row(c.u_out, t, first, w, out);
        if (!c.norm_weight.data) continue;
        read_row(columns(c.u_out, first), t, w, out);
        squares[unit] = dot_product(out, out, w);
    }
    if (!c.norm_weight.data) return;
    team.barrier();
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / chunks, first = unit % chunks * kChunk, w = n - first < kChunk ? n - first : kChunk;
        float square = 0;
        for (std::int64_t k = 0; k < chunks; k++) square += squares[t * chunks + k];
        const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(n) + c.norm_eps);
        read_row(columns(c.u_out, first), t, w, out);
        read_row(columns(c.norm_weight, first), 0, w, y);
        for (std::int64_t i = 0; i < w; i++) out[i] = out[i] * factor * y[i];
        write_row(c.u_out, t, first, w, out);
    }
}
