"""From logits to one token per row, and on to the next step, without reading a value on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from v4sdk.ops.op import Case, Cost, Tolerance, op


def _inputs() -> Iterator[Case]:
    shapes = (
        ("tiny", 1, 7, 0),
        ("odd", 3, 63, 2),
        ("odd", 5, 1000, 20),
        ("flash", 1, 129280, 0),
        ("flash", 8, 129280, 5),
    )
    for scale, rows, vocab, top in shapes:
        for greedy in (True, False):
            label = f"{'greedy' if greedy else 'drawn'}-{rows}x{vocab}-top{top}"
            yield Case(label, _maker(rows, vocab, top, greedy), scale)
    yield Case("ties-go-to-the-lowest-id", _ties, "edge")
    yield Case("no-rows", _maker(0, 9, 1, False), "edge")


def _maker(rows: int, vocab: int, top: int, greedy: bool) -> Any:
    def make(device: torch.device) -> dict[str, Any]:
        g = torch.Generator().manual_seed(rows * 1000003 + vocab)
        named: dict[str, Any] = {
            "logits": torch.randn(rows, vocab, generator=g) * 3,
            "bias": torch.randn(rows, vocab, generator=g) if vocab < 5000 else None,
            "temperature": None if greedy else torch.rand(rows, generator=g) * 1.5,
            "top_k": torch.randint(0, vocab, (rows,), generator=g, dtype=torch.int32),
            "top_p": 1.0 - torch.rand(rows, generator=g) * 0.5,
            "min_p": torch.rand(rows, generator=g) * 0.1,
            "uniform": torch.randint(0, 1 << 24, (rows,), generator=g) * 2.0**-24,
        }
        placed = {k: v if v is None else v.to(device) for k, v in named.items()}
        return placed | {"num_top": top}

    return make


def _ties(device: torch.device) -> dict[str, Any]:
    rows = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]], device=device)
    one = torch.ones(2, device=device)
    top_k = torch.tensor([1, 2], dtype=torch.int32, device=device)
    return {
        "logits": rows, "bias": None, "temperature": one, "top_k": top_k, "top_p": one, "min_p": one * 0,
        "uniform": one * 0.75, "num_top": 3,
    }  # fmt: skip


def _cost(logits: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Cost:
    # read once for the log-sum, once for the choice; 5 per entry is the exponential and its sum
    read = 2 * logits.nbytes + (bias.nbytes if bias is not None else 0)
    return Cost(read, 12 * logits.shape[0], 5 * logits.numel())


_F32 = Tolerance(2e-5, 1e-5, "one float32 log-sum-exp over the vocabulary, summed in another order")


@op(inputs=_inputs, sensitivity="selection", tolerances={torch.float32: _F32}, cost=_cost)
def sample(
    logits: Tensor, bias: Tensor | None, temperature: Tensor | None, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    uniform: Tensor, num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose one token per row: bias, then temperature, top_k, top_p, min_p, then the inverse of the distribution at `uniform`.

    z = (logits + bias) / temperature; the survivors are ordered by falling z, and the first whose cumulated probability
    exceeds uniform * total is taken. All in float32. top_p and min_p see the distribution of what is left before them.

    Shapes:
        logits [T, V] f32, bias [T, V] f32 or None, temperature [T] f32 or None (every row greedy), top_k [T] i32 (0: all),
        top_p, min_p, uniform [T] f32 -> ids [T] i64, logprobs [T] f32 of the chosen, top_ids [T, num_top] i64,
        top_logprobs [T, num_top] f32, falling
    Edge rules:
        Temperature 0 takes the largest z. Ties go to the lowest id. One token always survives. Log-probabilities are of
        softmax(logits), before bias and filters. No rows give empty results.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    z = logits.float() if bias is None else logits.float() + bias
    ids = z.argmax(-1)
    if temperature is not None:
        ids = torch.where(temperature > 0, _draw(z, temperature, top_k, top_p, min_p, uniform), ids)
    chosen = log_p.gather(-1, ids[:, None])[:, 0]
    if num_top == 0:
        empty = log_p[:, :0]
        return ids, chosen, empty.long(), empty
    # stable sort, not topk: ties have an order
    top, top_ids = torch.sort(log_p, dim=-1, descending=True, stable=True)
    return ids, chosen, top_ids[:, :num_top].contiguous(), top[:, :num_top].contiguous()


def _draw(
    z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    scaled = z / torch.where(temperature > 0, temperature, 1.0)[:, None]
    ordered, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(z.shape[-1], device=z.device)
    within = torch.where(top_k > 0, top_k, z.shape[-1])[:, None]
    p = torch.softmax(ordered.masked_fill(rank >= within, float("-inf")), -1)
    before = torch.cumsum(p, -1) - p
    # the sum of a whole distribution rounds to just below or above 1: top_p 1 must not cut its tail
    dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    dropped |= p < min_p[:, None] * p[:, :1]
    p = p.masked_fill(dropped & (rank > 0), 0.0)
    summed = torch.cumsum(p, -1)
    at = (summed <= uniform[:, None] * summed[:, -1:]).sum(-1)
    last = (p > 0).sum(-1) - 1
    return ids.gather(-1, torch.minimum(at, last)[:, None])[:, 0]


def _feed_inputs() -> Iterator[Case]:
    for scale, rows in (("tiny", 1), ("odd", 3), ("edge", 0), ("flash", 8), ("pro", 32)):
        yield Case(f"{rows}-rows", _feed_maker(rows), scale)


def _feed_maker(rows: int) -> Any:
    def make(device: torch.device) -> dict[str, Any]:
        ids = torch.arange(rows, device=device)
        return {
            "drawn": ids + 5,
            "token_ids": ids,
            "positions": torch.arange(rows, dtype=torch.int32, device=device) * 7,
        }

    return make


def _feed_cost(drawn: Tensor, token_ids: Tensor, positions: Tensor) -> Cost:
    return Cost(drawn.nbytes + positions.nbytes, token_ids.nbytes + positions.nbytes, 0)


@op(inputs=_feed_inputs, mutates=("token_ids", "positions"), cost=_feed_cost)
def feed(drawn: Tensor, token_ids: Tensor, positions: Tensor) -> None:
    """Make what was drawn the next step's input, one position further: the link that lets a step be replayed.

    Shapes:
        drawn [T] i64, token_ids [T] i64, positions [T] i32
    """
    token_ids.copy_(drawn)
    positions.add_(1)
