"""How far two models' logits are from each other, in numbers, by position, and in words.

Positions are told apart where something new begins to be computed: the first compressed entry (4), the second, whose
block overlaps the first (8), the first entry of the heavily compressed layers (128), and the point from which the indexer
has more entries than it may pick.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.errors import ShapeError

Verdict = Literal["same model", "same within precision", "drifted", "different model"]
VERDICTS: tuple[Verdict, ...] = ("same model", "same within precision", "drifted", "different model")
Tier = Literal["exact", "float32", "bf16", "quantised", "drifted", "different"]

# The tiers, from measurements of several engines on the same weights: an engine against itself moves 3e-4 to 8e-4, BF16
# arithmetic stays below 2e-3, quantised weights below 1e-2, a wrong equation starts at 0.1. `bench/parity/calibration.py` plants
# roundings and mistakes in a trained model and shows on which side of these they fall.
FLOAT32_RELATIVE = 1e-5
BF16_MEAN_KL = 2e-3
QUANTISED_MEAN_KL = 1e-2
DIFFERENT_MEAN_KL = 5e-2
# between two runs without roundings: what chunks and decode steps of one engine may differ by, and ten times that
EXACT_SAME_RELATIVE = 1e-4
EXACT_DRIFTED_RELATIVE = 1e-3
# two builds with the same roundings (numerics `fast`), over any text: another order of summation measured 2e-4 on v4-nano,
# chunks of one engine 7e-4, kernels that keep BF16 roundings between the parts of an op 1.1e-3, the smallest planted mistake
# 4.5e-3
SAME_ROUNDINGS_MEAN_KL = 2e-3

TOP = 5
BUCKETS = ("0-3", "4-7", "8-127", "128-131", "to the top-k limit", "beyond")
# rows of logits that are widened to float64 at a time: 129,280 scores of 128 rows take 132 MB
_ROWS = 128


@dataclass(frozen=True)
class Agreement:
    """Logits of a model against those of a reference, over the same positions.

    Attributes:
        positions: rows compared. max_abs: largest difference of a logit. relative_l2: |a - b| / |b| over all of them.
        cosine_min: smallest cosine of a row. kl_mean, kl_p99, kl_max: KL(reference || other) in nats.
        top1: share of rows with the same best token. top5: mean share of the five best that both have.
    """

    positions: int
    max_abs: float
    relative_l2: float
    cosine_min: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    top5: float

    def values(self) -> dict[str, float | int]:
        """The numbers by name, as a row holds them."""
        return asdict(self)


def agreement(reference: Tensor, other: Tensor) -> Agreement:
    """Compare logits in float64.

    Shapes:
        reference, other [T, V], T at least 1

    Raises:
        ShapeError: if the shapes differ or there is nothing to compare.
    """
    if reference.shape != other.shape or reference.dim() != 2 or not reference.numel():
        raise ShapeError(
            f"logits of {list(other.shape)} cannot be compared with {list(reference.shape)}, expected equal [T, V]"
        )
    kl, cosine, top1, top5, largest = [], [], [], [], []
    apart = size = 0.0
    for b, a in _in_float64(reference, other):
        kl.append(divergence(b, a))
        cosine.append(torch.cosine_similarity(a, b, dim=-1))
        top1.append(a.argmax(-1) == b.argmax(-1))
        top5.append(_overlap(a, b))
        largest.append((a - b).abs().max())
        apart += float((a - b).square().sum())
        size += float(b.square().sum())
    every = torch.cat(kl)
    return Agreement(
        positions=reference.shape[0],
        max_abs=float(torch.stack(largest).max()),
        relative_l2=math.sqrt(apart / size) if size else math.inf if apart else 0.0,
        cosine_min=float(torch.cat(cosine).min()),
        kl_mean=float(every.mean()),
        kl_p99=float(every.quantile(0.99)),
        kl_max=float(every.max()),
        top1=float(torch.cat(top1).double().mean()),
        top5=float(torch.cat(top5).mean()),
    )


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row of logits [T, V] -> [T], in float64, never below 0."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    # below 0 only by rounding, where both are the same
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def relative_l2(other: Tensor, reference: Tensor) -> float:
    """|a - b| / |b| in float64; 0 where both are 0."""
    a, b = other.detach().cpu().double(), reference.detach().cpu().double()
    apart, size = float((a - b).norm()), float(b.norm())
    return apart / size if size else math.inf if apart else 0.0


def cosine_min(other: Tensor, reference: Tensor) -> float:
    """Smallest cosine of a row, over tensors [T, ...]; rows that are 0 on both sides agree."""
    a, b = (t.detach().cpu().double().reshape(t.shape[0], -1) for t in (other, reference))
    both = (a == 0).all(-1) & (b == 0).all(-1)
    cosine = torch.cosine_similarity(a, b, dim=-1).masked_fill(both, 1.0)
    return float(cosine.min()) if cosine.numel() else 1.0


@dataclass(frozen=True)
class Bucket:
    """Positions first..last (inclusive; None has no end) under a name."""

    name: str
    first: int
    last: int | None

    def holds(self, positions: Tensor) -> Tensor:
        """Which of `positions` [T] lie inside."""
        inside = positions >= self.first
        return inside if self.last is None else inside & (positions <= self.last)


def top_k_limit(config: ModelConfig) -> int | None:
    """Tokens up to which every CSA entry is picked, whatever the indexer says; None without a CSA layer."""
    ratios = [layer.ratio for layer in config.layers if layer.kind == "csa"]
    return config.index_topk * min(ratios) if ratios else None


def buckets(config: ModelConfig) -> tuple[Bucket, ...]:
    """The named buckets, the same for every model; one that the top-k limit cuts is also given in its two parts."""
    limit = top_k_limit(config)
    named = [Bucket("0-3", 0, 3), Bucket("4-7", 4, 7), Bucket("8-127", 8, 127), Bucket("128-131", 128, 131)]
    cut = next((b for b in named if limit is not None and b.last and b.first < limit <= b.last), None)
    if cut is not None and limit is not None and cut.last is not None:
        parts = (
            Bucket(f"{cut.first}-{limit - 1}", cut.first, limit - 1),
            Bucket(f"{limit}-{cut.last}", limit, cut.last),
        )
        named[named.index(cut) + 1 : named.index(cut) + 1] = parts
    after = 132 if limit is None else max(132, limit)
    return (*named, Bucket("to the top-k limit", 132, after - 1), Bucket("beyond", after, None))


def by_bucket(
    reference: Tensor, other: Tensor, config: ModelConfig, positions: Tensor | None = None
) -> dict[str, Agreement]:
    """Compare by position; a bucket without positions is left out.

    Args:
        positions: of each row [T]; 0, 1, 2, ... by default.
    """
    at = torch.arange(reference.shape[0]) if positions is None else positions.cpu()
    found = {}
    for bucket in buckets(config):
        rows = bucket.holds(at).nonzero().flatten()
        if rows.numel():
            found[bucket.name] = agreement(reference[rows.to(reference.device)], other[rows.to(other.device)])
    return found


def tier(found: Agreement) -> Tier:
    """The strictest tier that holds; NaN is in none but the last."""
    if found.max_abs == 0.0:
        return "exact"
    if found.relative_l2 <= FLOAT32_RELATIVE:
        return "float32"
    for name, limit in _KL_TIERS:
        if found.kl_mean <= limit:
            return name
    return "different"


_KL_TIERS: tuple[tuple[Tier, float], ...] = (
    ("bf16", BF16_MEAN_KL),
    ("quantised", QUANTISED_MEAN_KL),
    ("drifted", DIFFERENT_MEAN_KL),
)
_EXACT_LIMITS: tuple[tuple[Verdict, float], ...] = (
    ("same within precision", EXACT_SAME_RELATIVE),
    ("drifted", EXACT_DRIFTED_RELATIVE),
)


def verdict(found: Agreement, same_backend: bool = False, rounded: bool = True) -> Verdict:
    """The tier in words.

    Args:
        same_backend: both sides are the same build with the same options, from which equal bits are expected: then a
            difference of float32 noise is already `same within precision`.
        rounded: a side rounds. If neither does, only the order of summation is left to differ, and no KL excuses more.
    """
    reached = tier(found)
    if reached == "exact" or (reached == "float32" and not same_backend):
        return "same model"
    if not rounded:
        for words, limit in _EXACT_LIMITS:
            if found.relative_l2 <= limit:
                return words
        return "different model"
    if reached in ("float32", "bf16", "quantised"):
        return "same within precision"
    return "drifted" if reached == "drifted" else "different model"


def overall(*verdicts: Verdict) -> Verdict:
    """The worst of several."""
    return max(verdicts, key=VERDICTS.index)


def _in_float64(reference: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for at in range(0, reference.shape[0], _ROWS):
        yield (
            reference[at : at + _ROWS].detach().cpu().double(),
            other[at : at + _ROWS].detach().cpu().double(),
        )


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Share of the best few of each row that both have, [T]."""
    k = min(TOP, a.shape[-1])
    mine, theirs = a.topk(k).indices, b.topk(k).indices
    return (mine[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
