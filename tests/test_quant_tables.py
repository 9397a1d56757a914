"""Number formats, exhaustively, against an implementation that shares nothing with ours but the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from v4sdk.config import RopeSpec
from v4sdk.errors import ShapeError
from v4sdk.numerics import kv_row_bytes
from v4sdk.ops.rope import inv_freq, rope, rope_table
from v4sdk.presets import V4_FLASH
from v4sdk.quant import (
    e2m1_decode,
    e2m1_encode,
    e4m3_round,
    fp4_pack,
    fp4_unpack,
    hadamard,
    index_pack,
    index_unpack,
    kv_pack,
    kv_unpack,
    q4_decode,
    q4_encode,
    q4_round,
    q8_decode,
    q8_encode,
    q8_round,
    ue8m0_ceil,
    ue8m0_value,
)
from v4sdk.weights import Weight

F32 = NDArray[np.float32]


def e4m3_value(code: int) -> float:
    """One sign, four exponent bits of bias 7, three of mantissa; no infinity, all ones is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3_value(c) for c in range(127)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: F32, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to the nearest value of an ascending grid from 0, ties to the even place in it, keeping the sign."""
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    tie = np.where((above - 1) % 2 == 0, low, high)
    half = (low + high) / 2
    chosen = np.where(size < half, low, np.where(size > half, high, tie))
    return np.copysign(chosen, x)


def power_of_two_at_least(a: np.float32) -> float:
    """By comparison with every power, so no logarithm can err."""
    return min(2.0**k for k in range(-127, 128) if 2.0**k >= float(a))


def straight(x: F32, block: int, least: float, largest: float, grid: NDArray[np.float64]) -> F32:
    """Q8 or Q4 of one row, group by group."""
    out = np.empty_like(x)
    for at in range(0, len(x), block):
        group = x[at : at + block]
        a = np.float32(max(np.float32(np.abs(group).max()), np.float32(least)))
        s = power_of_two_at_least(np.float32(a * np.float32(1 / largest)))
        scaled = (group.astype(np.float64) / s).astype(np.float32)
        out[at : at + block] = nearest(np.clip(scaled, -largest, largest), grid) * s
    return out


def straight_q8(x: F32, block: int) -> F32:
    return straight(x, block, 1e-4, 448.0, E4M3)


def straight_q4(x: F32) -> F32:
    return straight(x, 32, 6 * 2.0**-126, 6.0, E2M1)


def around(values: NDArray[np.float64]) -> F32:
    """Each value, and its float32 neighbours on both sides."""
    v = values.astype(np.float32)
    return np.concatenate((v, np.nextafter(v, np.float32(np.inf)), np.nextafter(v, np.float32(-np.inf))))


def test_all_256_codes_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    found = Weight(codes[None], torch.full((1, 2), 127, dtype=torch.uint8), "fp8", (128, 128)).dequantize()[0]
    want = torch.tensor([e4m3_value(c) for c in range(256)])
    assert torch.equal(found.isnan(), want.isnan())
    assert int(want.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(9.0), want.nan_to_num(9.0))


def test_fp8_rounds_every_value_and_every_tie_to_the_nearest_even_code() -> None:
    points = around(np.concatenate((E4M3, (E4M3[1:] + E4M3[:-1]) / 2)))
    points = np.concatenate((points, -points))
    # the largest element of each group is 448, so its scale is one
    rows = np.stack([points, np.full_like(points, 448)], 1).reshape(1, -1)
    found = q8_round(torch.from_numpy(rows), 2).numpy()[0, ::2]
    want = nearest(np.clip(points, -448, 448), E4M3)
    assert np.array_equal(found, want)


def test_fp8_rounding_by_arithmetic_is_that_of_the_dtype() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[~values.isnan()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(towards)) for towards in (-1e9, 1e9)]
    x = torch.cat([values, ties, *beside, torch.tensor([0.0, -0.0, 1e-40, -1e-40])]).clamp(-448, 448)
    expected = x.to(torch.float8_e4m3fn).float()
    # bits, so that the sign of zero counts
    assert torch.equal(e4m3_round(x).view(torch.int32), expected.view(torch.int32))


def test_all_codes_and_ties_of_fp4() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1_decode(codes)
    assert values.tolist() == [*E2M1.tolist(), *(-E2M1).tolist()]
    assert math.copysign(1, values[8].item()) == -1
    assert torch.equal(e2m1_encode(values), codes)
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    for tie, want in ties.items():
        assert e2m1_decode(e2m1_encode(torch.tensor([tie, -tie]))).tolist() == [want, -want]
    points = np.clip(around(np.concatenate((E2M1, (E2M1[1:] + E2M1[:-1]) / 2))), -6, 6)
    assert np.array_equal(e2m1_decode(e2m1_encode(torch.from_numpy(points))).numpy(), nearest(points, E2M1))


def test_all_256_scales() -> None:
    found = ue8m0_value(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert [float(v) for v in found[:255]] == [2.0 ** (b - 127) for b in range(255)]
    assert math.isnan(float(found[255]))
    # and as the dtype of the file format reads them
    other = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(found[:255], other[:255])


def test_scale_of_every_power_and_its_neighbours() -> None:
    for k in range(-125, 127):
        exact = np.float32(2.0**k)
        for x in (np.nextafter(exact, np.float32(0)), exact, np.nextafter(exact, np.float32(np.inf))):
            assert float(ue8m0_value(ue8m0_ceil(torch.tensor([x])))[0]) == power_of_two_at_least(x)


def test_all_bytes_of_packed_fp4_low_nibble_first() -> None:
    byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = fp4_unpack(byte.view(torch.int8)[:, None])
    for b in range(256):
        for column, nibble in enumerate((b & 15, b >> 4)):
            want = math.copysign(E2M1[nibble & 7], -1 if nibble & 8 else 1)
            assert float(values[b, column]) == want
            assert math.copysign(1, float(values[b, column])) == math.copysign(1, want)
    assert torch.equal(fp4_pack(e2m1_encode(values))[:, 0].view(torch.uint8), byte)


def interesting_rows(count: int, width: int, largest: float, seed: int) -> F32:
    """Rows of many magnitudes, zeros, tiny values, and groups whose maximum sits on a scale's edge."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, width)).astype(np.float32)
    rows *= (2.0 ** random.integers(-30, 30, (count, 1))).astype(np.float32)
    rows[0] = 0
    rows[1] = 1e-30
    rows[2] *= np.float32(1e-38)
    edge = np.float32(largest * 4)
    for i, top in enumerate(
        (edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(np.inf)))
    ):
        rows[3 + i] = np.clip(rows[3 + i] / np.abs(rows[3 + i]).max(), -1, 1) * np.float32(largest)
        rows[3 + i, 0] = top
    rows[6] = np.float32(largest)
    return rows


@pytest.mark.parametrize(
    ("width", "block"), [(448, 64), (128, 128), (256, 128), (150, 64), (24, 128), (100, 128)]
)
def test_q8_equals_the_straightforward_one(width: int, block: int) -> None:
    rows = interesting_rows(200, width, 448.0, seed=width + block)
    want = np.stack([straight_q8(r, block) for r in rows])
    x = torch.from_numpy(rows)
    assert np.array_equal(q8_round(x, block).numpy(), want)
    code, scale = q8_encode(x, block)
    assert scale.shape == (200, -(-width // block))
    assert np.array_equal(q8_decode(code, scale, block).numpy(), want)


def test_q8_of_448_times_a_power_of_two_keeps_its_scale() -> None:
    # the product with the rounded constant 1/448 comes back to exactly 2**k, so no scale is one too large
    for k in range(-20, 100):
        x = torch.full((1, 64), 448.0) * 2.0**k
        assert int(q8_encode(x, 64)[1]) == 127 + k
        assert torch.equal(q8_round(x, 64), x)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_q4_equals_the_straightforward_one(width: int) -> None:
    rows = interesting_rows(200, width, 6.0, seed=width)
    want = np.stack([straight_q4(r) for r in rows])
    x = torch.from_numpy(rows)
    assert np.array_equal(q4_round(x).numpy(), want)
    assert np.array_equal(q4_decode(*q4_encode(x)).numpy(), want)


def test_q4_needs_whole_groups() -> None:
    with pytest.raises(ShapeError, match="multiple of 32"):
        q4_encode(torch.ones(1, 48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_twice_changes_nothing_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rounded in (q8_round(x, 64), q4_round(x)):
        assert rounded.dtype == dtype
        assert not torch.equal(rounded, x)
    assert torch.equal(q8_round(q8_round(x, 64), 64), q8_round(x, 64))
    assert torch.equal(q4_round(q4_round(x)), q4_round(x))


@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_gradient_passes_a_rounding_unchanged(kind: str) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    rounded = q8_round(x, 64) if kind == "q8" else q4_round(x)
    weight = torch.randn(3, 64)
    (rounded * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize(
    ("head_dim", "rope_dim", "size"), [(512, 64, 584), (128, 64, 200), (64, 32, 104), (64, 16, 88)]
)
def test_packed_rows_hold_every_code_at_every_scale_exactly(head_dim: int, rope_dim: int, size: int) -> None:
    random = np.random.default_rng(0)
    plain = head_dim - rope_dim
    codes = random.choice(E4M3, (300, plain)) * random.choice([-1, 1], (300, plain))
    codes[:, ::64] = 448  # every group reaches its largest code, so its scale is known
    scales = (2.0 ** random.integers(-20, 20, (300, -(-plain // 64)))).repeat(64, 1)[:, :plain]
    rotary = torch.randn(300, rope_dim).bfloat16().float()
    rows = torch.cat((torch.from_numpy((codes * scales).astype(np.float32)), rotary), 1)
    packed = kv_pack(rows, rope_dim)
    assert packed.shape == (300, size)
    assert packed.dtype == torch.uint8
    assert kv_row_bytes(head_dim, rope_dim, "native") == size
    assert torch.equal(kv_unpack(packed, head_dim, rope_dim), rows)
    assert torch.equal(kv_pack(kv_unpack(packed, head_dim, rope_dim), rope_dim), packed)
    # the layout other code may rely on: codes, BF16 rotary part, scales, zeros
    assert torch.equal(
        packed[:, plain : plain + 2 * rope_dim].contiguous().view(torch.bfloat16).float(), rotary
    )
    assert torch.equal(
        ue8m0_value(packed[:, plain + 2 * rope_dim :][:, 0]), torch.from_numpy(scales[:, 0]).float()
    )
    assert not packed[:, plain + 2 * rope_dim + -(-plain // 64) :].any()


@pytest.mark.parametrize(("width", "size"), [(128, 68), (64, 34), (32, 17)])
def test_packed_index_keys_hold_every_code_at_every_scale_exactly(width: int, size: int) -> None:
    random = np.random.default_rng(1)
    codes = random.choice(E2M1, (300, width)) * random.choice([-1, 1], (300, width))
    codes[:, ::32] = 6
    scales = (2.0 ** random.integers(-20, 20, (300, width // 32))).repeat(32, 1)
    keys = torch.from_numpy((codes * scales).astype(np.float32))
    packed = index_pack(keys)
    assert packed.shape == (300, size)
    assert torch.equal(index_unpack(packed, width), keys)
    assert torch.equal(index_pack(index_unpack(packed, width)), packed)


def test_weights_on_either_grid_are_exact_in_bf16() -> None:
    # every code at scales across the normal range of BF16
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for byte in (1 + 16, 64, 120, 127, 140, 245):
        scale = torch.full((1, 8), byte, dtype=torch.uint8)
        fp8 = Weight(codes[None], scale[:, :2], "fp8", (128, 128)).dequantize()[0]
        finite = ~fp8.isnan()
        assert torch.equal(fp8.bfloat16().float()[finite], fp8[finite])
        fp4 = Weight(codes[None, :128].view(torch.int8), scale, "fp4", (1, 32)).dequantize()
        assert torch.equal(fp4.bfloat16().float(), fp4)


def test_any_row_range_of_a_weight_reads_as_the_whole_does() -> None:
    random = torch.Generator().manual_seed(0)
    data = torch.randint(0, 127, (300, 200), generator=random).to(torch.uint8)
    scale = torch.randint(120, 134, (3, 2), generator=random).to(torch.uint8)
    weight = Weight(data, scale, "fp8", (128, 128), True)
    want = (
        data.view(torch.float8_e4m3fn).float()
        * ue8m0_value(scale).repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    )
    assert torch.equal(weight.dequantize(), want)
    for first, last in ((0, 1), (5, 250), (127, 129), (128, 256), (299, 300)):
        assert torch.equal(weight.dequantize(first, last), want[first:last])
    assert [weight.dequantize(i, j).shape[0] for i, j in weight.row_blocks(10, 290)] == [280]


def test_hadamard_is_the_natural_order_sylvester_matrix() -> None:
    for n in (32, 64, 128):
        signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
        x = np.random.default_rng(n).standard_normal((5, n)).astype(np.float32)
        want = x.astype(np.float64) @ signs / math.sqrt(n)
        assert np.allclose(hadamard(torch.from_numpy(x)).numpy(), want, atol=1e-6)
        assert np.allclose(hadamard(torch.from_numpy(x).double()).numpy(), want, atol=1e-7)
    with pytest.raises(ShapeError, match="power of two"):
        hadamard(torch.ones(1, 48))


def plain_inverse(base: float, dim: int) -> F32:
    i = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float32(1) / np.power(np.float64(base), i.astype(np.float64)).astype(np.float32)).astype(
        np.float32
    )


def test_inverse_frequencies_without_stretching() -> None:
    found = inv_freq(RopeSpec(10000.0), 64).numpy()
    assert found.dtype == np.float32
    # the power may differ by a rounding of its last place between mathematics libraries
    assert np.all(np.abs(found.view(np.int32) - plain_inverse(10000.0, 64).view(np.int32)) <= 1)


def test_released_stretching_leaves_pairs_to_15_blends_to_24_and_divides_from_25() -> None:
    spec = V4_FLASH.layers[2].rope
    assert (spec.base, spec.factor, spec.original_context) == (160000.0, 16.0, 65536)
    found, plain = inv_freq(spec, 64).numpy(), plain_inverse(160000.0, 64)
    ratio = plain / found
    assert np.all(ratio[:16] == pytest.approx(1, abs=1e-6))
    assert np.all((ratio[16:25] > 1.01) & (ratio[16:25] < 15.9))
    assert np.all(ratio[25:] == pytest.approx(16, rel=1e-6))
    ramp = (np.arange(32) - 15) / 10
    want = plain / 16 * np.clip(ramp, 0, 1) + plain * (1 - np.clip(ramp, 0, 1))
    assert np.allclose(found, want, rtol=3e-7)


def test_layers_without_compressor_are_not_stretched() -> None:
    assert [spec.rope.factor for spec in V4_FLASH.layers[:4]] == [1.0, 1.0, 16.0, 16.0]
    assert [spec.rope.base for spec in V4_FLASH.layers[:4]] == [10000.0, 10000.0, 160000.0, 160000.0]
    assert V4_FLASH.mtp_layers[0].rope == RopeSpec(10000.0)


def test_angles_are_the_float32_product_even_at_a_million() -> None:
    inv = inv_freq(V4_FLASH.layers[2].rope, 64)
    for p in (0, 1, 127, 65536, 1048575):
        table = rope_table(torch.tensor([p], dtype=torch.int32), inv)[0].numpy()
        angle = np.float32(p) * inv.numpy()
        assert angle.dtype == np.float32
        assert np.allclose(table[:32], np.cos(angle.astype(np.float64)), atol=1e-7)
        assert np.allclose(table[32:], np.sin(angle.astype(np.float64)), atol=1e-7)
        # no amplitude factor
        assert np.allclose(table[:32] ** 2 + table[32:] ** 2, 1, atol=1e-6)
    # a float64 angle would be visibly elsewhere
    exact = 1048575 * inv.double().numpy()
    assert 0.005 < np.abs(angle - exact).max() < 0.0128


def test_rotation_turns_adjacent_pairs_of_the_last_dimensions_and_back() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 96, generator=random)
    positions = torch.tensor([0, 1, 5, 100, 1000, 5000, 70000], dtype=torch.int32)
    table = rope_table(positions, inv_freq(RopeSpec(10000.0), 64))
    turned = rope(x, table)
    assert torch.equal(turned[..., :32], x[..., :32])
    pairs = torch.view_as_complex(x[..., 32:].double().reshape(7, 3, 32, 2))
    angle = torch.atan2(table[:, 32:].double(), table[:, :32].double())
    want = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)
    assert torch.allclose(turned[..., 32:].double(), want, atol=1e-5)
    assert torch.allclose(rope(turned, table, inverse=True), x, atol=1e-5)
    assert torch.equal(rope(x[:, 0], table), turned[:, 0])
