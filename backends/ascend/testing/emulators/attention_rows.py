"""What all attention stand-ins share: the softmax over listed rows with a sink, and queries and keys by layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .documented import refuse, want_contiguous, want_dtype
from .paged import Rows, equal, packed, paged

# queries at a time, so that their gathered rows stay small
QUERIES = 32


def softmax_rows(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Softmax over the rows each query sees; a sink joins the denominator alone.

    Shapes:
        q [Q, N, D], keys [Q, n, D], values [Q, n, V], seen [Q, n] bool, sinks [N] -> [Q, N, V]; all float32
    """
    logits = torch.where(seen[:, None], torch.einsum("qhd,qnd->qhn", q, keys) * scale, -torch.inf)
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else torch.full((*q.shape[:2], 1), -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks[:, None])
    top = torch.where(top == -torch.inf, 0.0, top)
    p = torch.exp(logits - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None] - top)
    values = torch.where(seen[..., None], values, 0.0)
    return torch.einsum("qhn,qnv->qhv", p, values) / total


def query_rows(q: Tensor, layout: str, bounds: Tensor | None, used: Tensor | None) -> Rows:
    if layout == "TND":
        refuse(q.dim() != 3, f"TND queries have 3 dims, got {q.dim()}")
        return packed("q", q, bounds, used)
    refuse(layout != "BSND" or q.dim() != 4, f"layout `{layout}` of a query with {q.dim()} dims")
    return equal("q", q, used)


def index_rows(indices: Tensor, layout: str) -> Tensor:
    """[T, 1, K] or [B, S, 1, K] as rows [.., K] in the order of queries."""
    want_dtype("sparse indices", indices, torch.int32)
    want_contiguous(indices=indices)
    refuse(
        indices.dim() != (3 if layout == "TND" else 4) or indices.shape[-2] != 1,
        f"indices are {list(indices.shape)}",
    )
    return indices.flatten(0, -3)[:, 0]


def kv_rows(
    name: str, kv: Tensor, layout: str, bounds: Tensor | None, used: Tensor | None, table: Tensor | None,
    lengths: tuple[int, ...] | None = None,
) -> Rows:  # fmt: skip
    if layout == "TND":
        refuse(kv.dim() != 3, f"TND {name} has 3 dims, got {kv.dim()}")
        return packed(name, kv, bounds, used)
    refuse(kv.dim() != 4, f"{name} has {kv.dim()} dims, documented are 4")
    if layout.startswith("PA_"):
        return paged(name, kv, table, used, lengths)
    return equal(name, kv, used)
