"""Two processes send tokens to each other's experts by the emulated exchange; prints what each got back, as JSON."""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from ascend.inside.loaded import BF16, FAMILY, S, T, i32

RANKS, EXPERTS, WIDTH = 2, 4, 1024


def there_and_back(rank: int) -> list[float]:
    """Expert e multiplies by e + 1; tokens hold 1, 2 on rank 0 and 3, 4 on rank 1."""
    x = torch.zeros(2, WIDTH, dtype=BF16)
    x[:, 0] = torch.tensor([1.0, 2.0]) + 2 * rank
    ids = i32([0, 3], [2, 1]) if rank == 0 else i32([1, 0], [3, 2])
    group = ("ep", RANKS, rank, EXPERTS)
    found = S.npu_moe_distribute_dispatch_v2(x, ids, *group, shared_expert_num=0)
    counts = found[3].tolist()
    factors = torch.tensor([rank * 2 + 1.0, rank * 2 + 2.0]).repeat_interleave(torch.tensor(counts))
    done = found[0].clone()
    done[: sum(counts)] *= factors[:, None].to(BF16)
    weights = torch.tensor([[1.0, 10.0], [1.0, 10.0]])
    out = S.npu_moe_distribute_combine_v2(done, ids, found[2], found[4], weights, *group, shared_expert_num=0)
    return [*map(float, counts), *out[:, 0].tolist()]


def in_one_call(rank: int) -> list[float]:
    """Expert e's value is e + 1 times the token, its gate as large as the clamp lets it be: silu(2)."""
    x = torch.zeros(1, WIDTH, dtype=BF16)
    x[0, 0] = 0.25 * (rank + 1)
    first, second = [], []
    for e in (2 * rank, 2 * rank + 1):
        w1, w2 = torch.zeros(WIDTH, 2 * WIDTH, dtype=BF16), torch.zeros(WIDTH, WIDTH, dtype=BF16)
        w1[0, 0], w1[0, WIDTH], w2[0, 5] = 100.0, e + 1.0, 1.0
        first.append(w1)
        second.append(w2)
    y, counts = T.npu_mega_moe(
        torch.zeros(1, dtype=torch.int32), x, i32([0, 3]), torch.tensor([[1.0, 2.0]]), first, second, EXPERTS, RANKS, 0,
        activation_clamp=2.0,
    )  # fmt: skip
    return [*map(float, counts.tolist()), float(y[0, 5]) / (2 / (1 + math.exp(-2)))]


def child(rank: int, meeting: str, said: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    found = {"exchange": there_and_back(rank)}
    if FAMILY == "910C":
        found["one call"] = in_one_call(rank)
    dist.destroy_process_group()
    said.put((rank, found))


def main() -> None:
    # with fork the vendor's wheel is imported once
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=child, args=(rank, f"{folder}/meeting", said)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        found = dict(said.get(timeout=120) for _ in ranks)
        for process in ranks:
            process.join()
    print(json.dumps([found[rank] for rank in range(RANKS)]))


if __name__ == "__main__":
    main()
