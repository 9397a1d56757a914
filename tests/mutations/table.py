"""The semantic bugs listed in the architecture note, 5.1, and those of CUDA kernels: patches, and the tests that notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One wrong line of code.

    Attributes:
        label: what it does wrong. file: below `v4sdk/`, or `backends/...` below the repository.
        old, new: text that occurs exactly once, and its replacement.
        killed_by: tests, below `tests/`, each of which fails on it.
    """

    label: str
    file: str
    old: str
    new: str
    killed_by: tuple[str, ...]

    @property
    def path(self) -> str:
        """The file, below the repository."""
        return self.file if self.file.startswith("backends/") else f"v4sdk/{self.file}"


@dataclass(frozen=True)
class Row:
    """One bug of the list.

    Attributes:
        bug: what went wrong elsewhere. patches: how it would look here. reason: why it cannot occur, where it cannot.
    """

    bug: str
    patches: tuple[Patch, ...] = ()
    reason: str = ""


FORWARD = "test_golden.py::test_float32_equals_the_official_forward_pass_in_prefill_decode_and_mtp"
ROUNDED = "test_golden.py::test_roundings_of_rows_and_indexer_equal_the_official_ones"
ELSEWHERE = "test_transformers.py::test_golden_checkpoints_give_their_logits[tiny-fp32]"
PACKED = "test_incremental.py::test_packed_rows_of_unequal_lengths_equal_each_alone"
MIXED = "test_incremental.py::test_packed_rows_at_mixed_positions_equal_each_alone"
FORK = "test_incremental.py::test_fork_goes_its_own_way_and_leaves_the_first_alone"
DECODE = "test_incremental.py::test_decode_equals_prefill_at[16]"

ROWS: tuple[Row, ...] = (
    Row(
        "one RoPE table for all layers",
        (
            Patch(
                "base 10000 with YaRN everywhere",
                "config.py",
                "        if ratio:\n            rope = RopeSpec(\n                self.compress_rope_theta,",
                "        if True:\n            rope = RopeSpec(\n                self.rope_theta,",
                (
                    FORWARD,
                    ELSEWHERE,
                    "test_quant_tables.py::test_layers_without_compressor_are_not_stretched",
                ),
            ),
            Patch(
                "base 160000 with YaRN everywhere",
                "config.py",
                "        if ratio:\n            rope = RopeSpec(",
                "        if True:\n            rope = RopeSpec(",
                (
                    FORWARD,
                    ELSEWHERE,
                    "test_quant_tables.py::test_layers_without_compressor_are_not_stretched",
                ),
            ),
            Patch(
                "YaRN left on for sliding-only layers",
                "config.py",
                "        rope = RopeSpec(self.rope_theta)\n",
                "        rope = RopeSpec(self.rope_theta, self.rope_factor, self.rope_original_context)\n",
                (
                    FORWARD,
                    ELSEWHERE,
                    "test_quant_tables.py::test_layers_without_compressor_are_not_stretched",
                ),
            ),
        ),
    ),
    Row(
        "YaRN mscale applied",
        (
            Patch(
                "to cosines and sines",
                "ops/rope.py",
                "torch.cat((angle.cos(), angle.sin()), -1)",
                "1.277 * torch.cat((angle.cos(), angle.sin()), -1)",
                (
                    FORWARD,
                    ELSEWHERE,
                    "test_quant_tables.py::test_angles_are_the_float32_product_even_at_a_million",
                ),
            ),
            Patch(
                "to the softmax scale",
                "ops/attention.py",
                "s * q.shape[-1] ** -0.5",
                "s * 1.63 * q.shape[-1] ** -0.5",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "compressed KV not rotated, or rotated at the block index instead of j*m",
        (
            Patch(
                "not rotated",
                "ops/compressor.py",
                "    pooled = rope(pooled, rope_table(block * ratio, inv_freq))\n",
                "",
                (FORWARD, ELSEWHERE),
            ),
            Patch(
                "rotated at the block index",
                "ops/compressor.py",
                "rope_table(block * ratio, inv_freq)",
                "rope_table(block, inv_freq)",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "half-split rotation instead of interleaved",
        (
            Patch(
                "first half with second half",
                "ops/rope.py",
                "    even, odd = torch.unbind(split_last(wide(tail), 2), -1)\n"
                "    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)\n",
                "    even, odd = torch.chunk(wide(tail), 2, -1)\n"
                "    rotated = torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1)\n",
                (
                    FORWARD,
                    "test_quant_tables.py::test_rotation_turns_adjacent_pairs_of_the_last_dimensions_and_back",
                ),
            ),
        ),
    ),
    Row(
        "inverse RoPE on the output missing",
        (
            Patch(
                "output left as it is",
                "ops/attention.py",
                "rotated(ops, o, rope_table, inverse=True)",
                "o",
                (FORWARD, ELSEWHERE),
            ),
            Patch(
                "output rotated forward again",
                "ops/attention.py",
                "rotated(ops, o, rope_table, inverse=True)",
                "rotated(ops, o, rope_table)",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "inverse frequency used as frequency",
        (
            Patch(
                "position divided by it",
                "ops/rope.py",
                "positions.float()[:, None] * inv",
                "positions.float()[:, None] / inv",
                (FORWARD, "test_quant_tables.py::test_angles_are_the_float32_product_even_at_a_million"),
            ),
        ),
    ),
    Row(
        "no causal mask in the indexer, or top-k landing on future blocks",
        (
            Patch(
                "no mask on scores",
                "ops/compressor.py",
                "torch.where(entry < visible[span], _rank(s, entry), _LOWEST)",
                "_rank(s, entry)",
                (FORWARD, "test_incremental.py::test_prefix_of_a_prompt_does_not_see_what_follows"),
            ),
            Patch(
                "the open block visible",
                "ops/compressor.py",
                "torch.where(entry < visible[span],",
                "torch.where(entry <= visible[span],",
                (FORWARD, "test_incremental.py::test_prefix_of_a_prompt_does_not_see_what_follows"),
            ),
            Patch(
                "a block hidden from the token that completes it",
                "ops/compressor.py",
                "visible = ((positions.long() + 1) // ratio)[:, None]",
                "visible = (positions.long() // ratio)[:, None]",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "shared expert unclamped",
        (
            Patch(
                "no limit",
                "ops/moe.py",
                "ops[linear](u, w3, numerics, between), limit).to(",
                'ops[linear](u, w3, numerics, between), float("inf")).to(',
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "FP8 simulation of KV copied as a no-op",
        (
            Patch(
                "of window rows",
                "ops/attention.py",
                "    if numerics.q8_kv:\n",
                "    if numerics.q8_kv and not numerics.q8_kv:\n",
                (ROUNDED,),
            ),
            Patch(
                "of compressed entries",
                "ops/compressor.py",
                "        if numerics.q8_kv:\n",
                "        if numerics.q8_kv and not numerics.q8_kv:\n",
                (ROUNDED,),
            ),
            Patch(
                "cast to BF16 instead of FP8",
                "quant.py",
                "rounded = (q * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)",
                "rounded = x.detach().to(torch.bfloat16).to(x.dtype)",
                (ROUNDED, "test_quant_tables.py::test_q8_equals_the_straightforward_one[448-64]"),
            ),
        ),
    ),
    Row(
        "mHC post with eps or without the factor 2; row-first Sinkhorn; comb not transposed",
        (
            Patch(
                "eps added to post",
                "ops/hyper_connection.py",
                "post = 2 * torch.sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m])",
                "post = 2 * torch.sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m]) + hc_eps",
                ("test_properties.py::test_post_can_vanish_and_reaches_two_while_pre_keeps_its_floor",),
            ),
            Patch(
                "no factor 2",
                "ops/hyper_connection.py",
                "post = 2 * torch.sigmoid(",
                "post = torch.sigmoid(",
                (
                    FORWARD,
                    "test_properties.py::test_post_can_vanish_and_reaches_two_while_pre_keeps_its_floor",
                ),
            ),
            Patch(
                "rows first",
                "ops/hyper_connection.py",
                "    c = c / (c.sum(-2, keepdim=True) + eps)\n"
                "    for _ in range(iterations - 1):\n"
                "        c = c / (c.sum(-1, keepdim=True) + eps)\n"
                "        c = c / (c.sum(-2, keepdim=True) + eps)\n",
                "    c = c / (c.sum(-1, keepdim=True) + eps)\n"
                "    for _ in range(iterations - 1):\n"
                "        c = c / (c.sum(-2, keepdim=True) + eps)\n"
                "        c = c / (c.sum(-1, keepdim=True) + eps)\n",
                ("test_properties.py::test_sinkhorn_normalises_columns_last",),
            ),
            Patch(
                "comb not transposed",
                "ops/hyper_connection.py",
                "comb.transpose(1, 2) @ wide(x)",
                "comb @ wide(x)",
                (
                    FORWARD,
                    ELSEWHERE,
                    "test_properties.py::test_comb_leads_from_its_first_index_to_its_second",
                ),
            ),
        ),
    ),
    Row(
        "router quantised, or gate.bias not found by name",
        (
            Patch(
                "router in BF16",
                "ops/moe.py",
                "F.softplus(wide(u) @ gate.to(wide(u).dtype).T)",
                "F.softplus((u.bfloat16() @ gate.bfloat16().T).to(wide(u).dtype))",
                (FORWARD, ELSEWHERE),
            ),
            Patch(
                "bias of zeros",
                "model.py",
                'self.tensor(f"{p}.gate.bias")',
                'self.tensor(f"{p}.gate.bias") * 0',
                (FORWARD, ELSEWHERE),
            ),
            Patch(
                "bias moves the weight, too",
                "ops/moe.py",
                "return ids.to(torch.int32), _weights(scores, ids, scale)",
                "return ids.to(torch.int32), _weights(scores + bias, ids, scale)",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "hash layers treated as learned",
        (
            Patch(
                "experts by score",
                "model.py",
                "ops[o.route_hash](u, w.gate, w.tid2eid, batch.token_ids, c.routed_scaling_factor)",
                "ops[o.route](u, w.gate, w.gate[:, 0] * 0, c.num_experts_per_tok, c.routed_scaling_factor)",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "compressor given wrong sequence lengths",
        (
            Patch(
                "room for the blocks of one sequence only",
                "ops/compressor.py",
                "batch.num_tokens // ratio + batch.num_sequences)",
                "batch.num_tokens // ratio + 1)",
                ("test_incremental.py::test_blocks_of_all_sequences_close_in_one_step[1]",),
            ),
            Patch(
                "blocks reach into the sequence before",
                "ops/compressor.py",
                "here = row >= batch.cu_seqlens.long()[seq][:, None]",
                "here = row >= 0",
                (MIXED,),
            ),
            Patch(
                "a block closes one token late",
                "ops/compressor.py",
                "closes = (batch.positions + 1) % ratio == 0",
                "closes = (batch.positions % ratio == 0) & (batch.positions > 0)",
                (FORWARD, ELSEWHERE),
            ),
        ),
    ),
    Row(
        "overlap state not kept for all verified tokens",
        (
            Patch(
                "going back restores the window alone",
                "kv_cache.py",
                "                tensor[rows.slot] = saved[name]\n",
                '                tensor[rows.slot] = saved[name] if name == "window" else tensor[rows.slot]\n',
                (FORK, "test_incremental.py::test_entries_and_fixed_part_move_to_another_cache"),
            ),
            Patch(
                "state holds the open block only",
                "ops/compressor.py",
                "    ring_write(state, pair.detach(), batch, length)\n",
                "    ring_write(state, pair.detach() * (batch.positions % length >= ratio)[:, None, None], batch, length)\n",
                (DECODE,),
            ),
        ),
    ),
    Row(
        "decode cache differs from re-prefill",
        (
            Patch(
                "window ring one slot off in decode",
                "ops/rows.py",
                "ring[batch.slots.long(), batch.positions.long() % length] = rows.to(ring.dtype)",
                "ring[batch.slots.long(), (batch.positions.long() + 1) % length] = rows.to(ring.dtype)",
                (FORWARD, DECODE),
            ),
            Patch(
                "overlap of an earlier sequence leaks in",
                "ops/compressor.py",
                "    exists = (pos >= 0)[..., None]\n",
                "    exists = (pos >= -length)[..., None]\n",
                ("test_incremental.py::test_rows_of_an_earlier_sequence_are_never_seen[3]", FORWARD),
            ),
        ),
    ),
    Row(
        "MTP fed a collapsed hidden state",
        (
            Patch(
                "mean of the streams",
                "model.py",
                "hx = self.ops[o.rms_norm](streams, m.hnorm,",
                "hx = self.ops[o.rms_norm](streams.mean(1, keepdim=True).expand_as(streams), m.hnorm,",
                (FORWARD,),
            ),
        ),
    ),
    Row(
        "prefill and decode mixed in one call",
        (
            Patch(
                "all sequences start where the first does",
                "ops/attention.py",
                "        start = positions[lo]\n",
                "        start = positions[0]\n",
                (MIXED,),
            ),
            Patch(
                "rings read in packed order instead of by slot",
                "ops/attention.py",
                "history = load_kv(window[batch.slots.long()].flatten(0, 1)",
                "history = load_kv(window[: batch.num_sequences].flatten(0, 1)",
                ("test_incremental.py::test_order_of_packing_changes_nothing",),
            ),
        ),
    ),
    Row(
        "0731 treated as an MTP model",
        (
            Patch(
                "count of blocks from num_nextn_predict_layers",
                "config.py",
                "return 3 if self.is_dspark else self.num_nextn_predict_layers",
                "return self.num_nextn_predict_layers",
                ("test_tensors.py",),
            ),
        ),
    ),
    Row(
        "compressor state made a participant of the prefix cache, so only multiples of 4096 tokens are reused",
        (
            Patch(
                "reuse in multiples of 4096",
                "prompting.py",
                "prefix = min(common_prefix(held.ids, ids), len(ids) - 1)",
                "prefix = min(common_prefix(held.ids, ids), len(ids) - 1) // 4096 * 4096",
                ("test_session.py::test_chat_over_a_kept_sequence_equals_fresh",),
            ),
        ),
    ),
)

KERNEL = "cuda/test_kernels.py::test_a_kernel_computes_what_its_reference_does"
VIEWS = "cuda/test_edges.py::test_activations_may_be_views_with_gaps"
COMPILED = "cuda/test_compiled.py::test_kernels_fit_their_chip_and_keep_their_budget"

# one bug or more per family of CUDA kernels, as such kernels have them
KERNELS: tuple[Row, ...] = (
    Row(
        "CUDA linear",
        (
            Patch(
                "wrong stride: rows of the input taken for dense",
                "backends/cuda/kernels/weights.py",
                "rows[:, None].to(tl.int64) * row_stride",
                "rows[:, None].to(tl.int64) * K",
                (f"{VIEWS}[linear-decode]",),
            ),
            Patch(
                "swapped scale: rows and columns of the tiles exchanged",
                "backends/cuda/kernels/weights.py",
                "(n // 128) * tiles + k0 // 128",
                "(k0 // 128) * tiles + n // 128",
                (f"{KERNEL}[linear/tiny-decode-exact]",),
            ),
            Patch(
                "a part of a split depth is never added",
                "backends/cuda/kernels/numbers.py",
                "for part in tl.static_range(1, SPLIT):",
                "for part in tl.static_range(2, SPLIT):",
                (f"{KERNEL}[linear/tiny-decode-exact]",),
            ),
            Patch(
                "a tile that only fits larger chips",
                "backends/cuda/linear.py",
                '("any", "prefill"): Tile(64, 64, GROUP, 4, 2),',
                '("any", "prefill"): Tile(128, 128, GROUP, 8, 4),',
                (f"{COMPILED}[linear-120]",),
            ),
        ),
    ),
    Row(
        "CUDA norm",
        (
            Patch(
                "mean over the block instead of the row",
                "backends/cuda/kernels/norm.py",
                "tl.sum(value * value, 0) / width",
                "tl.sum(value * value, 0) / BLOCK",
                (f"{KERNEL}[rms_norm/odd-decode-fast]",),
            ),
        ),
    ),
    Row(
        "CUDA embedding",
        (
            Patch(
                "wrong stride: streams outside, tokens inside",
                "backends/cuda/kernels/embedding.py",
                "y + (rows * M + m)[:, None] * N",
                "y + (m * T + rows)[:, None] * N",
                (f"{KERNEL}[embed/tiny-decode-exact]",),
            ),
            Patch(
                "sines where cosines belong in the second quarter",
                "backends/cuda/kernels/embedding.py",
                "odd = (quarter & 1) == 1",
                "odd = (quarter & 3) == 1",
                (f"{KERNEL}[rope_table/160000-6-2-tokens-to-300]",),
            ),
        ),
    ),
    Row(
        "CUDA hyper-connections",
        (
            Patch(
                "matrix of the mixes transposed",
                "backends/cuda/kernels/hyper_connection.py",
                "comb + (rows * M + j) * M + k",
                "comb + (rows * M + k) * M + j",
                (f"{KERNEL}[hc_post/tiny-decode-exact]",),
            ),
            Patch(
                "missing mask: rows that do not exist join the sums, where streams are no power of two",
                "backends/cuda/kernels/hyper_connection.py",
                "c = tl.where(source & destination, e /",
                "c = tl.where(destination, e /",
                (f"{KERNEL}[hc_pre/odd-decode-fast]",),
            ),
        ),
    ),
    Row(
        "CUDA projections",
        (
            Patch(
                "off by one: the oldest row of the window is not kept",
                "backends/cuda/kernels/projection.py",
                "other=0) - rows <= W)",
                "other=0) - rows < W)",
                (f"{KERNEL}[kv_project_store/tiny-prefill-reference]",),
            ),
            Patch(
                "the output is turned forth instead of back",
                "backends/cuda/kernels/projection.py",
                "return rotate_pairs(tile, cos, sin, True, BK)",
                "return rotate_pairs(tile, cos, sin, False, BK)",
                (f"{KERNEL}[grouped_out/tiny-decode-exact]",),
            ),
            Patch(
                "swapped scale: a group of a stored row takes its neighbour's",
                "backends/cuda/kernels/rows.py",
                "            rows + base + (first + group)[None, :],",
                "            rows + base + (first + (group ^ 1))[None, :],",
                ("cuda/test_edges.py::test_rows_may_have_several_scales[kv_project_store-decode]",),
            ),
        ),
    ),
    Row(
        "CUDA attention",
        (
            Patch(
                "off by one: a query sees one position too many",
                "backends/cuda/kernels/attention.py",
                "(k[None, :] > p[:, None] - W)",
                "(k[None, :] >= p[:, None] - W)",
                (f"{KERNEL}[sparse_attn/swa-tiny-chunk-exact]",),
            ),
            Patch(
                "off by one: an entry is seen only after the token that completes it",
                "backends/cuda/kernels/attention.py",
                "entries = tl.minimum((p + 1) // ratio, num_pages * per_page)",
                "entries = tl.minimum(p // ratio, num_pages * per_page)",
                (f"{KERNEL}[sparse_attn/hca-tiny-decode-exact]",),
            ),
            Patch(
                "missing mask: absent picks are attended to",
                "backends/cuda/kernels/attention.py",
                "                seen = entry >= 0\n",
                "                seen = entry >= -1\n",
                (f"{KERNEL}[sparse_attn/csa-tiny-decode-exact]",),
            ),
        ),
    ),
    Row(
        "CUDA compressors",
        (
            Patch(
                "off by one: a row of the block before taken for one of this block",
                "backends/cuda/kernels/compressor.py",
                "tl.where(i >= ratio, E, 0)",
                "tl.where(i > ratio, E, 0)",
                (f"{KERNEL}[compress/csa-tiny-decode-exact]",),
            ),
            Patch(
                "unwritten tail: the oldest row of an open block is not kept",
                "backends/cuda/kernels/compressor.py",
                "valid = (back < length) & (row >= start)",
                "valid = (back < length - 1) & (row >= start)",
                (f"{KERNEL}[compress/csa-tiny-chunk-exact]",),
            ),
        ),
    ),
    Row(
        "CUDA indexer",
        (
            Patch(
                "missing clamp: heads that score below zero count",
                "backends/cuda/kernels/indexer.py",
                "weighted = tl.maximum(dot, 0.0) * weights[None, :]",
                "weighted = dot * weights[None, :]",
                (f"{KERNEL}[index_topk/tiny-decode-exact]",),
            ),
            Patch(
                "off by one: an entry is seen only after the token that completes it",
                "backends/cuda/kernels/indexer.py",
                "(tl.load(positions + t, mask=t < T, other=0) + 1) // ratio, limit)",
                "tl.load(positions + t, mask=t < T, other=0) // ratio, limit)",
                ("cuda/test_edges.py::test_the_newest_entry_is_seen_at_once",),
            ),
            Patch(
                "ties: the first of equal entries is passed over",
                "backends/cuda/kernels/indexer.py",
                "picked = above | (equal & (rank <= equals[:, None]))",
                "picked = above | (equal & (rank > 1) & (rank <= equals[:, None] + 1))",
                (f"{KERNEL}[index_topk/ties-tiny-decode-exact]",),
            ),
            Patch(
                "unwritten tail: the last round of the rotation is left out",
                "backends/cuda/kernels/rows.py",
                "for _ in tl.static_range(rounds):",
                "for _ in tl.static_range(rounds - 1):",
                (f"{KERNEL}[index_query/tiny-first-fast]",),
            ),
        ),
    ),
    Row(
        "CUDA experts",
        (
            Patch(
                "swapped scale: the gate's for the up matrix",
                "backends/cuda/kernels/moe.py",
                "v = multiply(v, here, up, column_scale(s3, n, I, k0, K, ENCODING), OPERAND)",
                "v = multiply(v, here, up, column_scale(s1, n, I, k0, K, ENCODING), OPERAND)",
                (f"{KERNEL}[shared_expert/wide-decode-fast]",),
            ),
            Patch(
                "wrong row: a choice's number for its token's",
                "backends/cuda/kernels/moe_packed.py",
                "x += (pair // CHOSEN).to(tl.int64) * row_stride",
                "x += (pair % CHOSEN).to(tl.int64) * row_stride",
                (f"{KERNEL}[routed_experts/packed-odd-decode-fast]",),
            ),
            Patch(
                "missing clamp: the up values have no lower limit",
                "backends/cuda/kernels/moe.py",
                "tl.minimum(tl.maximum(v, -limit), limit)",
                "tl.minimum(v, limit)",
                (f"{KERNEL}[shared_expert/tiny-first-fast]",),
            ),
            Patch(
                "off by one: pairs of a prompt are dealt one place too late",
                "backends/cuda/kernels/moe_prompt.py",
                "found + tl.cumsum(match, 0) - 1",
                "found + tl.cumsum(match, 0)",
                (f"{KERNEL}[routed_experts/packed-wide-chunk-fast]",),
            ),
            Patch(
                "the last choice of every token of a prompt is left out of its sum",
                "backends/cuda/kernels/moe_prompt.py",
                "P, width, CHOSEN, 1, BETWEEN)",
                "P, width, CHOSEN - 1, 1, BETWEEN)",
                (f"{KERNEL}[routed_experts/packed-wide-chunk-fast]",),
            ),
            Patch(
                "wrong row: in a prompt, a pair's number for its token's",
                "backends/cuda/kernels/moe_packed.py",
                "tokens = tl.maximum(pair, 0) // CHOSEN",
                "tokens = tl.maximum(pair, 0) % CHOSEN",
                (f"{KERNEL}[routed_experts/packed-wide-chunk-fast]",),
            ),
        ),
    ),
    Row(
        "CUDA routing",
        (
            Patch(
                "ties go to the highest id",
                "backends/cuda/kernels/route.py",
                "first = tl.min(tl.where(free & (moved == best[:, None]), e[None, :], EXPERTS), 1)",
                "first = tl.max(tl.where(free & (moved == best[:, None]), e[None, :], -1), 1)",
                (f"{KERNEL}[route/ties-tiny-decode-exact]",),
            ),
            Patch(
                "missing bias: scores alone choose",
                "backends/cuda/kernels/route.py",
                "moved = score + tl.load(bias + e, mask=e < E, other=0.0)[None, :]",
                "moved = score",
                (f"{KERNEL}[route/odd-chunk-fast]",),
            ),
            Patch(
                "wrong row: a token's place for its id",
                "backends/cuda/kernels/route.py",
                "table + token[:, None] * CHOSEN + k[None, :]",
                "table + rows[:, None] * CHOSEN + k[None, :]",
                (f"{KERNEL}[route_hash/tiny-decode-exact]",),
            ),
        ),
    ),
    Row(
        "CUDA sampling",
        (
            Patch(
                "ties go to the highest id",
                "backends/cuda/kernels/select.py",
                "return (key.to(tl.int64) << 32) + (number ^ LARGEST).to(tl.int64)",
                "return (key.to(tl.int64) << 32) + number.to(tl.int64)",
                (f"{KERNEL}[sample/ties-go-to-the-lowest-id]",),
            ),
            Patch(
                "positions stand still",
                "backends/cuda/kernels/sample.py",
                "tl.load(positions + t, mask=t < T) + 1",
                "tl.load(positions + t, mask=t < T)",
                (f"{KERNEL}[feed/3-rows]",),
            ),
        ),
    ),
)
