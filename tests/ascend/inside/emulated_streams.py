"""Norm, rotation, the mixes of hyper-connections, quantisation: emulated kernels against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from ascend.inside.loaded import A2_A3, A5, BF16, C, S, T, by_hand, close
from torch import Tensor

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


@pytest.mark.families("950")
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


# --- quantisation


@by_hand("npu.npu_dynamic_quant", "npu.npu_quant_matmul")
def test_int8_rows_and_products() -> None:
    y, scale = S.npu_dynamic_quant(torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=BF16))
    assert y.tolist() == [[64, -127], [0, 0]]
    close(scale, [2 / 127, 0.0])
    x2 = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    how = {"pertoken_scale": torch.tensor([2.0, 1.0]), "output_dtype": BF16}
    out = S.npu_quant_matmul(
        torch.tensor([[1, 1], [2, -1]], dtype=torch.int8), x2, torch.tensor([0.5, 0.25]), **how
    )
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


@pytest.mark.families("950")
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
