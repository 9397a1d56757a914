// The matrix product by stored weight encoding. Included inside the level's namespace.

struct LinearLayout {
    Arena arena;
    int terms;
    char* packed;
    LinearLayout(const LinearCall& c, std::uintptr_t base, int) : arena(base) {
        terms = terms_for(c.weight, c.x.dtype, c.q8_input);
        packed = arena.take<char>(packed_bytes(c.weight, c.tokens, terms));
    }
};

static void linear(const void* arguments, const Team& team) {
    const LinearCall& c = *static_cast<const LinearCall*>(arguments);
    const LinearLayout at(c, workspace(), team.size);
    pack(c.x, c.tokens, c.weight, c.q8_input, at.terms, at.packed, team);
    team.barrier();
    deal_rows(team, 0, c.weight.rows, c.tokens, [&](std::int64_t begin, std::int64_t end) {
        multiply(c.weight, begin, end, at.packed, c.tokens, at.terms,
                 [&](std::int64_t t, std::int64_t row, const float* values, int n) { write_row(c.y, t, row, n, values); });
    });
}
