// RMS normalisation. Included inside the level's namespace.

// y = weight * x / sqrt(mean(x**2) + eps) of one row in place
static void normalise(float* x, const Rows& weight, std::int64_t width, float eps) {
    const float factor = 1.0f / __builtin_sqrtf(dot_product(x, x, width) / static_cast<float>(width) + eps);
    for (std::int64_t at = 0; at < width; at += kBlock) {
        alignas(64) float w[kBlock];
        const std::int64_t n = width - at < kBlock ? width - at : kBlock;
        read_row(columns(weight, at), 0, n, w);
        for (std::int64_t i = 0; i < n; i++) x[at + i] = x[at + i] * factor * w[i];
    }
}

struct NormLayout {
    Arena arena;
    std::int64_t per_member;
    float* rows;
    NormLayout(const NormCall& c, std::uintptr_t base, int threads) : arena(base) {
        per_member = (c.width + 15) / 16 * 16;
        rows = arena.take<float>(per_member * threads);
    }
};

static void rms_norm(const void* arguments, const Team& team) {
    const NormCall& c = *static_cast<const NormCall*>(arguments);
    const NormLayout at(c, workspace(), team.size);
    float* row = at.rows + team.rank * at.per_member;
    const Span mine = share(c.tokens, team);
    for (std::int64_t t = mine.begin; t < mine.end; t++) {
        read_row(c.x, t, c.width, row);
        normalise(row, c.weight, c.width, c.eps);
        write_row(c.y, t, 0, c.width, row);
    }
}
