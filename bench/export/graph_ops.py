"""Three ops in the form a graph of unknown length needs: no loop over blocks of queries, no value read on the host.

The references walk through long prompts in blocks, read lengths on the host and order scores by their bits, none of which a
static graph can hold. These compute the same from shapes alone, for one sequence from an empty state in `exact`
numerics; every other op of an exported model is traced from its reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.compressor import index_scores
from v4sdk.ops.op import OpTable
from v4sdk.weights import ExpertWeights

_ABSENT = torch.iinfo(torch.int32).max


def sparse_attn(
    q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch, sink: Tensor,
    ratio: int, rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """Attend as the op `sparse_attn`, with one mask [T, T] over all tokens in place of blocks of queries.

    Shapes:
        as the op's; kv [W + T, D], of which the first W are the empty ring; entries lie in order, their last page is scratch
    """
    length, scale = window.shape[1], q.shape[-1] ** -0.5
    position = batch.positions.long()[:, None]  # [T, 1]
    # positions begin at 0, so they are also the numbers of the rows
    row = batch.positions.long()[None]
    own = kv[length:]
    parts = [_masked(q @ own.T * scale, (row <= position) & (row > position - length))]
    if entries is not None and picks is None:
        every = entries[:-1].flatten(0, 1)
        seen = torch.arange(every.shape[0]) < (position + 1) // ratio
        parts.append(_masked(q @ every.T * scale, seen))
    elif entries is not None and picks is not None:
        # an absent pick reads the first entry, which its weight of zero then leaves out
        every = entries[:-1].flatten(0, 1)[picks.long().clamp_min(0)]  # [T, K, D]
        parts.append(_masked(q @ every.transpose(1, 2) * scale, picks >= 0))
    logits = torch.cat(parts, -1)
    top = logits.amax(-1, keepdim=True)
    p = torch.exp(logits - top)
    total = p.sum(-1, keepdim=True) + torch.exp(sink[None, :, None] - top)
    num_own = own.shape[0]
    out = p[..., :num_own] @ own
    if entries is not None:
        out = out + p[..., num_own:] @ every
    return out / total


def _masked(logits: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen[:, None], logits, -torch.inf)


def index_topk(
    q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
) -> Tensor:
    """Pick as the op `index_topk`, by one stable sort of all scores, which gives ties to the lowest entry.

    Shapes:
        as the op's; keys lie in order, their last page is scratch
    """
    every = keys[:-1].flatten(0, 1)
    visible = torch.arange(every.shape[0]) < ((batch.positions.long() + 1) // ratio)[:, None]
    scores = torch.where(visible, index_scores(q, w, every, numerics), -torch.inf)
    # there may be fewer entries than picks
    scores = F.pad(scores, (0, topk), value=-torch.inf)
    ordered, entry = torch.sort(scores, dim=-1, descending=True, stable=True)
    picked = torch.where(ordered[:, :topk] == -torch.inf, _ABSENT, entry[:, :topk]).sort(-1).values
    return torch.where(picked == _ABSENT, -1, picked).to(torch.int32)


def routed_experts(
    u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, limit: float, numerics: Numerics
) -> Tensor:
    """Sum as the op `routed_experts`, every expert on every token, with weight 0 where it was not chosen.

    That is E / K times the arithmetic, for a graph in which no shape depends on a value.

    Shapes:
        as the op's; experts are stacked
    """
    if experts.packed is None:
        raise ValueError("experts of an exported graph are stacked")
    w1, w2, w3 = (stack.data.transpose(1, 2) for stack in experts.packed)
    share = (F.one_hot(ids.long(), w1.shape[0]) * weights[..., None]).sum(1)  # [T, E]
    gate, value = (u @ w1).clamp(max=limit), (u @ w3).clamp(-limit, limit)  # [E, T, I]
    return (F.silu(gate) * value * share.T[..., None] @ w2).sum(0)


GRAPH_OPS = OpTable({f.__name__: f for f in (sparse_attn, index_topk, routed_experts)})
