"""Laws of single ops that no comparison of whole models would show, or only far away."""

from __future__ import annotations

import torch

from v4sdk import ops as o
from v4sdk.ops.hyper_connection import sinkhorn


def mixing(rows: int = 3, streams: int = 4, width: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    outputs = (2 + streams) * streams
    return {
        "x": torch.randn(rows, streams, width, generator=random),
        "fn": torch.randn(outputs, streams * width, generator=random),
        "base": torch.randn(outputs, generator=random),
        "scale": torch.ones(3),
    }


def test_post_can_vanish_and_reaches_two_while_pre_keeps_its_floor() -> None:
    args = mixing() | {"scale": torch.zeros(3)}
    args["base"][:8] = torch.tensor([-80.0, -80, -80, -80, -80, -80, 80, 80])
    u, post, _ = o.hc_pre(**args, iterations=20, norm_eps=1e-6, hc_eps=1e-3)
    # no eps on what is written back, and a factor of two
    assert post[:, :2].abs().max() < 1e-30
    assert torch.equal(post[:, 2:], torch.full((3, 2), 2.0))
    # an eps on what is read
    assert torch.allclose(u, 1e-3 * args["x"].sum(1), atol=1e-7)


def test_sinkhorn_normalises_columns_last() -> None:
    logits = 3 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0))
    for iterations in (1, 2, 5):
        c = sinkhorn(logits, iterations, 1e-9)
        columns, rows = (c.sum(-2) - 1).abs().max(), (c.sum(-1) - 1).abs().max()
        assert columns < 1e-5
        assert rows > 100 * columns
    # and comes close to doubly stochastic
    assert (sinkhorn(logits / 3, 20, 1e-6).sum(-1) - 1).abs().max() < 1e-3


def test_sinkhorn_begins_with_the_softmax_of_rows() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    p = torch.softmax(logits, -1) + 1e-6
    assert torch.allclose(sinkhorn(logits, 1, 1e-6), p / (p.sum(-2, keepdim=True) + 1e-6))


def test_comb_leads_from_its_first_index_to_its_second() -> None:
    x, y = mixing()["x"], torch.zeros(3, 8)
    comb = torch.zeros(3, 4, 4)
    comb[:, 0, 2] = 1.0
    moved = o.hc_post(y, x, torch.zeros(3, 4), comb)
    assert torch.equal(moved[:, 2], x[:, 0])
    assert not moved[:, [0, 1, 3]].any()


def test_norm_does_not_see_the_size_of_its_input() -> None:
    x, w = torch.randn(5, 64), torch.randn(64)
    assert torch.allclose(
        o.rms_norm(x * 1000, w, 1e-12, torch.float32), o.rms_norm(x, w, 1e-12, torch.float32), atol=1e-5
    )


def test_order_of_experts_changes_nothing() -> None:
    u, gate, bias = torch.randn(9, 16), torch.randn(6, 16), torch.randn(6)
    ids, weights = o.route(u, gate, bias, 3, 1.5)
    order = torch.randperm(6)
    turned_ids, turned_weights = o.route(u, gate[order], bias[order], 3, 1.5)
    assert torch.equal(order[turned_ids.long()], ids.long())
    assert torch.allclose(turned_weights, weights)
    assert torch.allclose(weights.sum(-1), torch.full((9,), 1.5))


def test_ties_between_experts_go_to_the_lowest_id() -> None:
    ids, _ = o.route(torch.randn(2, 4), torch.zeros(5, 4), torch.zeros(5), 3, 1.0)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_bias_moves_the_choice_and_not_the_weight() -> None:
    u, gate = torch.randn(4, 16), torch.randn(6, 16)
    bias = torch.tensor([9.0, 9, 0, 0, 0, 0])
    ids, weights = o.route(u, gate, bias, 2, 1.0)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(0, 1)}
    s = torch.sqrt(torch.nn.functional.softplus(u @ gate.T)).gather(1, ids.long())
    assert torch.allclose(weights, s / s.sum(-1, keepdim=True))
