"""One rank of tests/ascend/test_ep.py: joins the others over gloo, exchanges as the backend would, and compares on rank 0.

CASE.json is the only argument; the result is a line of JSON on stdout of rank 0.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch import library as dispatcher

from v4sdk.backend import EngineConfig, ExpertExchange, Ranks
from v4sdk.expert_parallel.exchange import Compute, Exchange, GroupLink, expert_bounds
from v4sdk.expert_parallel.experts import Bound, shard
from v4sdk.numerics import Numerics, numerics
from v4sdk.ops import routed_experts
from v4sdk.ops.precision import activation_dtype, between_dtype
from v4sdk.presets import V4_FLASH
from v4sdk.weights import ExpertWeights, Weight, stack

CHOSEN = 3
LIMIT = 10.0
KEPT: list[dispatcher.Library] = []


def define(tables: list[str], plugin: str) -> None:
    """The vendor's ops with its own schemas, and as their kernels on the CPU the emulators, which a checkout's plugin has."""
    installed = importlib.import_module("v4sdk_ascend")
    if plugin not in installed.__path__:
        installed.__path__.append(plugin)
    emulators = importlib.import_module("v4sdk_ascend.testing.emulators")
    emulators.install(["cann_ops_transformer"])
    library = dispatcher.Library("npu", "DEF")
    for text in tables:
        library.define(text)
        name = text.partition("(")[0]
        library.impl(name, emulators.EMULATORS["npu", name], "CPU")
    # kernels last as long as the library
    KEPT.append(library)


def draw_experts(case: dict[str, Any]) -> ExpertWeights:
    """Random BF16 experts, the same on every rank."""
    random = torch.Generator().manual_seed(7)
    h, i = case["hidden"], case["inner"]

    def one(rows: int, cols: int) -> Weight:
        return Weight((torch.randn(rows, cols, generator=random) * cols**-0.5).to(torch.bfloat16))

    drawn = [(one(i, h), one(h, i), one(i, h)) for _ in range(case["experts"])]
    w1, w2, w3 = (tuple(ws) for ws in zip(*drawn, strict=True))
    return ExpertWeights(w1, w2, w3)


def packed(experts: ExpertWeights) -> ExpertWeights:
    """As a device's backend lays them out."""
    return ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))


def draw_tokens(case: dict[str, Any], chosen: Numerics) -> tuple[Tensor, Tensor, Tensor]:
    """The driver's rows, distinct experts and weights; exact cases have numbers of which every sum is exact in BF16."""
    random = torch.Generator().manual_seed(case["tokens"])
    tokens, experts = case["tokens"], case["experts"]
    ids = torch.rand(tokens, experts, generator=random).argsort(-1)[:, :CHOSEN].to(torch.int32)
    if case["exact"]:
        u = (torch.arange(tokens)[:, None] % 3 + 1).expand(-1, case["hidden"]).to(torch.bfloat16)
        return u, ids, torch.tensor([1.0, 2.0, 4.0]).expand(tokens, -1)
    u = torch.randn(tokens, case["hidden"], generator=random).to(activation_dtype(chosen))
    return u, ids, torch.rand(tokens, CHOSEN, generator=random)


def counting(first_expert: int) -> Compute:
    """In place of experts: every row times its weight times the number of its expert, counted from one over all ranks."""

    def compute(rows: Tensor, weights: Tensor, counts: list[int], first: int) -> Tensor:
        number = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) + first_expert + first + 1
        return rows.float() * weights[:, None] * number[:, None]

    return compute


def expected(case: dict[str, Any], tokens: tuple[Tensor, Tensor, Tensor], chosen: Numerics) -> Tensor:
    """What one process computes."""
    u, ids, weights = tokens
    if case["exact"]:
        return u.float() * (weights * (ids + 1)).sum(1, keepdim=True)
    return routed_experts(u, ids, weights, draw_experts(case), LIMIT, chosen)


def main(case: dict[str, Any]) -> None:
    """Exchange twice, and compare."""
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    define(case["schemas"], case["plugin"])
    ep = importlib.import_module("v4sdk_ascend.ep")
    chosen = numerics(case["numerics"])
    config = replace(
        V4_FLASH, hidden_size=case["hidden"], moe_intermediate_size=case["inner"], n_routed_experts=case["experts"],
        num_experts_per_tok=CHOSEN, expert_dtype=None, quantization=None,
    )  # fmt: skip
    bounds = expert_bounds(case["experts"], count)
    link = GroupLink(lambda: dist.group.WORLD)
    ranks = Ranks(rank, tuple(bounds), lambda: dist.group.WORLD, link.all_to_all)
    told: list[str] = []
    passed: dict[str, set[str]] = {}
    contract = importlib.import_module("v4sdk_ascend.contract")

    def note(key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        told.append(key)
        passed.setdefault(key, set()).update(contract.contract()[key].positional[: len(args)], kwargs)

    class Failing(contract.Vendor):  # type: ignore[name-defined, misc]
        """One function of the vendor's raises."""

        def call(self, key: str, *args: Any, **kwargs: Any) -> Any:
            if key == case["failing"]:
                raise RuntimeError("EZ9999: inner error")
            return super().call(key, *args, **kwargs)

    vendor = Failing([note])
    own = shard(draw_experts(case), 0, rank, count, packed if case["way"] == "mega_moe" else lambda e: e)
    bound = Bound(routed_experts, False, LIMIT, chosen)
    compute = counting(bounds[rank] + case["planted"]) if case["exact"] else bound.on(own)
    # one that does not name a way takes what the plan says for this chip
    plan = ep.Plan(case["way"], case["most"]) if case["way"] else None
    if case["weak_rank"] == rank:
        plan = ep.Plan("all_to_all", 0)
    buffer = SimpleNamespace(
        context=torch.zeros(1), ccl_buffer_size=1 << 20, max_recv_token_num=0, num_max_tokens_per_rank=case["most"],
        topo_type=None, rank_num_per_server=None,
    )  # fmt: skip
    exchange: ExpertExchange = ep.join(
        vendor, case["family"], torch.device("cpu"), Exchange(link, rank, bounds), ranks, config,
        EngineConfig(chosen), chosen=plan, name=lambda group, rank: "group", buffer=lambda *sizes: buffer,
    )  # fmt: skip
    tried = [*told]
    told.clear()
    u, ids, weights = tokens = draw_tokens(case, chosen)
    mine = slice(None) if rank == 0 else slice(0, 0)
    for _ in range(2):
        y = exchange.run(
            u[mine], ids[mine], weights[mine], compute, between_dtype(chosen), 1, experts=own, tokens=len(u)
        )
    if rank == 0:
        want = expected(case, tokens, chosen)
        off = float((y - want).abs().max()) if len(u) else 0.0
        same = y.dtype == want.dtype and torch.equal(y, want)
        result = {
            "off": off,
            "scale": float(want.abs().max()) if len(u) else 1.0,
            "equal": same,
            "calls": told,
            "tried": tried,
        }
        names = {key: sorted(found) for key, found in passed.items()}
        print(json.dumps({**result, "shape": list(y.shape), "passed": names}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
