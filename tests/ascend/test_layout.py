"""Where adapters put rows and weights: pages that stand for others, pools and their lists, matrices laid out at load."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from v4sdk.ops import inputs
from v4sdk.quant import ue8m0_ceil
from v4sdk.weights import ExpertWeights, Weight

layout = importlib.import_module("v4sdk_ascend.providers.layout")
selected = importlib.import_module("v4sdk_ascend.providers.selected")
window = importlib.import_module("v4sdk_ascend.providers.window")

CPU = torch.device("cpu")


def test_scales_that_are_no_powers_of_two_stay_as_they_are() -> None:
    codes = torch.zeros(256, 256, dtype=torch.float8_e4m3fn)
    odd = Weight(codes, torch.full((2, 2), 0.3), "fp8", (128, 128), True)
    even = replace(odd, scale=torch.full((2, 2), 0.25))
    assert layout.mx_scales(odd) is odd
    assert layout.mx_scales(even).block == (1, 32)
    assert torch.equal(layout.mx_scales(even).scale, ue8m0_ceil(torch.full((256, 8), 0.25)))


def test_gate_and_up_are_halves_of_one_stored_tensor() -> None:
    draw = inputs.Draw("halves", CPU)
    experts = ExpertWeights(
        *(tuple(draw.weight("float", *s) for _ in range(3)) for s in ((8, 16), (16, 8), (8, 16)))
    )
    packed = layout.experts(experts, CPU).packed
    both = layout.halves(packed[0].data, packed[2].data)
    assert both.data_ptr() == packed[0].data.data_ptr()
    assert both.transpose(1, 2).is_contiguous()
    assert torch.equal(both, torch.cat((packed[0].data, packed[2].data), 1))
    assert layout.halves(packed[0].data.clone(), packed[2].data.clone()) is None
    assert layout.halves(packed[2].data, packed[0].data) is None


def test_absent_picks_go_behind_the_others() -> None:
    picks = torch.tensor([[3, -1, 5, -1], [-1, -1, -1, -1], [1, 2, 3, 4]], dtype=torch.int32)
    want = torch.tensor([[3, 5, -1, -1], [-1, -1, -1, -1], [1, 2, 3, 4]], dtype=torch.int32)
    assert torch.equal(selected.valid_first(picks), want)


def test_pages_of_few_entries_are_copied_together_and_others_are_read_where_they_lie() -> None:
    draw = inputs.Draw("pages", CPU)
    batch = inputs.DECODE.batch(draw, 100)
    few, many = (
        draw.normal(inputs.DECODE.num_pages + 1, 8, 512),
        draw.normal(inputs.DECODE.num_pages + 1, 32, 512),
    )
    where = window.entry_pages(many, batch)
    assert where.rows.data_ptr() == many.data_ptr()
    copied = window.entry_pages(few, batch)
    assert copied.rows.shape[1] == 128
    page = int(batch.block_table[1, 0])
    assert torch.equal(copied.rows[int(copied.table[1, 0])][:8, 0], few[page])


def test_a_query_sees_its_own_sink_slot_first_and_nothing_absent() -> None:
    # one group of two queries: the first sees two near rows and one far one, the second one near row and none
    one, two = torch.tensor([[0, 1]]), torch.tensor([[2, 1]])
    pool = selected.Pool(torch.zeros(1, 5, 512), one, two, torch.tensor([[3, 4]]), torch.tensor([[1, 0]]), 3)
    assert selected._indices(pool, 1)[0, :, 0].tolist() == [[0, 1, 2, 4], [0, 2, -1, -1]]
    assert selected._indices(pool, 0)[0, :, 0].tolist() == [[0, 1, 3], [1, -1, -1]]


def rows_seen(where: Any, b: int, positions: Tensor) -> Tensor:
    """Rows of a sequence by position, as a kernel finds them."""
    page = where.table[b].long()[positions // 128]
    found: Tensor = where.rows[page, positions % 128, 0]
    return found


def test_a_ring_is_a_page_for_every_position_of_its_window() -> None:
    draw = inputs.Draw("ring", CPU)
    batch = inputs.DECODE.batch(draw, 100)
    ring = draw.normal(len(inputs.DECODE.starts) + 1, 128, 512)
    where = window.ring_pages(ring, batch)
    for b, p in enumerate(batch.positions.tolist()):
        back = torch.arange(max(0, p - 127), p + 1)
        assert torch.equal(rows_seen(where, b, back), ring[int(batch.slots[b]), back % 128])


def test_a_chunk_lies_at_its_own_positions_behind_what_came_before() -> None:
    draw = inputs.Draw("chunk", CPU)
    batch, steps = inputs.CHUNK.batch(draw, 100), inputs.CHUNK
    count = len(steps.starts)
    kv = draw.normal(count * 128 + sum(steps.lengths), 512)
    where = window.chunk_pages(kv, batch)
    for b, (start, new) in enumerate(zip(steps.starts, steps.lengths, strict=True)):
        first = count * 128 + sum(steps.lengths[:b])
        assert torch.equal(rows_seen(where, b, torch.arange(start, start + new)), kv[first : first + new])
        old = torch.arange(max(0, start - 127), start)
        assert torch.equal(rows_seen(where, b, old), kv[b * 128 + old % 128])
