// Rotary positions. Included inside the level's namespace.

// a member's own libm would differ by level: one text, the compiler's
static void rope_table(const void* arguments, const Team& team) {
    const RopeTableCall& c = *static_cast<const RopeTableCall*>(arguments);
    const Span mine = share(c.tokens, team);
    for (std::int64_t t = mine.begin; t < mine.end; t++)
        for (std::int64_t i = 0; i < c.half; i++) {
            const float angle = static_cast<float>(c.positions[t]) * c.inv_freq[i];
            c.table[t * 2 * c.half + i] = __builtin_cosf(angle);
            c.table[t * 2 * c.half + c.half + i] = __builtin_sinf(angle);
        }
}

// rotate adjacent pairs of 2 * half values in place; `table` holds one token's cosines, then sines
V4_INLINE void rotate(float* x, const float* table, std::int64_t half, bool inverse) {
    for (std::int64_t i = 0; i < half; i++) {
        const float cosine = table[i], sine = inverse ? -table[half + i] : table[half + i], even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cosine - odd * sine;
        x[2 * i + 1] = even * sine + odd * cosine;
    }
}

static void feed(const void* arguments, const Team& team) {
    const FeedCall& c = *static_cast<const FeedCall*>(arguments);
    if (team.rank) return;
    for (std::int64_t t = 0; t < c.tokens; t++) {
        c.token_ids[t] = c.drawn[t];
        c.positions[t] += 1;
    }
}
