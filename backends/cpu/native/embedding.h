// Token rows into streams. Included inside the level's namespace.

static void embed(const void* arguments, const Team& team) {
    const EmbedCall& c = *static_cast<const EmbedCall*>(arguments);
    const std::int64_t blocks = blocks_of(c.width);
    const Span mine = share(c.tokens * blocks, team);
    alignas(64) float block[kBlock];
    for (std::int64_t unit = mine.begin; unit < mine.end; unit++) {
        const std::int64_t t = unit / blocks, first = unit % blocks * kBlock;
        const std::int64_t n = c.width - first < kBlock ? c.width - first : kBlock;
        read_row(columns(c.weight, first), c.token_ids[t], n, block);
        for (std::int64_t m = 0; m < c.streams; m++) write_row(c.y, t, m * c.width + first, n, block);
    }
}
