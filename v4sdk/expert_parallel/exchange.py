"""The exchange: rows go to the ranks that own their experts, and one row per (token, expert) comes back and is summed.

Knows neither a model nor how experts compute: `Compute` is whatever the backend bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from v4sdk.backend import ExchangeBroken
from v4sdk.errors import ConfigError
from v4sdk.ops.precision import wide
from v4sdk.weights import ExpertWeights

# rows [R, N] sorted by expert, their weights [R], rows per expert, the first of these experts within the rank -> [R, N]
Compute = Callable[[Tensor, Tensor, list[int], int], Tensor]


class LinkBroken(ExchangeBroken):
    """Rows could not be moved."""


class Handle(Protocol):
    """A transfer under way."""

    def wait(self) -> object: ...


class Link(Protocol):
    """Moves rows between ranks."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> Handle:
        """Start sending `sent_rows[j]` rows to each rank j; rows arrive in rank order. Raises `LinkBroken`, also on waiting."""


class GroupLink:
    """A link over a group of torch.distributed.

    Args:
        group: asked on every use: to hold it would keep its connections open when the group is destroyed.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup | None]) -> None:
        self._group = group

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> Handle:
        """Start one collective."""
        try:
            work = dist.all_to_all_single(
                received, sent, received_rows, sent_rows, self._group(), async_op=True
            )
        except RuntimeError as exc:
            raise LinkBroken(str(exc)) from exc
        return _GroupHandle(work)


@dataclass(frozen=True)
class _GroupHandle:
    work: dist.Work

    def wait(self) -> None:
        try:
            self.work.wait()
        except RuntimeError as exc:
            raise LinkBroken(str(exc)) from exc


def split(count: int, parts: int) -> list[int]:
    """Bounds of `parts` contiguous, balanced ranges of `count` things: parts + 1 numbers, longer ranges first."""
    size, longer = divmod(count, parts)
    return [i * size + min(i, longer) for i in range(parts + 1)]


def expert_bounds(num_experts: int, processes: int) -> list[int]:
    """Which experts each rank owns: rank j has bounds[j] to bounds[j + 1].

    Raises:
        ConfigError: if there are more ranks than experts.
    """
    if processes > num_experts:
        raise ConfigError(
            f"{processes} processes share {num_experts} routed experts, expected at least one expert for each",
            hint=f"start at most {num_experts}: torchrun --nproc-per-node {num_experts} --no-python v4sdk run --ep {num_experts}",
        )
    return split(num_experts, processes)


@dataclass(frozen=True)
class _Plan:
    """Order and counts of one exchange.

    Attributes:
        order: (token, choice) pairs, flat, sorted by wave, expert, token, choice [T * K].
        sent: rows by wave and rank. got: rows by wave, source rank and expert.
    """

    order: Tensor
    sent: list[list[int]]
    got: list[list[list[int]]]


class Exchange:
    """One rank's side of the exchange. Every rank calls `run` at the same point, with any number of its own tokens.

    In `waves` > 1 the experts of each rank are taken in that many parts: while one part computes, the rows of the next are on
    their way out and the results of the one before on their way back. 1 is the sequential schedule: all rows out, all experts,
    all results back. The sums are the same bits: each expert sees the same rows in the same order, by source rank, token
    and choice, and results are added by the source in ascending expert id.

    Args:
        bounds: see `expert_bounds`. rank: this process.
    """

    def __init__(self, link: Link, rank: int, bounds: list[int]) -> None:
        self._link, self._rank, self._bounds = link, rank, bounds

    def run(
        self, u: Tensor, ids: Tensor, weights: Tensor, compute: Compute, back: torch.dtype, waves: int = 1, *,
        experts: ExpertWeights | None = None, tokens: int = 0,
    ) -> Tensor:  # fmt: skip
        """Compute the routed sum of this rank's tokens; here any rank may have some.

        Args:
            compute: runs experts of this rank. back: dtype in which results travel; float32 sums are made of it.
            experts, tokens: of no use here, see `v4sdk.backend.ExpertExchange`.

        Shapes:
            u [T, N], ids [T, K] int, weights [T, K] f32 -> [T, N] float32; T may differ between ranks and be 0

        Raises:
            LinkBroken: if another rank is gone or too slow.
        """
        plan = self._plan(ids, waves)
        returned: list[tuple[Tensor, Handle]] = []
        out = self._dispatch(plan, 0, u, weights)
        for wave in range(waves):
            packed, handle = out
            handle.wait()
            if wave + 1 < waves:
                out = self._dispatch(plan, wave + 1, u, weights)
            returned.append(self._serve(plan, wave, packed, u, compute, back))
        rows = []
        for part, handle in returned:
            handle.wait()
            rows.append(part)
        return _sum_by_expert(u, ids, plan.order, torch.cat(rows))

    def _own(self, wave: int, waves: int) -> tuple[int, int]:
        """The experts of a wave, counted from this rank's first."""
        cut = split(self._bounds[self._rank + 1] - self._bounds[self._rank], waves)
        return cut[wave], cut[wave + 1]

    def _plan(self, ids: Tensor, waves: int) -> _Plan:
        ranks, device = len(self._bounds) - 1, ids.device
        # slots: all experts in the order their rows leave, by wave, then id
        cuts = [
            [lo + c for c in split(hi - lo, waves)]
            for lo, hi in zip(self._bounds, self._bounds[1:], strict=False)
        ]
        slots = [e for w in range(waves) for cut in cuts for e in range(cut[w], cut[w + 1])]
        slot_of = torch.empty(len(slots), dtype=torch.long)
        slot_of[torch.tensor(slots)] = torch.arange(len(slots))
        order = torch.argsort(slot_of.to(device)[ids.reshape(-1).long()], stable=True)
        counts = torch.bincount(ids.reshape(-1).long(), minlength=len(slots))
        sizes = [hi - lo for lo, hi in zip(self._bounds, self._bounds[1:], strict=False)]
        own = sizes[self._rank]
        got = counts.new_empty(ranks * own)
        self._link.all_to_all(got, counts, [own] * ranks, sizes).wait()
        to_send, table = counts.tolist(), got.view(ranks, own).tolist()
        sent = [[sum(to_send[cut[w] : cut[w + 1]]) for cut in cuts] for w in range(waves)]
        spans = [self._own(w, waves) for w in range(waves)]
        return _Plan(order, sent, [[row[a:b] for row in table] for a, b in spans])

    def _dispatch(self, plan: _Plan, wave: int, u: Tensor, weights: Tensor) -> tuple[Tensor, Handle]:
        start = sum(map(sum, plan.sent[:wave]))
        pairs = plan.order[start : start + sum(plan.sent[wave])]
        # one message: the bytes of a row, then those of its weight
        factor = weights.reshape(-1)[pairs][:, None].to(_wide_dtype(u))
        rows = u[pairs // max(1, weights.shape[1])]
        packed = torch.cat([rows.view(torch.uint8), factor.view(torch.uint8)], 1)
        received = [sum(row) for row in plan.got[wave]]
        room = packed.new_empty(sum(received), packed.shape[1])
        return room, self._link.all_to_all(room, packed, received, plan.sent[wave])

    def _serve(
        self, plan: _Plan, wave: int, packed: Tensor, u: Tensor, compute: Compute, back: torch.dtype
    ) -> tuple[Tensor, Handle]:
        table = plan.got[wave]
        by_expert = _regroup(table, packed.device)
        ordered = packed if by_expert is None else packed[by_expert]
        cut = u.shape[1] * u.element_size()
        rows = ordered[:, :cut].contiguous().view(u.dtype)
        factor = ordered[:, cut:].contiguous().view(_wide_dtype(u))[:, 0]
        counts = [sum(column) for column in zip(*table, strict=True)]
        found = compute(rows, factor, counts, self._own(wave, len(plan.got))[0]).to(back)
        if by_expert is not None:
            found = torch.empty_like(found).index_copy_(0, by_expert, found)
        room = found.new_empty(sum(plan.sent[wave]), u.shape[1])
        handle = self._link.all_to_all(
            room.view(torch.uint8),
            found.contiguous().view(torch.uint8),
            plan.sent[wave],
            [sum(row) for row in table],
        )
        return room, handle


def _regroup(table: list[list[int]], device: torch.device) -> Tensor | None:
    """Rows that arrived by source rank, then expert: the order by expert, then source rank. None where that is the same."""
    if sum(1 for row in table if any(row)) <= 1:
        return None
    counts = torch.tensor(table)
    expert = torch.arange(counts.shape[1]).repeat(counts.shape[0])
    return torch.argsort(torch.repeat_interleave(expert, counts.reshape(-1)), stable=True).to(device)


def _sum_by_expert(u: Tensor, ids: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    by_id = torch.gather(place.view_as(ids), 1, torch.argsort(ids.long(), dim=-1, stable=True))
    y = torch.zeros_like(wide(u))
    for k in range(ids.shape[1]):
        y = y + wide(rows[by_id[:, k]])
    return y


def _wide_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32
