"""One rank of the expert-parallel measurement: a layer of drawn experts, checked against one process, then timed in turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from v4sdk import plugins
from v4sdk.backend import EngineConfig, bind
from v4sdk.expert_parallel.exchange import Compute, Exchange, GroupLink, Handle, Link, expert_bounds
from v4sdk.expert_parallel.experts import Bound, shard
from v4sdk.numerics import REFERENCE
from v4sdk.ops.precision import between_dtype
from v4sdk.weights import ExpertWeights, Weight
from v4sdk_bench.mini.checkpoint import MINI

LINKS = ("gloo", "emulated-link")
LIMIT = 10.0
_PATIENCE_S = 120


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
        tokens: of each rank. chosen: experts of a token. waves: of the overlapped schedule.
        bandwidth_bytes_per_s, latency_s: of the emulated link, each way.
        budget_s: for the rounds of one link; least: rounds at any rate.
        planted: break the overlapped schedule, to see that the check notices.
    """

    backend: str = "cpu"
    processes: int = 2
    tokens: int = 128
    hidden: int = 1024
    width: int = 512
    experts: int = 64
    chosen: int = 6
    waves: int = 4
    seed: int = 0
    bandwidth_bytes_per_s: float = 25e6
    latency_s: float = 1e-3
    budget_s: float = 10.0
    least: int = 5
    planted: bool = False

    def setting(self) -> dict[str, Any]:
        """What another measurement must share."""
        names = ("processes", "tokens", "hidden", "width", "experts", "chosen", "waves")
        return {name: getattr(self, name) for name in names} | {
            "numerics": "reference",
            "weights": "fp4",
            "threads_per_process": 1,
        }


class DelayedLink:
    """A link that is never faster than a given one: a transfer has arrived when the real one has, and when one of this bandwidth
    and latency would have, after those before it. Both directions at once; what stays on a rank crosses nothing.
    """

    def __init__(self, link: Link, rank: int, bandwidth_bytes_per_s: float, latency_s: float) -> None:
        self._link, self._rank = link, rank
        self._rate, self._latency, self._free = bandwidth_bytes_per_s, latency_s, 0.0

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> _Delayed:
        """Start the real transfer and note when the emulated one ends."""
        away = max(sum(rows) - rows[self._rank] for rows in (received_rows, sent_rows))
        crossing = away * sent.shape[1:].numel() * sent.element_size()
        self._free = max(self._free, time.perf_counter()) + crossing / self._rate
        handle = self._link.all_to_all(received, sent, received_rows, sent_rows)
        return _Delayed(handle, self._free + self._latency)


@dataclass(frozen=True)
class _Delayed:
    handle: Handle
    due: float

    def wait(self) -> None:
        self.handle.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))


def draw_experts(load: Load) -> ExpertWeights:
    """Random FP4 experts, the same on every rank."""
    random = torch.Generator().manual_seed(load.seed)

    def one(rows: int, cols: int) -> Weight:
        data = torch.randint(-128, 128, (rows, cols // 2), generator=random, dtype=torch.int8)
        scale = torch.randint(118, 122, (rows, cols // 32), generator=random, dtype=torch.uint8)
        return Weight(data, scale, "fp4", (1, 32), True)

    inward, outward = (load.width, load.hidden), (load.hidden, load.width)
    drawn = [(one(*inward), one(*outward), one(*inward)) for _ in range(load.experts)]
    w1, w2, w3 = (tuple(ws) for ws in zip(*drawn, strict=True))
    return ExpertWeights(w1, w2, w3)


def draw_tokens(load: Load, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's rows [T, N], distinct experts [T, K] and weights [T, K]."""
    random = torch.Generator().manual_seed(load.seed * 1000 + rank + 1)
    u = torch.randn(load.tokens, load.hidden, generator=random).to(torch.bfloat16)
    ids = torch.rand(load.tokens, load.experts, generator=random).argsort(-1)[:, : load.chosen]
    weights = torch.rand(load.tokens, load.chosen, generator=random)
    return u, ids.to(torch.int32), weights / weights.sum(-1, keepdim=True)


class _Rank:
    """The layer on this rank, and its two schedules over any link."""

    def __init__(self, load: Load, rank: int) -> None:
        self.load, self.rank = load, rank
        self.mine = draw_tokens(load, rank)
        backend = plugins.select(load.backend)
        binding = bind(backend, MINI, EngineConfig(REFERENCE, "native", backend.capability()))
        self.bound = Bound.of(binding, LIMIT, REFERENCE)
        self.experts = draw_experts(load)
        own = shard(
            self.experts, 0, rank, load.processes, partial(backend.prepare_experts, "layers.0.ffn.experts")
        )
        self.compute = self.bound.on(own)
        real = GroupLink(lambda: None)
        self.links: dict[str, Link] = {
            "gloo": real,
            "emulated-link": DelayedLink(real, rank, load.bandwidth_bytes_per_s, load.latency_s),
        }
        self.bounds = expert_bounds(load.experts, load.processes)

    def run(self, link: str, waves: int, compute: Compute | None = None) -> Tensor:
        exchange = Exchange(self.links[link], self.rank, self.bounds)
        return exchange.run(*self.mine, compute or self.compute, between_dtype(REFERENCE), waves)

    def unequal(self) -> int:
        """Elements, over all ranks, schedules and links, that differ in any bit from the op in one process."""
        whole = torch.empty(self.load.processes * self.load.tokens, self.load.hidden)
        if self.rank == 0:
            everyone = zip(*(draw_tokens(self.load, r) for r in range(self.load.processes)), strict=True)
            u, ids, weights = (torch.cat(part) for part in everyone)
            whole = self.bound.function(u, ids, weights, self.experts, LIMIT, REFERENCE)
        dist.broadcast(whole, 0)
        expected = whole.chunk(self.load.processes)[self.rank]
        count = 0
        for link in self.links:
            for waves in (1, self.load.waves):
                found = self.run(link, waves)
                if self.load.planted and waves > 1:
                    found[-1, -1] += 1
                count += int((found.view(torch.int32) != expected.view(torch.int32)).sum())
        return int(_over_ranks(float(count), dist.ReduceOp.SUM))

    def parts(self, link: str) -> tuple[float, float]:
        """Seconds of computing and of everything else, of the slowest rank, when one follows the other."""
        spent = 0.0

        def timed(rows: Tensor, weights: Tensor, counts: list[int], first: int) -> Tensor:
            nonlocal spent
            start = time.perf_counter()
            y = self.compute(rows, weights, counts, first)
            spent += time.perf_counter() - start
            return y

        def nothing(rows: Tensor, weights: Tensor, counts: list[int], first: int) -> Tensor:
            return torch.zeros(rows.shape)

        computing, exchanging = [], []
        for _ in range(3):
            spent = 0.0
            self.round(partial(self.run, link, 1, timed))
            computing.append(_over_ranks(spent, dist.ReduceOp.MAX))
            exchanging.append(self.round(partial(self.run, link, 1, nothing))[0])
        return statistics.median(computing), statistics.median(exchanging)

    def round(self, call: Callable[[], object]) -> tuple[float, float]:
        """Wall and processor seconds of the slowest rank, all starting together."""
        dist.barrier()
        start, processor = time.perf_counter(), time.process_time()
        call()
        wall, processor = time.perf_counter() - start, time.process_time() - processor
        return _over_ranks(wall, dist.ReduceOp.MAX), _over_ranks(processor, dist.ReduceOp.MAX)

    def rounds(self, link: str) -> dict[str, Any]:
        """Rounds of sequential, waves, sequential, in rotating order, as `timing.paired` takes them."""
        began, rounds = time.perf_counter(), list[list[float]]()
        cpu: tuple[list[float], list[float]] = ([], [])
        go_on = True
        while go_on:
            times = [0.0, 0.0, 0.0]
            for place in range(3):
                which = (place + len(rounds)) % 3
                times[which], used = self.round(partial(self.run, link, self.load.waves if which == 1 else 1))
                cpu[which % 2].append(used)
            rounds.append(times)
            spent = _over_ranks(time.perf_counter() - began, dist.ReduceOp.MAX)
            go_on = len(rounds) < self.load.least or spent < self.load.budget_s
        return {"rounds": rounds, "cpu_s": [statistics.median(c) for c in cpu]}


def _over_ranks(value: float, how: dist.ReduceOp.RedOpType) -> float:
    held = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(held, how)
    return float(held[0])


def main(rank: int, load: Load, meeting: Path, result: Path) -> None:
    """Measure; rank 0 writes what was found as JSON."""
    # the ranks share the cores: more threads each would measure their quarrels
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=load.processes,
        timeout=timedelta(seconds=_PATIENCE_S),
    )  # fmt: skip
    with torch.inference_mode():
        here = _Rank(load, rank)
        found: dict[str, Any] = {"load": asdict(load), "unequal": here.unequal()}
        if not found["unequal"]:
            for link in LINKS:
                compute_s, transfer_s = here.parts(link)
                found[link] = {"compute_s": compute_s, "transfer_s": transfer_s, **here.rounds(link)}
    if rank == 0:
        result.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Load(**json.loads(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[4]))
