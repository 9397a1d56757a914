"""From logits to one token per row, and on to the next step."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.sample import BUCKETS, bucket_kernel, draw_kernel, feed_kernel, stats_kernel, top_kernel
from .launch import Launch, deliver, result
from .operands import dense, power_of_two

# entries of the vocabulary per program
_CHUNK = 1024
# elements of a bucket that a search reads at a time
_BLOCK = 512
# rows that are drawn together: each needs 8 bytes per entry of the vocabulary
_ROWS = 64
_FEED_BLOCK = 256
Stats = tuple[Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Sample:
    """The end of a step."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def sample(
        self, logits: Tensor, bias: Tensor | None, temperature: Tensor | None, top_k: Tensor, top_p: Tensor,
        min_p: Tensor, uniform: Tensor, num_top: int, out: Results | None = None,
    ) -> Results:  # fmt: skip
        """See `v4sdk.ops.sample`. One launch if all rows are greedy, else three for every 64 rows; one more for `num_top`."""
        (t, vocab), device = logits.shape, logits.device
        top = min(num_top, vocab)
        given: tuple[Tensor | None, ...] = out or (None, None, None, None)
        ids = result(given[0], (t,), torch.int64, device)
        logprobs = result(given[1], (t,), torch.float32, device)
        top_ids = result(given[2], (t, top), torch.int64, device)
        top_logprobs = result(given[3], (t, top), torch.float32, device)
        logits, bias = dense(logits), None if bias is None else dense(bias)
        step = max(1, t if temperature is None else _ROWS)
        for first in range(0, t, step):
            count = min(step, t - first)
            rows = logits.narrow(0, first, count)
            shift = None if bias is None else bias.narrow(0, first, count)
            to = (ids.narrow(0, first, count), logprobs.narrow(0, first, count))
            if temperature is None:
                stats = self._greedy(rows, shift, *to)
            else:
                filters = (temperature, top_k, top_p, min_p, uniform)
                chosen = tuple(dense(x).narrow(0, first, count) for x in filters)
                stats = self._draw(rows, shift, chosen, *to)
            if top:
                self._top(rows, stats, top_ids.narrow(0, first, count), top_logprobs.narrow(0, first, count))
        return deliver(out, (ids, logprobs, top_ids, top_logprobs))

    def _greedy(self, logits: Tensor, bias: Tensor | None, ids: Tensor, logprobs: Tensor) -> Stats:
        """The best of every row."""
        stats, (grid, sizes) = _stats(logits), _layout(logits)
        self._launch(
            stats_kernel, grid, *_pair(logits, bias), *stats, ids, logprobs, None, None, None,
            self._launch.counters(grid[1]), logits.shape[1], GREEDY=True, warps=4, stages=1, **sizes,
        )  # fmt: skip
        return stats

    def _draw(
        self, logits: Tensor, bias: Tensor | None, filters: tuple[Tensor, ...], ids: Tensor, logprobs: Tensor
    ) -> Stats:
        """One token per row; `filters` are temperature, top_k, top_p, min_p and uniform."""
        (t, vocab), device = logits.shape, logits.device
        stats, (grid, sizes), both = _stats(logits), _layout(logits), _pair(logits, bias)
        counts = torch.empty((t, BUCKETS.value), dtype=torch.int32, device=device)
        masses = torch.empty((t, BUCKETS.value), dtype=torch.int64, device=device)
        kept = torch.empty(t, dtype=torch.int64, device=device)
        keys = torch.empty((t, vocab), dtype=torch.int32, device=device)
        numbers = torch.empty((t, vocab), dtype=torch.int32, device=device)
        counters = self._launch.counters(t)
        self._launch(
            stats_kernel, grid, *both, *stats, ids, logprobs, counts, masses, kept, counters, vocab, GREEDY=False,
            warps=4, stages=1, **sizes,
        )  # fmt: skip
        self._launch(
            bucket_kernel, grid, *both, filters[0], filters[3], *stats, counts, masses, kept, counters, vocab,
            warps=8, stages=1, **sizes,
        )  # fmt: skip
        self._launch(
            draw_kernel, grid, *both, *filters, *stats, counts, masses, kept, keys, numbers, ids, logprobs, counters, vocab,
            BLOCK=_BLOCK, warps=8, stages=1, **sizes,
        )  # fmt: skip
        return stats

    def _top(self, logits: Tensor, stats: Stats, top_ids: Tensor, top_logprobs: Tensor) -> None:
        """The largest log-probabilities."""
        top, (grid, sizes) = top_ids.shape[1], _layout(logits)
        ranks = torch.empty((*grid[::-1], top), dtype=torch.int64, device=logits.device)
        self._launch(
            top_kernel, grid, logits, logits.stride(0), *stats[:2], ranks, top_ids, top_logprobs,
            self._launch.counters(grid[1]), logits.shape[1], top, BR=power_of_two(grid[0] * top), warps=4, stages=1,
            **sizes,
        )  # fmt: skip

    def feed(self, drawn: Tensor, token_ids: Tensor, positions: Tensor) -> None:
        """See `v4sdk.ops.feed`."""
        t = drawn.shape[0]
        grid = (-(-t // _FEED_BLOCK),)
        self._launch(feed_kernel, grid, drawn, token_ids, positions, t, BLOCK=_FEED_BLOCK, warps=1, stages=1)


def _layout(logits: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs per row and rows, and the sizes of a chunk and of all chunks as blocks."""
    t, vocab = logits.shape
    chunk = min(_CHUNK, power_of_two(vocab))
    chunks = -(-vocab // chunk)
    return (chunks, t), {"CHUNK": chunk, "BC": power_of_two(chunks)}


def _stats(logits: Tensor) -> Stats:
    """Room for what `stats_kernel` finds: largest logits, sums, best ranks."""
    (chunks, t), _ = _layout(logits)
    largest, sums = (torch.empty((t, chunks), dtype=torch.float32, device=logits.device) for _ in range(2))
    return largest, sums, torch.empty((t, chunks), dtype=torch.int64, device=logits.device)


def _pair(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, int, Tensor | None, int]:
    """Logits and bias as kernels take them: each with the distance of its rows."""
    return logits, logits.stride(0), bias, 0 if bias is None else bias.stride(0)
