"""The vendor's exchanges behind v4sdk's interface: the driver's tokens are spread over the ranks, exchanged, and brought back.

The vendor's functions want every rank to bring tokens, as many as any other; in v4sdk only the driver has some. So each step
first gives every rank an equal share. What is missing to equal shares are copies of the last token, which ask no further expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import ExchangeBroken, ExpertExchange, Ranks
from v4sdk.config import ModelConfig
from v4sdk.errors import V4Error
from v4sdk.weights import ExpertWeights

from .chip import Family
from .contract import Vendor

Compute = Callable[[Tensor, Tensor, list[int], int], Tensor]

# how torch_npu's exchange is to go: between all ranks directly
COMM_ALG: Mapping[Family, str] = {"910B": "fullmesh", "910C": ""}
_COLUMNS = 32


def carried_width(hidden: int, chosen: int) -> int:
    """Columns of a row that carries its token's experts and weights, two BF16 columns for each number, in multiples of 32."""
    return hidden + -(-4 * chosen // _COLUMNS) * _COLUMNS


def with_choices(u: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Put the bits of experts and weights behind each row: [T, H] BF16 -> [T, carried_width] BF16."""
    numbers = torch.cat((ids.to(torch.int32), weights.float().contiguous().view(torch.int32)), 1).contiguous()
    row = torch.zeros(len(u), carried_width(u.shape[1], ids.shape[1]), dtype=torch.bfloat16, device=u.device)
    row[:, : u.shape[1]] = u
    row[:, u.shape[1] : u.shape[1] + 2 * numbers.shape[1]] = numbers.view(torch.bfloat16)
    return row


def choices(rows: Tensor, hidden: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Read them again: ids [R, K] int32 and weights [R, K] float32."""
    numbers = rows[:, hidden : hidden + 4 * chosen].contiguous().view(torch.int32)
    return numbers[:, :chosen], numbers[:, chosen:].contiguous().view(torch.float32)


class Spread:
    """Gives every rank an equal share of the driver's tokens, and the driver the results.

    Args:
        most: tokens of a rank in one call; longer steps take several.
    """

    def __init__(self, ranks: Ranks, most: int) -> None:
        self._ranks, self._most = ranks, most
        self.count = len(ranks.bounds) - 1

    def run(
        self, u: Tensor, ids: Tensor, weights: Tensor, tokens: int,
        exchange: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """Call `exchange` on equal shares [t, H] BF16, [t, K] int32, [t, K] float32 of every rank, which gives [t, H] BF16.

        Shapes:
            u [T, H], ids [T, K] int, weights [T, K] f32 -> [T, H] float32; T is 0 on every rank but the driver
        Raises:
            V4Error: an expert is chosen twice for one token, which the vendor does not admit.
        """
        if self._ranks.rank == 0:
            _refuse_twice(ids)
        hidden, chosen, step = u.shape[1], ids.shape[1], self._most * self.count
        parts = []
        for first in range(0, tokens, step):
            here = slice(first, first + step)
            share = -(-min(step, tokens - first) // self.count)
            rows = with_choices(u[here].to(torch.bfloat16), ids[here], weights[here])
            mine = self._out(rows, share)
            y = exchange(mine[:, :hidden].contiguous(), *choices(mine, hidden, chosen))
            parts.append(self._back(y.contiguous(), share)[: len(rows)])
        return torch.cat(parts).float() if parts else torch.zeros(u.shape, device=u.device)

    def _out(self, rows: Tensor, share: int) -> Tensor:
        if self._ranks.rank == 0:
            rows = torch.cat((rows, rows[-1:].expand(share * self.count - len(rows), -1)))
        sent = [share if self._ranks.rank == 0 else 0] * self.count
        return self._move(rows, [share] + [0] * (self.count - 1), sent)

    def _back(self, y: Tensor, share: int) -> Tensor:
        received = [share if self._ranks.rank == 0 else 0] * self.count
        return self._move(y, received, [share] + [0] * (self.count - 1))

    def _move(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        room = rows.new_empty(sum(received), rows.shape[1])
        # bytes: not every transport adds what it moves, but some look at the dtype
        handle = self._ranks.all_to_all(
            room.view(torch.uint8), rows.contiguous().view(torch.uint8), received, sent
        )
        handle.wait()
        return room


class DispatchCombine:
    """torch_npu's `npu_moe_distribute_dispatch_v2` and `.._combine_v2`, with the experts of this backend between them.

    Rows carry their token's experts and weights, so that the weight enters before the second product, as everywhere in v4sdk;
    combine then sums with weights of one. Steps longer than one call's tokens take v4sdk's own exchange, in waves.

    Args:
        family: of this rank's chip. most: tokens of a rank in one call. plain: v4sdk's own exchange. group: HCCL's name for one
            in which nothing else runs.
    """

    def __init__(
        self, vendor: Vendor, family: Family, ranks: Ranks, config: ModelConfig, most: int, plain: ExpertExchange,
        group: str,
    ) -> None:  # fmt: skip
        self._vendor, self._family, self._ranks, self._plain = vendor, family, ranks, plain
        self._config, self._group = config, group
        self._longest = most * (len(ranks.bounds) - 1)
        self._spread = Spread(ranks, most)

    def run(
        self, u: Tensor, ids: Tensor, weights: Tensor, compute: Compute, back: torch.dtype, waves: int = 1, *,
        experts: ExpertWeights | None = None, tokens: int = 0,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.backend.ExpertExchange`; single results travel in BF16 whatever `back` is."""
        if tokens > self._longest:
            return self._plain.run(u, ids, weights, compute, back, waves, experts=experts, tokens=tokens)
        return self._spread.run(u, ids, weights, tokens, lambda a, b, c: self.exchange(a, b, c, compute))

    def trial(self, device: torch.device) -> None:
        """Exchange one token of every rank, before anything depends on it; raises whatever the vendor raises."""
        zeros = self.exchange(*_trial_token(self._config, device), lambda rows, *_: torch.zeros_like(rows))
        _wait(zeros)

    def exchange(self, u: Tensor, ids: Tensor, weights: Tensor, compute: Compute) -> Tensor:
        """One call of each: equal shares u [t, H] BF16, ids [t, K] int32, weights [t, K] float32 -> [t, H] BF16."""
        hidden, chosen = u.shape[1], ids.shape[1]
        ones = torch.ones_like(weights)
        where = (self._group, self._spread.count, self._ranks.rank, self._config.n_routed_experts)
        # 910B's combine wants weights that came with the rows; 910C's dispatch takes none, but has counts of another group
        is_910b = self._family == "910B"
        scales = {"expert_scales": ones} if is_910b else {}
        same: dict[str, Any] = {
            "shared_expert_num": 1, "shared_expert_rank_num": 0, "global_bs": 0, "comm_alg": COMM_ALG[self._family],
        }  # fmt: skip
        rows, _, info, counts, received, tp_received, row_scales = self._call(
            "npu.npu_moe_distribute_dispatch_v2", with_choices(u, ids, weights), ids.contiguous(), *where, **scales,
            quant_mode=0, expert_token_nums_type=1, **same,
        )  # fmt: skip
        found = torch.zeros_like(rows)
        per_expert = counts.tolist()
        used = sum(per_expert)
        if used:
            first = self._ranks.bounds[self._ranks.rank]
            own = torch.arange(first, first + len(per_expert), device=rows.device, dtype=torch.int32)
            expert = own.repeat_interleave(counts, output_size=used)
            row_ids, row_weights = choices(rows[:used], hidden, chosen)
            factor = torch.where(row_ids == expert[:, None], row_weights, 0.0).sum(1)
            made = compute(rows[:used, :hidden].contiguous(), factor, per_expert, 0)
            found[:used, :hidden] = made.to(rows.dtype)
        combined: Tensor = self._call(
            "npu.npu_moe_distribute_combine_v2", found, ids.contiguous(), info, received, ones, *where,
            tp_send_counts=None if is_910b else tp_received, expand_scales=row_scales if is_910b else None, **same,
        )  # fmt: skip
        return combined[:, :hidden]

    def _call(self, key: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._vendor.call(key, *args, **kwargs)
        except RuntimeError as exc:
            raise ExchangeBroken(str(exc)) from exc


class MegaMoe:
    """The transformer pack's `mega_moe`: exchange, both products, the gate and the weighted sum in one call, for BF16 experts.

    The weight enters after the second product, and the gate is clamped on both sides, where v4sdk clamps it from above: a gate
    below -limit gives silu(-limit), which at the model's limit of 10 is -0.00045.

    Args:
        most: tokens of a rank in one call. buffer: the memory that all ranks share, made for that many.
    """

    def __init__(self, vendor: Vendor, ranks: Ranks, config: ModelConfig, most: int, buffer: Any) -> None:
        self._vendor, self._ranks, self._config, self._buffer = vendor, ranks, config, buffer
        self._spread = Spread(ranks, most)
        # with the experts themselves, so that no others get their number
        self._matrices: dict[int, tuple[ExpertWeights, list[Tensor], list[Tensor]]] = {}

    def run(
        self, u: Tensor, ids: Tensor, weights: Tensor, compute: Compute, back: torch.dtype, waves: int = 1, *,
        experts: ExpertWeights | None = None, tokens: int = 0,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.backend.ExpertExchange`; `compute` is not called."""
        assert experts is not None
        both, out = self._laid_out(experts)
        return self._spread.run(u, ids, weights, tokens, lambda a, b, c: self._exchange(a, b, c, both, out))

    def _laid_out(self, experts: ExpertWeights) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's matrices as the call wants them, [H, 2 * I] and [I, H] each; the layout they came in is given up."""
        if id(experts) not in self._matrices:
            assert experts.packed is not None
            w1, w2, w3 = (weight.data for weight in experts.packed)
            both = [
                torch.cat((gate, up)).t().to(torch.bfloat16).contiguous()
                for gate, up in zip(w1, w3, strict=True)
            ]
            out = [matrix.t().to(torch.bfloat16).contiguous() for matrix in w2]
            for data in (w1, w2, w3):
                # two layouts of all experts do not fit beside each other
                data.set_()  # type: ignore[call-overload]
            self._matrices[id(experts)] = experts, both, out
        return self._matrices[id(experts)][1:]

    def trial(self, device: torch.device) -> None:
        """As `DispatchCombine.trial`; matrices of zeros, one for all experts, while those of the model keep their layout."""
        hidden, inner = self._config.hidden_size, self._config.moe_intermediate_size
        bounds = self._ranks.bounds
        count = bounds[self._ranks.rank + 1] - bounds[self._ranks.rank]
        both = torch.zeros(hidden, 2 * inner, dtype=torch.bfloat16, device=device)
        out = torch.zeros(inner, hidden, dtype=torch.bfloat16, device=device)
        _wait(self._exchange(*_trial_token(self._config, device), [both] * count, [out] * count))

    def _exchange(
        self, u: Tensor, ids: Tensor, weights: Tensor, both: list[Tensor], out: list[Tensor]
    ) -> Tensor:
        b = self._buffer
        try:
            y, _ = self._vendor.call(
                "cann_ops_transformer.npu_mega_moe", b.context, u, ids.contiguous(), weights.contiguous(), both, out,
                self._config.n_routed_experts, self._spread.count, b.ccl_buffer_size,
                max_recv_token_num=b.max_recv_token_num, dispatch_quant_mode=0, combine_quant_mode=0, comm_alg="",
                num_max_tokens_per_rank=b.num_max_tokens_per_rank, activation="swiglu",
                activation_clamp=self._config.swiglu_limit, topo_type=b.topo_type, rank_num_per_server=b.rank_num_per_server,
            )  # fmt: skip
        except RuntimeError as exc:
            raise ExchangeBroken(str(exc)) from exc
        result: Tensor = y
        return result


def _trial_token(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    chosen = config.num_experts_per_tok
    u = torch.zeros(1, config.hidden_size, dtype=torch.bfloat16, device=device)
    ids = torch.arange(chosen, dtype=torch.int32, device=device)[None]
    return u, ids, torch.ones(1, chosen, device=device)


def _wait(result: Tensor) -> None:
    """What a device reports late, it reports at the latest when a value is read."""
    result.cpu()


def _refuse_twice(ids: Tensor) -> None:
    ordered = ids.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise V4Error(
            "an expert is chosen twice for one token, which the vendor's exchange does not admit",
            hint="use --numerics reference, whose exchange admits it",
        )
