"""Each stand-in for a vendor's kernel against numbers worked out by hand from the vendor's document; see conftest.py."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    # the vendor's files warn while they are compiled, and warnings are errors in tests
    warnings.simplefilter("ignore")
    importlib.import_module("v4sdk_ascend.probe").load()
emulators = importlib.import_module("v4sdk_ascend.testing.emulators")
contract = importlib.import_module("v4sdk_ascend.contract").contract
KEYS = emulators.install()
FAMILY = emulators.family()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
T, C = torch.ops.cann_ops_transformer, torch.ops._C_ascend
S = torch.ops.npu

# ops with a vector below, by the families whose documents list them
BY_HAND: dict[str, frozenset[str]] = {}
ALL, A2_A3, A5 = ("910B", "910C", "950"), ("910B", "910C"), ("950",)


def by_hand(*keys: str, on: tuple[str, ...] = ALL) -> Callable[[Any], Any]:
    BY_HAND.update({key: frozenset(on) for key in keys})
    return pytest.mark.skipif(FAMILY not in on, reason=f"documented for {', '.join(on)}, this is {FAMILY}")


def i32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(got: Tensor, want: Any, atol: float = 1e-6) -> None:
    want = torch.as_tensor(want, dtype=F32)
    torch.testing.assert_close(got.float(), want.expand(got.shape), atol=atol, rtol=1e-5)


def rows(count: int, width: int, dtype: torch.dtype = BF16, **channels: dict[int, float]) -> Tensor:
    """Zeros but for c0, c1, ..: what rows hold in a channel, by row."""
    x = torch.zeros(count, width)
    for name, values in channels.items():
        for row, value in values.items():
            x[row, int(name[1:])] = value
    return x.to(dtype)


# --- norm and rotation


@by_hand("npu.npu_rms_norm")
def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    y, root = S.npu_rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    close(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]])
    close(root, [[1 / math.sqrt(12.5)]])


@by_hand("npu.npu_rotary_mul")
def test_rotary_mul_turns_pairs_or_halves() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    zero, one = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    close(S.npu_rotary_mul(x, zero, one, rotary_mode="interleave").flatten(), [-2, 1, -4, 3])
    close(S.npu_rotary_mul(x, zero, one, rotary_mode="half").flatten(), [-3, -4, 1, 2])
    close(S.npu_rotary_mul(x, one, zero, rotary_mode="interleave").flatten(), [1, 2, 3, 4])


@by_hand("cann_ops_transformer.inplace_partial_rotary_mul", "_C_ascend.inplace_partial_rotary_mul")
@pytest.mark.parametrize("pack", ["T", "C"])
def test_partial_rotation_leaves_the_rest_alone(pack: str) -> None:
    x = torch.tensor([9.0, 8.0, 1.0, 2.0]).view(1, 1, 1, 4)
    cos, sin = torch.full((1, 1, 1, 2), 0.6), torch.full((1, 1, 1, 2), 0.8)
    if pack == "T":
        T.inplace_partial_rotary_mul(x, cos, sin, rotary_mode="interleave", partial_slice=[2, 4])
    else:
        C.inplace_partial_rotary_mul(x, cos, sin, "interleave", [2, 4])
    close(x.flatten(), [9, 8, 0.6 - 1.6, 1.2 + 0.8])


# --- hyper-connections


def mixes(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Streams of twos; the first mix is 2 / rms = 1, scaled by 0.5; every stream goes to the next one."""
    x = torch.full((1, 4, width), 2.0, dtype=BF16)
    x[0, 1] = -2.0
    phi = torch.zeros(24, 4 * width)
    phi[0, 0] = 1.0
    bias = torch.zeros(24)
    for j in range(4):
        bias[8 + 4 * j + (j + 1) % 4] = 60.0
    return x, phi, torch.tensor([0.5, 1.0, 1.0]), bias


def check_mixes(u: Tensor, post: Tensor, comb: Tensor, width: int) -> None:
    gate = 1 / (1 + math.exp(-0.5)) + 1e-6
    # 2 * (gate - 0.5 + 0.5 + 0.5) plus three eps; BF16
    close(u.view(-1), (2 * gate - 2 * (0.5 + 1e-6) + 2 * 2 * (0.5 + 1e-6)), atol=8e-3)
    close(post.view(-1), 1.0)
    close(comb.view(4, 4), torch.eye(4).roll(1, 1), atol=1e-4)
    assert u.dtype == BF16
    assert u.shape[-1] == width


@by_hand("npu.npu_mhc_pre", "npu.npu_mhc_sinkhorn", on=A5)
def test_stock_mixes() -> None:
    x, phi, alpha, bias = mixes(8)
    u, post, res, *rest = S.npu_mhc_pre(x, phi, alpha, bias)
    close(res, bias[8:].view(1, 4, 4))
    assert all(t.isnan().all() for t in rest)
    check_mixes(u, post, S.npu_mhc_sinkhorn(res)[0], 8)


@by_hand("cann_ops_transformer.mhc_pre_sinkhorn", on=A2_A3)
def test_transformer_mixes() -> None:
    x, phi, alpha, bias = mixes(128)
    u, post, comb, *_ = T.mhc_pre_sinkhorn(x[None], phi, alpha, bias, 4, 20, 1e-6, 1e-6, False)
    assert comb.shape == (1, 1, 16)
    check_mixes(u, post, comb, 128)


@by_hand("_C_ascend.npu_hc_pre_v2")
def test_vendorpack_mixes() -> None:
    x, phi, alpha, bias = mixes(4096)
    check_mixes(*C.npu_hc_pre_v2(x, phi, alpha, bias, 4, 20, 1e-6, 1e-6), 4096)


@pytest.mark.skipif(FAMILY != "950", reason="documented for 950")
def test_sinkhorn_softmaxes_rows_and_ends_with_columns() -> None:
    x = torch.zeros(1, 4, 4)
    x[0, 3, 3] = math.log(5)
    y = S.npu_mhc_sinkhorn(x, eps=0.0, num_iters=1)[0]
    # rows 0..2 are quarters, row 3 is 1/8, 1/8, 1/8, 5/8; then every column is divided by its sum
    close(y[0, :, 0], [0.25 / 0.875] * 3 + [0.125 / 0.875])
    close(y[0, :, 3], [0.25 / 1.375] * 3 + [0.625 / 1.375])


@by_hand("npu.npu_mhc_post", on=A5)
def test_stock_write_back() -> None:
    check_write_back(lambda y, x, post, comb: S.npu_mhc_post(x, comb, y, post), 8)


@by_hand("cann_ops_transformer.mhc_post", on=A2_A3)
def test_transformer_write_back() -> None:
    check_write_back(lambda y, x, post, comb: T.mhc_post(x, comb, y, post), 8)


@by_hand("_C_ascend.npu_hc_post")
def test_vendorpack_write_back() -> None:
    check_write_back(lambda y, x, post, comb: C.npu_hc_post(y, x, post, comb), 4096)


def check_write_back(call: Callable[..., Tensor], width: int) -> None:
    x = torch.arange(1.0, 5.0).view(1, 4, 1).expand(1, 4, width).contiguous().to(BF16)
    comb = torch.eye(4).roll(1, 1)[None].contiguous()
    y = torch.full((1, width), 10.0, dtype=BF16)
    out = call(y, x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), comb)
    # stream j goes to j + 1, so stream 0 receives that of 3
    close(out[0, :, 0], [10 + 4, 20 + 1, 30 + 2, 40 + 3])


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
    kv = rows(131, 512, c1={1: 128.0}, c2={2: 128.0}, c3={3: 128.0}, c4={129: 128.0}, c5={130: 128.0})[:, None]
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
    out = mla(q, ori_kv=kv, cmp_kv=far, cmp_sparse_indices=picks, cmp_residual_kv=i32(1), cmp_ratio=4, **lengths)
    # window rows seen: 4, 5, 6 of zeros
    close(out[:, 0, 7], [0, 60 / 6, 60 / 7], atol=0.05)


def test_pages_are_found_through_the_table_and_absent_picks_are_nothing() -> None:
    q = torch.zeros(1, 2, 512, dtype=BF16)
    pages = torch.zeros(3, 16, 1, 512, dtype=BF16)
    pages[2, 0, 0, 1] = 17.0
    pages[0, 0, 0, 2] = 17.0
    table = i32([1, 2])
    out = mla(q, ori_kv=pages, ori_block_table=table, seqused_ori_kv=i32(17), cu_seqlens_q=i32(0, 1), layout_kv="PA_BBND")
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
        lengths = {"cu_seqlens_q": i32(0, queries), "seqused_k": i32(tokens // 4), "cmp_residual_k": i32(tokens % 4)}
        work = T.quant_lightning_indexer_metadata(64, 1, 128, 4, 2, **lengths, **shape)
        return T.quant_lightning_indexer(
            q, k, w, qs, ks, 4, 2, block_table=i32([0]), metadata=work, **lengths, **shape
        )[0]
    shape = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 4, "sparse_mode": 3, "cmp_ratio": 4}
    lengths = {"actual_seq_lengths_query": i32(queries), "actual_seq_lengths_key": i32(tokens)}
    work = C.npu_vllm_quant_lightning_indexer_metadata(64, 1, 128, 0, 0, **lengths, **shape)
    return C.npu_vllm_quant_lightning_indexer(q, k, w, qs, ks, block_table=i32([0]), metadata=work, **lengths, **shape)[0]


@by_hand(
    "_C_ascend.npu_vllm_quant_lightning_indexer", "_C_ascend.npu_vllm_quant_lightning_indexer_metadata", on=A2_A3
)
def test_int8_scores_of_the_other_pack() -> None:
    check_int8_index("C")


@by_hand("cann_ops_transformer.quant_lightning_indexer", "cann_ops_transformer.quant_lightning_indexer_metadata")
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
    return C.compressor(x, wkv, gate, state, ape, norm, sin, cos, table, bounds, None, i32(start), 64, 4, 2, 0.0, 2, 1)


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


@pytest.mark.skipif(FAMILY == "910B", reason="documented for 910C and 950")
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


# --- routing and experts


@by_hand("_C_ascend.moe_gating_top_k_hash", on=A2_A3)
def test_gate_takes_the_root_of_softplus_and_the_bias_only_chooses() -> None:
    # softplus(ln(e**s - 1)) = s: scores 2, 1, 3
    x = torch.tensor([[math.log(math.exp(s) - 1) for s in (4.0, 1.0, 9.0)]])
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, norm_type=2, routed_scaling_factor=1.5)
    assert ids.tolist() == [[2, 0]]
    close(y, [[0.9, 0.6]], atol=1e-5)
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, bias=torch.tensor([0.0, 9.0, 0.0]), norm_type=2)
    assert ids.tolist() == [[1, 2]]
    close(y, [[0.25, 0.75]], atol=1e-5)
    table = i32([0, 0], [1, 0])
    y, ids, _ = C.moe_gating_top_k_hash(x, 2, input_ids=torch.tensor([1]), tid2eid=table, norm_type=2)
    assert ids.tolist() == [[1, 0]]
    close(y, [[1 / 3, 2 / 3]], atol=1e-5)


@by_hand("npu.npu_moe_init_routing_v2")
def test_rows_are_sorted_by_expert() -> None:
    x = torch.tensor([[1.0, -2.0], [4.0, 0.5]], dtype=BF16)
    how = {"active_num": 4, "expert_num": 3, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    how |= {"active_expert_range": [0, 3]}
    rows_, places, counts, _ = S.npu_moe_init_routing_v2(x, i32([1, 0], [0, 2]), **how, quant_mode=-1, row_idx_type=0)
    close(rows_, [[1, -2], [4, 0.5], [1, -2], [4, 0.5]])
    assert places.tolist() == [2, 0, 1, 3]
    assert counts.tolist() == [2, 1, 1]
    codes, places, _, scale = S.npu_moe_init_routing_v2(x, i32([1, 0], [0, 2]), **how, quant_mode=1, row_idx_type=1)
    # 1 / (2 / 127) = 63.5 to the even 64; 0.5 / (4 / 127) = 15.875
    assert codes.tolist() == [[64, -127], [127, 16], [64, -127], [127, 16]]
    assert places.tolist() == [1, 2, 0, 3]
    close(scale, [2 / 127, 4 / 127, 2 / 127, 4 / 127])


@by_hand("npu.npu_grouped_matmul")
def test_each_group_has_its_own_matrix() -> None:
    how = {"split_item": 3, "group_type": 0, "group_list_type": 1}
    x = torch.tensor([[1, 2], [3, 4], [5, 6]])
    w = torch.tensor([[[1, 0], [0, 1]], [[2, 0], [0, -1]]])
    counts = torch.tensor([1, 2])
    y = S.npu_grouped_matmul([x.to(BF16)], [w.to(BF16)], group_list=counts, **how)[0]
    close(y, [[1, 2], [6, -4], [10, -6]])
    ints = ([x.to(torch.int8)], [w.to(torch.int8)])
    sums = S.npu_grouped_matmul(*ints, group_list=counts, **how, output_dtype=torch.int32)[0]
    assert sums.tolist() == [[1, 2], [6, -4], [10, -6]]
    scales = {"scale": [torch.tensor([[1, 2], [0.5, 4]], dtype=BF16)], "per_token_scale": [torch.tensor([1.0, 10.0, 100.0])]}
    y = S.npu_grouped_matmul(*ints, group_list=counts, **how, **scales, output_dtype=BF16)[0]
    close(y, [[1, 4], [30, -160], [500, -2400]])
    # the same by running sums
    y = S.npu_grouped_matmul([x.to(BF16)], [w.to(BF16)], group_list=counts.cumsum(0), **{**how, "group_list_type": 0})[0]
    close(y, [[1, 2], [6, -4], [10, -6]])


@pytest.mark.skipif(FAMILY != "950", reason="documented for 950")
def test_fp8_rows_times_fp4_matrices() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 63] = 2.0, 1.0
    w = torch.zeros(1, 2, 32, dtype=torch.uint8)
    # FP4 codes: 3 is 1.5 in channel 0 of output 0; 15 is -6 in channel 63, the high nibble, of output 1
    w[0, 0, 0], w[0, 1, 31] = 0x03, 0xF0
    blocks = torch.full((1, 2, 1, 2), 127, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 130
    token = torch.tensor([[[128, 127]]], dtype=torch.uint8)
    y = S.npu_grouped_matmul(
        [x.to(torch.float8_e4m3fn)], [w.transpose(1, 2)], group_list=torch.tensor([1]), split_item=3, group_type=0,
        group_list_type=1, output_dtype=BF16, antiquant_scale=[blocks], per_token_scale=[token], weight_dtype=296,
        per_token_scale_dtype=293,
    )[0]  # fmt: skip
    # 2 * 2 (row scale) * 1.5 * 8 (column scale); 1 * -6
    close(y, [[48.0, -6.0]])


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@by_hand("npu.npu_clipped_swiglu")
def test_gates_are_clamped_above_and_values_on_both_sides() -> None:
    x = torch.tensor([[12.0, -12.0, 3.0, -20.0]])
    how = {"alpha": 1.0, "limit": 10.0, "bias": 0.0}
    close(S.npu_clipped_swiglu(x, **how, interleaved=False), [[silu(10) * 3, silu(-12) * -10]])
    close(S.npu_clipped_swiglu(x, **how, interleaved=True), [[silu(10) * -10, silu(3) * -10]])
    # the defaults are another model's: alpha 1.702, limit 7, bias 1
    close(S.npu_clipped_swiglu(x, interleaved=False)[:, :1], [[7 / (1 + math.exp(-1.702 * 7)) * 4]])


@by_hand("npu.npu_dequant_swiglu_quant", on=A2_A3)
def test_sums_are_scaled_gated_and_rounded_again() -> None:
    x = torch.tensor([[4, -2, 1, 8]], dtype=torch.int32)
    scales = {"weight_scale": torch.tensor([[0.5, 1.0, 2.0, 1.0]]), "activation_scale": torch.tensor([[0.5]])}
    how = {"activate_left": True, "quant_mode": 1, "clamp_limit": 3.0, "glu_alpha": 1.0, "glu_bias": 0.0}
    y, scale = S.npu_dequant_swiglu_quant(x, **scales, **how, swiglu_mode=2)
    # gates 4 * 0.5 * 0.5 = 1 and -1, values 1 and 4, clamped to 3
    want = (silu(1) * 1, silu(-1) * 3)
    close(scale, [abs(want[1]) / 127])
    assert y.tolist() == [[round(want[0] / (abs(want[1]) / 127)), -127]]
    # even channels as gates: 1 and 1, values -1 and 3
    y, scale = S.npu_dequant_swiglu_quant(x, **scales, **how, swiglu_mode=1)
    close(scale, [silu(1) * 3 / 127])
    assert y.tolist() == [[-42, 127]]


@by_hand("npu.npu_moe_finalize_routing")
def test_rows_come_back_to_their_tokens() -> None:
    found = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    places = i32(2, 0, 1, 3)
    by_token = S.npu_moe_finalize_routing(found, None, None, None, scales, places, None, drop_pad_mode=2)
    close(by_token, [[100 + 2 * 1], [3 * 10 + 4 * 1000]])
    by_choice = S.npu_moe_finalize_routing(found, None, None, None, scales, places, None, drop_pad_mode=0)
    close(by_choice, [[100 + 2 * 10], [3 * 1 + 4 * 1000]])


# --- quantisation


@by_hand("npu.npu_dynamic_quant", "npu.npu_quant_matmul")
def test_int8_rows_and_products() -> None:
    y, scale = S.npu_dynamic_quant(torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=BF16))
    assert y.tolist() == [[64, -127], [0, 0]]
    close(scale, [2 / 127, 0.0])
    x2 = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    how = {"pertoken_scale": torch.tensor([2.0, 1.0]), "output_dtype": BF16}
    out = S.npu_quant_matmul(torch.tensor([[1, 1], [2, -1]], dtype=torch.int8), x2, torch.tensor([0.5, 0.25]), **how)
    close(out, [[4 * 2 * 0.5, 6 * 2 * 0.25], [-0.5, 0.0]])


@by_hand("npu.npu_dynamic_mx_quant", on=A5)
def test_blocks_of_32_share_a_power_of_two() -> None:
    x = torch.zeros(1, 64, dtype=BF16)
    x[0, :2], x[0, 32:34] = torch.tensor([6.0, -0.5], dtype=BF16), torch.tensor([96.0, 24.0], dtype=BF16)
    codes, scales = S.npu_dynamic_mx_quant(x)
    # FP4: 2**(2 - 2) and 2**(6 - 2); 6 is code 7, -0.5 code 9; 96 / 16 is 6, 24 / 16 is 1.5, code 3
    assert scales.tolist() == [[[127, 131]]]
    assert codes[0, 0] == 0x97
    assert codes[0, 16] == 0x37
    codes, scales = S.npu_dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn)
    # FP8: 2**(2 - 8) and 2**(6 - 8)
    assert scales.tolist() == [[[121, 125]]]
    close(codes[0, [0, 1, 32, 33]], [6 * 64, -32, 96 * 4, 24 * 4])


@pytest.mark.skipif(FAMILY != "950", reason="documented for 950")
def test_mx_products_apply_a_scale_per_32_columns() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32] = 1.0, 1.0
    w = torch.ones(3, 64)
    blocks = torch.full((3, 1, 2), 127, dtype=torch.uint8)
    blocks[2, 0] = torch.tensor([128, 126])
    out = S.npu_quant_matmul(
        x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).T, blocks.transpose(0, 1), output_dtype=BF16,
        pertoken_scale=torch.tensor([[[127, 129]]], dtype=torch.uint8), scale_dtype=293, pertoken_scale_dtype=293,
        group_sizes=[1, 1, 32],
    )  # fmt: skip
    # 1 + 4; with column scales 2 and a half: 2 + 2
    close(out, [[5, 5, 4]])


# --- exchange


@by_hand("npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2", on=A2_A3)
def test_a_group_of_one_sends_to_itself() -> None:
    x = torch.zeros(2, 1024, dtype=BF16)
    x[0, 0], x[1, 0] = 1.0, 2.0
    ids = i32([2, 0], [0, 1])
    group = ("ep", 1, 0, 4)
    found = S.npu_moe_distribute_dispatch_v2(x, ids, *group, shared_expert_num=0)
    # expert 0 has both tokens, 1 the second, 2 the first
    close(found[0][:4, 0], [1, 2, 2, 1])
    assert found[3].tolist() == [2, 1, 1, 0]
    # expert e multiplies by e + 1
    done = found[0].clone()
    done[:4] *= torch.tensor([[1.0], [1.0], [2.0], [3.0]])
    weights = torch.tensor([[10.0, 1.0], [1.0, 100.0]])
    out = S.npu_moe_distribute_combine_v2(done, ids, found[2], found[4], weights, *group, shared_expert_num=0)
    close(out[:, 0], [10 * 3 + 1, 2 + 100 * 4])


# --- the list itself


def test_every_row_of_the_contract_has_an_emulator_and_the_other_way_round() -> None:
    assert set(KEYS) == set(contract())


def test_every_emulator_has_a_vector_worked_out_by_hand() -> None:
    # mega_moe needs two processes, which another test starts
    assert set(BY_HAND) | {"cann_ops_transformer.npu_mega_moe"} == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_an_emulator_takes_what_its_schema_has(key: str) -> None:
    library, name = key.split(".")
    schema = getattr(getattr(torch.ops, library), name).default._schema
    taken = inspect.signature(inspect.unwrap(emulators.EMULATORS[library, name])).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        assert [a.name for a in schema.arguments] == list(taken)
