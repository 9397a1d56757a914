"""What the ranks do with an exchange: the driver's op in place of `routed_experts`, and the loop of those that serve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from v4sdk.backend import Backend, Binding, EngineConfig, ExchangeBroken, ExpertExchange, Ranks
from v4sdk.config import ModelConfig
from v4sdk.errors import ConfigError, V4Error
from v4sdk.expert_parallel.exchange import Compute, Exchange, GroupLink, expert_bounds
from v4sdk.expert_parallel.team import Dismissed, Team
from v4sdk.numerics import Numerics
from v4sdk.ops import routed_experts
from v4sdk.ops.op import copy_out
from v4sdk.ops.precision import between_dtype
from v4sdk.weights import ExpertWeights

# the experts of a rank in this many parts at most: two transfers hide behind the parts between the first and the last
WAVES = 4
# a wave of fewer rows costs more in messages than it hides
_ROWS_PER_WAVE = 16


@dataclass(frozen=True)
class ExpertShard(ExpertWeights):
    """The experts of one layer that this rank owns, numbered from 0.

    Attributes:
        layer: of the model.
    """

    layer: int = 0


def shard(
    experts: ExpertWeights, layer: int, rank: int, processes: int,
    prepare: Callable[[ExpertWeights], ExpertWeights],
) -> ExpertShard:  # fmt: skip
    """Keep one rank's experts of a layer; nothing of the others is read."""
    bounds = expert_bounds(experts.num_experts, processes)
    mine = slice(bounds[rank], bounds[rank + 1])
    own = prepare(ExpertWeights(experts.w1[mine], experts.w2[mine], experts.w3[mine]))
    return ExpertShard(own.w1, own.w2, own.w3, own.packed, layer)


@dataclass(frozen=True)
class Bound:
    """The function a backend bound for `routed_experts`, used on the experts of one rank.

    Attributes:
        in_one_call: it is a kernel, which takes many experts at once. The reference gets one expert at a time: among many it
            would write every row of the result once per expert.
    """

    function: Callable[..., Tensor]
    in_one_call: bool
    limit: float
    numerics: Numerics

    @classmethod
    def of(cls, binding: Binding, limit: float, numerics: Numerics) -> Bound:
        """Take it out of a binding, before the driver's op replaces it."""
        how = next(b.how for b in binding.ops if b.op == routed_experts.name)
        return cls(binding.table[routed_experts], how == "kernel", limit, numerics)

    def on(self, experts: ExpertWeights) -> Compute:
        """Compute rows that each go to one expert: to the op, every row is a token with a single choice."""

        def call(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            return self.function(rows, ids[:, None], weights[:, None], experts, self.limit, self.numerics)

        def compute(rows: Tensor, weights: Tensor, counts: list[int], first: int) -> Tensor:
            if not len(rows):
                return rows.new_empty(rows.shape)
            last = first + len(counts)
            ids = torch.arange(first, last, dtype=torch.int32, device=rows.device)
            ids = ids.repeat_interleave(torch.tensor(counts, device=rows.device))
            if self.in_one_call:
                return call(rows, weights, ids)
            ends = list(accumulate(counts))
            spans = [slice(end - count, end) for count, end in zip(counts, ends, strict=True) if count]
            return torch.cat([call(rows[s], weights[s], ids[s]) for s in spans])

        return compute


def exchange_by(backend: Backend, team: Team, config: ModelConfig, engine: EngineConfig) -> ExpertExchange:
    """How the ranks exchange, once they are connected: as the backend does, or rows by all-to-all."""
    link = GroupLink(lambda: team.group)
    bounds = expert_bounds(config.n_routed_experts, team.processes)
    ranks = Ranks(team.rank, tuple(bounds), lambda: team.group, link.all_to_all)
    return backend.exchange_experts(Exchange(link, team.rank, bounds), ranks, config, engine)


class DistributedExperts:
    """The driver's `routed_experts`: same arguments and, in reference numerics, the same bits; the experts lie elsewhere."""

    def __init__(self, team: Team, bound: Bound, num_experts: int, exchange: ExpertExchange) -> None:
        self._team, self._bound, self._exchange = team, bound, exchange
        self._most_waves = min(WAVES, num_experts // team.processes) if team.schedule == "waves" else 1

    def __call__(
        self, u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See the op `routed_experts`.

        Raises:
            RankLost: if a rank is gone.
        """
        assert isinstance(experts, ExpertShard)
        waves = max(1, min(self._most_waves, ids.numel() // _ROWS_PER_WAVE))
        dtype = str(u.dtype).removeprefix("torch.")
        self._team.tell(
            {
                "do": "run",
                "layer": experts.layer,
                "waves": waves,
                "dtype": dtype,
                "width": u.shape[1],
                "tokens": len(u),
                "chosen": ids.shape[1],
            },
            at=f"layer {experts.layer}",
        )
        try:
            compute = self._bound.on(experts)
            y = self._exchange.run(
                u, ids, weights, compute, between_dtype(numerics), waves, experts=experts, tokens=len(u)
            )
        except ExchangeBroken as exc:
            raise self._team.failed(cause=exc) from exc
        except BaseException:
            self._team.interrupted()
            raise
        return y if out is None else copy_out(out, y)


def unrecorded(backend: Backend) -> Backend:
    """The same backend, whose decode steps run as they are: each layer's counts are read on the host, which no recording can."""
    plain = copy.copy(backend)
    plain.record = lambda step: step  # type: ignore[method-assign]
    return plain


@dataclass(frozen=True)
class Share:
    """What a serving rank has loaded.

    Attributes:
        facts: must be the driver's own. layers: this rank's experts of each layer. exchange: made once connected.
    """

    facts: Mapping[str, Any]
    layers: list[ExpertShard]
    bound: Bound
    device: torch.device
    exchange: Callable[[Team], ExpertExchange]


def drive(team: Team, facts: Mapping[str, Any], device: torch.device) -> None:
    """Wait until every rank has loaded its share, and connect.

    Raises:
        RankLost: if one is gone or could not load. ConfigError: if one loaded something else.
    """
    for rank in range(1, team.processes):
        found = team.hear(rank)["ready"]
        for name, value in facts.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"rank {rank} runs with {name} `{found.get(name)}`, rank 0 with `{value}`",
                    hint="start every rank with the same command, and the same files",
                )
    team.tell({"do": "connect"})
    team.connect(device)


def serve(team: Team, open_share: Callable[[], Share]) -> None:
    """Load when the driver says so, then compute what it asks for; returns when it stops.

    Raises:
        RankLost: if another rank is gone. V4Error: if the share cannot be loaded; the driver then reports it too.
    """
    try:
        team.hear()
        _serve(team, open_share())
    except Dismissed as done:
        # the team keeps it, and its frames would keep this share
        done.__traceback__ = None
    except V4Error as exc:
        team.close(exc.message)
        raise
    except BaseException as exc:
        team.close(f"{type(exc).__name__}: {exc}")
        raise
    team.close()


def _serve(team: Team, share: Share) -> NoReturn:
    team.tell({"ready": dict(share.facts)})
    exchange: ExpertExchange | None = None
    numerics = share.bound.numerics
    with torch.inference_mode():
        while True:
            asked = team.hear()
            if asked["do"] == "connect":
                team.connect(share.device)
                exchange = share.exchange(team)
                continue
            assert exchange is not None
            nothing = torch.empty(
                0, asked["width"], dtype=getattr(torch, asked["dtype"]), device=share.device
            )
            ids = torch.empty(0, asked["chosen"], dtype=torch.int32, device=share.device)
            weights = torch.empty(0, asked["chosen"], device=share.device)
            layer = share.layers[asked["layer"]]
            try:
                exchange.run(
                    nothing, ids, weights, share.bound.on(layer), between_dtype(numerics), asked["waves"],
                    experts=layer, tokens=asked["tokens"],
                )  # fmt: skip
            except ExchangeBroken as exc:
                raise team.failed(cause=exc) from exc
