"""Routing by vllm-ascend, the only pack whose gate has this model's square root of softplus."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig

from ..chip import Family
from . import Calls, narrow

_SQRT_SOFTPLUS = 2


def route(
    to: Calls, u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As the op, except that equal scores may be chosen in another order."""
    return _gate(to, u, gate, num_experts_per_tok, scale, bias=bias.float())


def route_hash(
    to: Calls, u: Tensor, gate: Tensor, tid2eid: Tensor, token_ids: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As the op. The kernel wants an int32 table; of the checkpoint's int64 one only the rows of these tokens are converted."""
    chosen = tid2eid[token_ids].to(torch.int32)
    rows = torch.arange(len(u), device=u.device)
    return _gate(to, u, gate, tid2eid.shape[1], scale, input_ids=rows, tid2eid=chosen)


def _gate(to: Calls, u: Tensor, gate: Tensor, k: int, scale: float, **how: Tensor) -> tuple[Tensor, Tensor]:
    # float32 end to end: routing flips dominate every other divergence
    weights, ids, _ = to(
        "_C_ascend.moe_gating_top_k_hash", u.float() @ gate.float().T, k, **how, k_group=1, group_count=1,
        routed_scaling_factor=scale, eps=1e-20, group_select_mode=0, renorm=0, norm_type=_SQRT_SOFTPLUS, out_flag=False,
    )  # fmt: skip
    return ids, weights


def unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """At most 64 chosen experts."""
    if config.num_experts_per_tok > 64:
        return f"{config.num_experts_per_tok} experts per token, and its document knows 64 at most"
    return narrow(config, engine, family)
