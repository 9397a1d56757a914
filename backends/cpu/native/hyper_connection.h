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

constexpr std::int64_t kTogether = 4;

// x[k] = post[k] y + sum over j of comb[j, k] x[j], w columns (and what stands beyond them up to a whole vector)
template <int Streams>
static void return_to_streams(std::int64_t streams, const float* post, const float* comb, const float* y, std::int64_t w, float (*x)[kChunk]) {
    const int m = Streams ? Streams : static_cast<int>(streams);
    for (std::int64_t i = 0; i < w; i += W) {
        F in[kMaxStreams];
        for (int j = 0; j < m; j++) in[j] = load(x[j] + i);
        for (int k = 0; k < m; k++) {
            F sum = set(0);
            for (int j = 0; j < m; j++) sum = fma(set(comb[j * m + k]), in[j], sum);
            store(x[k] + i, fma(set(post[k]), load(y + i), sum));
        }
    }
}

static void hyper(const void* arguments, const Team& team) {
    const HyperCall& c = *static_cast<const HyperCall*>(arguments);
    const std::int64_t n = c.width, m = c.streams, chunks = (n + kChunk - 1) / kChunk, units = c.tokens * chunks;
    const int rows = !c.fn ? 0 : static_cast<int>(c.head ? m : (2 + m) * m);
    const HyperLayout at(c, workspace(), team.size);
    float *sums = at.sums, *squares = at.squares;
    Mixing* mixing = at.mixing;
    const Rows& streams = c.y_in.data ? c.x_out : c.x_in;
    // tokens together, so that what a chunk is multiplied with is read once for all of them
    alignas(64) float several[kTogether][kMaxStreams][kChunk], y[kChunk], out[kChunk];
    const std::int64_t groups = (c.tokens + kTogether - 1) / kTogether;
    const Span first_half = share(groups * chunks, team);
    for (std::int64_t unit = first_half.begin; unit < first_half.end; unit++) {
        const std::int64_t t0 = unit / chunks * kTogether, first = unit % chunks * kChunk, w = n - first < kChunk ? n - first : kChunk;
        const std::int64_t count = c.tokens - t0 < kTogether ? c.tokens - t0 : kTogether;
        for (std::int64_t i = 0; i < count; i++) {
            const std::int64_t t = t0 + i;
            float(*x)[kChunk] = several[i];
            for (std::int64_t j = 0; j < m; j++) read_row(columns(c.x_in, j * n + first), t, w, x[j]);
            if (c.y_in.data) {  // hc_post
                read_row(columns(c.y_in, first), t, w, y);
                if (m == 4) return_to_streams<4>(4, c.post_in + t * m, c.comb_in + t * m * m, y, w, x);
                else return_to_streams<0>(m, c.post_in + t * m, c.comb_in + t * m * m, y, w, x);
                for (std::int64_t k = 0; k < m; k++) {
                    write_row(c.x_out, t, k * n + first, w, x[k]);
                    // what was stored is what the next half sees
                    if (c.x_out.dtype == kBFloat16) read_row(columns(c.x_out, k * n + first), t, w, x[k]);
                }
            }
        }
        if (!c.fn) continue;
        const float* rows_of[kTogether];
        for (std::int64_t i = 0; i < kTogether; i++) rows_of[i] = several[i < count ? i : 0][0];
        float found[kTogether];
        for (int r = 0; r < rows; r++) {
            const float* fn = c.fn + r * m * n + first;
            if (count == kTogether) dot_products<kTogether>(fn, n, rows_of, kChunk, m, w, found);
            else
                for (std::int64_t i = 0; i < count; i++) dot_products<1>(fn, n, rows_of + i, kChunk, m, w, found + i);
            for (std::int64_t i = 0; i < count; i++) sums[((t0 + i) * chunks + unit % chunks) * (kMaxMixes + 1) + r] = found[i];
        }
        for (std::int64_t i = 0; i < count; i++)
            dot_products<1>(rows_of[i], kChunk, rows_of + i, kChunk, m, w, sums + ((t0 + i) * chunks + unit % chunks) * (kMaxMixes + 1) + rows);
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
    const Span mine = share(units, team);
    float(*x)[kChunk] = several[0];
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / chunks, first = unit % chunks * kChunk, w = n - first < kChunk ? n - first : kChunk;
        for (std::int64_t j = 0; j < m; j++) read_row(columns(streams, j * n + first), t, w, x[j]);
        for (std::int64_t i = 0; i < w; i += W) {
            F sum = set(0);
            for (std::int64_t j = 0; j < m; j++) sum = fma(set(mixing[t].pre[j]), load(x[j] + i), sum);
            store(out + i, sum);
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
        for (std::int64_t i = 0; i < w; i += W) store(out + i, load(out + i) * set(factor) * load(y + i));
        write_row(c.u_out, t, first, w, out);
    }
}
