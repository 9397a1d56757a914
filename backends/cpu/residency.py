"""Routed experts of a model larger than memory: mapped from disk, a bounded part of them in memory at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from v4sdk.backend import DoctorRow, ExpertPaging, PagingUsage
from v4sdk.numerics import Numerics
from v4sdk.weights import ExpertWeights, Weight

from .arguments import int64, pointer, structure
from .kernels import Library
from .residency_cache import ExpertCache, NativeCache, PlainCache
from .residency_layout import Interval, file_maps, lay_out

CAN_PAGE = sys.platform.startswith("linux")
# a step of so few rows is a decode step, of which each row equals the row alone: the rows are computed in groups. More rows are a
# prefill, where that would read every expert again for each group: the experts are taken in groups
_DECODE_ROWS = 32

ResidencyCall = structure("ResidencyCall", ("residency ids", pointer), ("layer count", int64))


@dataclass(frozen=True)
class PagedExperts(ExpertWeights):
    """Experts of a layer that may be on disk.

    Attributes:
        layer: their number in the cache.
    """

    layer: int = 0


class Residency(ExpertPaging):
    """The routed experts of one model.

    Args:
        budget_bytes: of experts in memory at once.
        native: the compiled library; None works without.
    """

    def __init__(self, budget_bytes: int, native: Library | None) -> None:
        self._budget, self._native = budget_bytes, native
        # their memory must not become anybody else's while pages of it may still be given back
        self._layers: list[ExpertWeights] = []
        self._cache: ExpertCache | None = None
        self._unit_bytes = 1

    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Leave a weight mapped, also where it would be computed faster wide."""
        return weight

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Leave the experts of a layer mapped and take note of them."""
        if self._cache is not None:
            raise RuntimeError(f"`{role}` comes after the first step")
        self._layers.append(experts)
        return PagedExperts(experts.w1, experts.w2, experts.w3, experts.packed, len(self._layers) - 1)

    def around(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give a `routed_experts` that has the chosen experts in memory when it calls `function`."""

        @wraps(function)
        def routed_experts(
            u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics,
            out: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            def run(u: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None) -> Tensor:
                result: Tensor = function(u, ids, weights, experts, limit, numerics, out=out)
                return result

            if not isinstance(experts, PagedExperts) or not ids.numel():
                return run(u, ids, weights, out)
            return self._paged(run, u, ids, weights, experts.layer, out)

        return routed_experts

    def usage(self) -> PagingUsage:
        """What has happened so far."""
        return PagingUsage(budget_bytes=self._budget) if self._cache is None else self._cache.usage()

    def residency_group(self) -> int:
        """How many experts of any layer may be in memory at once; at least one."""
        self._sealed()
        return max(1, self._budget // self._unit_bytes)

    def _paged(
        self, run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], u: Tensor, ids: Tensor, weights: Tensor,
        layer: int, out: Tensor | None,
    ) -> Tensor:  # fmt: skip
        group = self.residency_group()
        tokens, chosen = ids.shape
        if tokens * chosen <= group:
            self._need(layer, ids)
            return run(u, ids, weights, out)
        if out is None:
            out = torch.empty(u.shape, dtype=torch.promote_types(u.dtype, torch.float32), device=u.device)
        if tokens <= _DECODE_ROWS and chosen <= group:
            # which rows go together depends on shapes alone, so a recorded step can do it
            step = group // chosen
            for at in range(0, tokens, step):
                rows = slice(at, min(at + step, tokens))
                self._need(layer, ids[rows])
                run(u[rows], ids[rows], weights[rows], out[rows])
            return out
        return self._expert_groups(run, u, ids, weights, layer, group, out)

    def _expert_groups(
        self, run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], u: Tensor, ids: Tensor, weights: Tensor,
        layer: int, group: int, out: Tensor,
    ) -> Tensor:  # fmt: skip
        """Group by group in ascending expert id, each choice as a row of its own: the order of the sums stays."""
        present = torch.unique(ids)
        if len(present) <= group:
            self._need(layer, present.to(torch.int32))
            return run(u, ids, weights, out)
        out.zero_()
        for experts in torch.split(present, group):
            self._need(layer, experts.to(torch.int32))
            token, choice = torch.nonzero((ids >= experts[0]) & (ids <= experts[-1]), as_tuple=True)
            one = ids[token, choice]
            order = torch.argsort(one, stable=True)
            # all choices of as many tokens as the step has, so that a result is no larger than the whole's
            for part in torch.split(order, len(u)):
                at, pick = token[part], choice[part]
                found = run(
                    u[at], ids[at, pick][:, None].contiguous(), weights[at, pick][:, None].contiguous(), None
                )
                out.index_add_(0, at, found)
        return out

    def _need(self, layer: int, ids: Tensor) -> None:
        cache = self._sealed()
        if isinstance(cache, NativeCache) and self._native is not None and ids.dtype == torch.int32:
            ids = ids.contiguous()
            call = ResidencyCall(cache.handle, ids.data_ptr(), layer, ids.numel())
            self._native.run("residency", call, ids, cache)
        else:
            cache.need(layer, ids.flatten().tolist())

    def _sealed(self) -> ExpertCache:
        if self._cache is None:
            count = max((one.num_experts for one in self._layers), default=1)
            layout = lay_out((_intervals(one, e) for one in self._layers for e in range(count)), file_maps())
            self._unit_bytes = max([1, *(u.held_bytes for u in layout.units)])
            self._cache = (
                PlainCache(layout, count, self._budget)
                if self._native is None
                else NativeCache(self._native, layout, count, self._budget)
            )
        return self._cache


def doctor_row(native: Library | None) -> DoctorRow:
    """Whether models larger than memory run."""
    if not CAN_PAGE:
        return DoctorRow("expert paging", "not on this system: weights must fit into memory", ok=True)
    how = "in Python, outside a recorded step" if native is None else "compiled, inside a recorded step"
    return DoctorRow("expert paging", f"{how}; begins where a model does not fit", ok=True)


def _intervals(experts: ExpertWeights, index: int) -> list[Interval]:
    if index >= len(experts.w1):
        return []
    tensors = [
        t for w in experts.expert(index) for t in (w.data, w.scale) if t is not None and t.is_contiguous()
    ]
    return [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
