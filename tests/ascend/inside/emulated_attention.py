"""Attention, indexers, compressors: emulated kernels against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ascend.inside.loaded import A2_A3, BF16, F16, F32, FAMILY, C, S, T, by_hand, close, i32, rows
from torch import Tensor

# --- attention


def mla(q: Tensor, **given: Any) -> Tensor:
    """`sparse_flash_mla` with metadata made from the same arguments."""
    shape = {"cmp_ratio": 1, "ori_mask_mode": 4, "cmp_mask_mode": 3, "ori_win_left": 127, "ori_win_right": 0}
    shape |= {"layout_q": "TND", "layout_kv": "TND"}
    shape |= {k: given.pop(k) for k in list(given) if k in shape}
    lengths = {k: v for k, v in given.items() if k.startswith(("cu_", "seqused")) or k == "cmp_residual_kv"}
    picks = given.get("cmp_sparse_indices")
    work = T.sparse_flash_mla_metadata(
        q.shape[1], 1, 512, **lengths, **shape, cmp_topk=0 if picks is None else picks.shape[-1],
        has_ori_kv=True, has_cmp_kv="cmp_kv" in given,
    )  # fmt: skip
    return T.sparse_flash_mla(q, **given, **shape, metadata=work, softmax_scale=1.0)[0]


@by_hand("cann_ops_transformer.sparse_flash_mla", "cann_ops_transformer.sparse_flash_mla_metadata")
def test_a_sink_takes_its_share_and_gives_nothing() -> None:
    q = torch.zeros(1, 2, 512, dtype=BF16)
    kv = rows(2, 512, c1={0: 6.0}, c2={1: 3.0})[:, None]
    lengths = {"cu_seqlens_q": i32(0, 1), "cu_seqlens_ori_kv": i32(0, 2)}
    # all logits are zero: halves without a sink; with sinks 0 and ln 2, thirds and quarters
    close(mla(q, ori_kv=kv, **lengths)[0, 0, 1:3], [3.0, 1.5])
    out = mla(q, ori_kv=kv, sinks=torch.tensor([0.0, math.log(2)]), **lengths)
    close(out[0, :, 1:3], [[2.0, 1.0], [1.5, 0.75]])


def test_logits_are_products_of_query_and_key() -> None:
    q = rows(1, 512, c0={0: 2.0})[:, None].expand(1, 2, 512).contiguous()
    kv = rows(2, 512, c0={0: 0.5, 1: 1.0})[:, None]
    out = mla(q, ori_kv=kv, cu_seqlens_q=i32(0, 1), cu_seqlens_ori_kv=i32(0, 2))
    # logits 1 and 2: weights 1 and e, over 1 + e
    close(out[0, 0, 0], (0.5 + math.e) / (1 + math.e), atol=4e-3)


def test_a_query_sees_127_rows_back_and_itself_and_none_ahead() -> None:
    q = torch.zeros(2, 2, 512, dtype=BF16)
    # 131 rows; the queries are at 129 and 130
    kv = rows(131, 512, c1={1: 128.0}, c2={2: 128.0}, c3={3: 128.0}, c4={129: 128.0}, c5={130: 128.0})[
        :, None
    ]
    out = mla(q, ori_kv=kv, cu_seqlens_q=i32(0, 2), cu_seqlens_ori_kv=i32(0, 131))
    close(out[0, 0, 1:6], [0, 1, 1, 1, 0])
    close(out[1, 0, 1:6], [0, 0, 1, 1, 1])


def test_compressed_rows_are_seen_once_their_last_token_is() -> None:
    q = torch.zeros(3, 2, 512, dtype=BF16)
    kv = torch.zeros(6, 1, 512, dtype=BF16)
    far = rows(1, 512, c7={0: 60.0})[:, None]
    picks = torch.full((3, 1, 512), -1, dtype=torch.int32)
    picks[:, :, 0] = 0
    lengths = {"cu_seqlens_q": i32(0, 3), "cu_seqlens_ori_kv": i32(0, 6), "cu_seqlens_cmp_kv": i32(0, 1)}
    # 1 * 4 + 1 tokens: queries at 2, 3, 4 of those; the entry of tokens 0..3 is seen from 3 on
    out = mla(
        q, ori_kv=kv, cmp_kv=far, cmp_sparse_indices=picks, cmp_residual_kv=i32(1), cmp_ratio=4, **lengths
    )
    # window rows seen: 4, 5, 6 of zeros
    close(out[:, 0, 7], [0, 60 / 6, 60 / 7], atol=0.05)


def test_pages_are_found_through_the_table_and_absent_picks_are_nothing() -> None:
    q = torch.zeros(1, 2, 512, dtype=BF16)
    pages = torch.zeros(3, 16, 1, 512, dtype=BF16)
    pages[2, 0, 0, 1] = 17.0
    pages[0, 0, 0, 2] = 17.0
    table = i32([1, 2])
    out = mla(
        q,
        ori_kv=pages,
        ori_block_table=table,
        seqused_ori_kv=i32(17),
        cu_seqlens_q=i32(0, 1),
        layout_kv="PA_BBND",
    )
    # position 16 is row 0 of page 2
    close(out[0, 0, 1:3], [1.0, 0.0])


@by_hand("_C_ascend.npu_sparse_attn_sharedkv", "_C_ascend.npu_sparse_attn_sharedkv_metadata", on=A2_A3)
def test_the_other_pack_counts_tokens_before_compression() -> None:
    q = torch.zeros(1, 64, 512, dtype=BF16)
    near, far = torch.zeros(1, 16, 1, 512, dtype=BF16), torch.zeros(1, 16, 1, 512, dtype=BF16)
    near[0, 8, 0, 1] = 12.0
    far[0, 0, 0, 2], far[0, 1, 0, 3], far[0, 2, 0, 4] = 12.0, 12.0, 12.0
    picks = torch.full((1, 1, 512), -1, dtype=torch.int32)
    picks[0, 0, :2] = i32(1, 2)
    shape = {"cmp_ratio": 4, "ori_win_left": 127, "ori_win_right": 0, "layout_q": "TND", "layout_kv": "PA_ND"}
    lengths = {"cu_seqlens_q": i32(0, 1), "seqused_kv": i32(9)}
    work = C.npu_sparse_attn_sharedkv_metadata(64, 1, 512, **lengths, **shape, cmp_topk=512)
    out = C.npu_sparse_attn_sharedkv(
        q, ori_kv=near, cmp_kv=far, cmp_sparse_indices=picks, ori_block_table=i32([0]), cmp_block_table=i32([0]),
        sinks=torch.zeros(64), metadata=work, **lengths, **shape,
    )[0]  # fmt: skip
    # 9 window rows, entry 1 (entry 2 ends at token 11, the query is at 8), the sink: 11 parts
    close(out[0, 0, 1:5], [12 / 11, 0, 12 / 11, 0], atol=5e-3)


@by_hand("npu.npu_sparse_flash_attention")
def test_listed_rows_by_plain_and_rotary_channels() -> None:
    q, q_rope = rows(2, 512, c0={0: 1.0, 1: 1.0}).view(1, 2, 1, 512), torch.zeros(1, 2, 1, 64, dtype=BF16)
    q_rope[..., 0] = 1.0
    kv = rows(4, 512, c1={0: 8.0, 1: 8.0, 3: 4.0}).view(1, 4, 1, 512)
    k_rope = torch.zeros(1, 4, 1, 64, dtype=BF16)
    k_rope[0, 3, 0, 0] = math.log(2)
    seen = i32([[0, 3, -1]], [[2, -1, -1]])[None]
    how = {"query_rope": q_rope, "key_rope": k_rope, "attention_mode": 2, "sparse_mode": 0}
    out = S.npu_sparse_flash_attention(q, kv, kv, seen, 1.0, **how)[0]
    # weights 1 and 2 for rows 0 and 3 (ln 2 is rounded to BF16); row 2 alone
    close(out[0, :, 0, 1], [16 / 3, 0.0], atol=0.03)
    # causal: query 0 of 2 in 4 rows is at 2, and row 3 is ahead of it
    close(S.npu_sparse_flash_attention(q, kv, kv, seen, 1.0, **{**how, "sparse_mode": 3})[0][0, 0, 0, 1], 8.0)
    if FAMILY == "950":
        out = S.npu_sparse_flash_attention(q, kv, kv, seen, 1.0, **how, sinks=torch.zeros(1))[0]
        close(out[0, 0, 0, 1], 4.0, atol=0.03)


# --- indexers


@by_hand("npu.npu_lightning_indexer")
def test_scores_are_weighted_sums_of_positive_products() -> None:
    q = torch.zeros(1, 8, 128, dtype=BF16)
    q[0, 0, 0], q[0, 1, 1] = 1.0, 1.0
    w = torch.zeros(1, 8, dtype=BF16)
    w[0, 0], w[0, 1] = 1.0, -2.0
    k = rows(16, 128, c0={0: 5.0, 1: 4.0, 2: -9.0, 3: 3.0}, c1={0: 3.0, 1: -7.0}).view(1, 16, 1, 128)
    lengths = {"actual_seq_lengths_query": i32(1), "actual_seq_lengths_key": i32(4), "block_table": i32([0])}
    found = S.npu_lightning_indexer(
        q, k, w, **lengths, layout_query="TND", layout_key="PA_BSND", sparse_count=6, sparse_mode=0
    )[0]
    # scores 5 - 6, 4 - 0, 0, 3; then nothing
    assert found.flatten().tolist() == [1, 3, 2, 0, -1, -1]


def int8_index(pack: str, tokens: int, queries: int) -> Tensor:
    """Keys 0..7 with products 8, 7, .. halved by their scale; the number of `tokens` lies behind them."""
    q = torch.zeros(queries, 64, 128, dtype=torch.int8)
    q[:, 0, 0] = 2
    k = torch.zeros(1, 16, 1, 128, dtype=torch.int8)
    k[0, :8, 0, 0] = torch.arange(8, 0, -1)
    w, qs = torch.zeros(queries, 64, dtype=F16), torch.ones(queries, 64, dtype=F16)
    w[:, 0] = 1.0
    ks = torch.full((1, 16, 1), 0.5, dtype=F16)
    # key 2 is scaled up from 6 to 60
    ks[0, 2] = 5.0
    if pack == "T":
        shape = {"layout_q": "TND", "layout_k": "PA_BBND", "mask_mode": 3, "cmp_ratio": 4}
        lengths = {
            "cu_seqlens_q": i32(0, queries),
            "seqused_k": i32(tokens // 4),
            "cmp_residual_k": i32(tokens % 4),
        }
        work = T.quant_lightning_indexer_metadata(64, 1, 128, 4, 2, **lengths, **shape)
        return T.quant_lightning_indexer(
            q, k, w, qs, ks, 4, 2, block_table=i32([0]), metadata=work, **lengths, **shape
        )[0]
    shape = {
        "layout_query": "TND",
        "layout_key": "PA_BSND",
        "sparse_count": 4,
        "sparse_mode": 3,
        "cmp_ratio": 4,
    }
    lengths = {"actual_seq_lengths_query": i32(queries), "actual_seq_lengths_key": i32(tokens)}
    work = C.npu_vllm_quant_lightning_indexer_metadata(64, 1, 128, 0, 0, **lengths, **shape)
    return C.npu_vllm_quant_lightning_indexer(
        q, k, w, qs, ks, block_table=i32([0]), metadata=work, **lengths, **shape
    )[0]


@by_hand(
    "_C_ascend.npu_vllm_quant_lightning_indexer",
    "_C_ascend.npu_vllm_quant_lightning_indexer_metadata",
    on=A2_A3,
)
def test_int8_scores_of_the_other_pack() -> None:
    check_int8_index("C")


@by_hand(
    "cann_ops_transformer.quant_lightning_indexer", "cann_ops_transformer.quant_lightning_indexer_metadata"
)
def test_int8_scores_are_scaled_back_and_masked_by_tokens() -> None:
    check_int8_index("T")


def check_int8_index(pack: str) -> None:
    # 14 tokens: queries at 10, 11, 12, 13 see 2, 3, 3, 3 keys
    found = int8_index(pack, 14, 4)[:, 0]
    assert found.tolist() == [[0, 1, -1, -1], *[[2, 0, 1, -1]] * 3]


# --- compressors


def pooled(pack: str, x: Tensor, state: Tensor, start: int, ape: Tensor, table: Tensor) -> Tensor:
    """D 128, ratio 4 with overlap; K of a token is its first 256 channels, z its position's bias alone."""
    wkv = torch.eye(256, x.shape[1], dtype=BF16)
    gate = torch.zeros(256, x.shape[1], dtype=BF16)
    count, bounds = min(len(x), len(x) // 4 + 1), i32(0, len(x))
    if pack == "T":
        return T._compressor_forward(x, wkv, gate, state, ape, table, bounds, None, i32(start), 4, 2, 1)[0]
    cos, sin = torch.ones(count, 64), torch.zeros(count, 64)
    norm = torch.ones(128, dtype=BF16)
    return C.compressor(
        x, wkv, gate, state, ape, norm, sin, cos, table, bounds, None, i32(start), 64, 4, 2, 0.0, 2, 1
    )


def tokens(count: int, start: int = 0) -> Tensor:
    """Channels 0..127 hold the position, 128..255 100 more."""
    x = torch.zeros(count, 1024, dtype=BF16)
    x[:, :128] = torch.arange(start, start + count, dtype=F32)[:, None]
    x[:, 128:256] = torch.arange(start, start + count, dtype=F32)[:, None] + 100
    return x


@by_hand("cann_ops_transformer._compressor_forward", on=("910C", "950"))
def test_entries_join_the_first_half_of_the_block_before() -> None:
    ape, table = torch.zeros(4, 256), i32([1, 2, 3])
    whole = torch.zeros(4, 4, 512)
    out = pooled("T", tokens(8), whole, 0, ape, table)
    # block 0 has no predecessor: 100 + (0 + 1 + 2 + 3) / 4; block 1: (0 + 1 + 2 + 3 + 104 + 105 + 106 + 107) / 8
    close(out[0], 101.5)
    close(out[1], 53.5)
    assert out[2:].isnan().all()
    parts = torch.zeros(4, 4, 512)
    pooled("T", tokens(6), parts, 0, ape, table)
    close(pooled("T", tokens(2, 6), parts, 6, ape, table)[0], 53.5)
    # K of position 6 lies in row 2 of page 2, then its z
    close(whole[2, 2, :128], 6.0)
    close(whole[2, 2, 128:256], 106.0)
    assert torch.equal(whole, parts)


@pytest.mark.families("910C", "950")
def test_the_bias_of_a_position_decides() -> None:
    ape = torch.zeros(4, 256)
    ape[1, 128:] = 60.0
    # of the second halves, position 1 mod 4 has it all
    out = pooled("T", tokens(8), torch.zeros(4, 4, 512), 0, ape, i32([1, 2, 3]))
    close(out[:2, 0], [101.0, 105.0])
    ape[1, 128:], ape[2, :128] = 0.0, 60.0
    # of the first halves, position 2 mod 4: block 1 takes it from the block before
    out = pooled("T", tokens(8), torch.zeros(4, 4, 512), 0, ape, i32([1, 2, 3]))
    close(out[:2, 0], [101.5, 2.0])


@by_hand("_C_ascend.compressor", on=A2_A3)
def test_entries_are_normalised_and_rotated() -> None:
    # all channels of an entry are alike, so the norm makes them one
    out = pooled("C", tokens(8), torch.zeros(4, 4, 512), 0, torch.zeros(4, 256), i32([1, 2, 3]))
    close(out[:2], 1.0)
    x = tokens(4)
    norm, state = torch.full((128,), 3.0, dtype=BF16), torch.zeros(4, 4, 512)
    eye, gate = torch.eye(256, 1024, dtype=BF16), torch.zeros(256, 1024, dtype=BF16)
    cos, sin = torch.zeros(2, 64), torch.ones(2, 64)
    args = (norm, sin, cos, i32([1]), i32(0, 4), None, i32(0), 64, 4, 2, 0.0, 2, 1)
    out = C.compressor(x, eye, gate, state, torch.zeros(4, 256), *args)
    # a quarter turn of pairs: (3, 3) becomes (-3, 3)
    close(out[0, :64], 3.0)
    close(out[0, 64:], torch.tensor([-3.0, 3.0]).repeat(32))
