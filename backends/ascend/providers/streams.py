"""Hyper-connections by each pack.

The vendors' h_res is our comb: [source stream, destination stream], whose write-back multiplies by its transpose.
"""

from __future__ import annotations

from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig

from ..chip import Family
from . import Calls, rounded

Mixed = tuple[Tensor, Tensor, Tensor]
_C_HIDDEN = (4096,)
_SINKHORN = 20


def transformer_pre(
    to: Calls, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float
) -> Mixed:  # fmt: skip
    """As the op, by cann_ops_transformer, with the tokens as one sequence."""
    m = x.shape[1]
    key = "cann_ops_transformer.mhc_pre_sinkhorn"
    u, post, comb = to(key, x[None], fn, scale, base, m, iterations, hc_eps, norm_eps, False)[:3]
    return u[0], post[0], comb[0].view(-1, m, m)


def transformer_post(to: Calls, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op, by cann_ops_transformer."""
    return _post(to, "cann_ops_transformer.mhc_post", y, x, post, comb)


def vendorpack_pre(
    to: Calls, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float
) -> Mixed:  # fmt: skip
    """As the op, by vllm-ascend."""
    u, post, comb = to(
        "_C_ascend.npu_hc_pre_v2", x, fn, scale, base, x.shape[1], iterations, norm_eps, hc_eps
    )
    return u, post, comb


def vendorpack_post(to: Calls, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op, by vllm-ascend, whose first argument is the sub-layer's output."""
    out: Tensor = to("_C_ascend.npu_hc_post", y.to(x.dtype).contiguous(), x, post, comb)
    return out


def stock_pre(
    to: Calls, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float
) -> Mixed:  # fmt: skip
    """As the op, by torch_npu: the mixes, then the balancing of comb."""
    u, post, logits = to("npu.npu_mhc_pre", x, fn, scale, base, norm_eps=norm_eps, hc_eps=hc_eps)[:3]
    return u, post, to("npu.npu_mhc_sinkhorn", logits, eps=hc_eps, num_iters=iterations)[0]


def stock_post(to: Calls, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op, by torch_npu."""
    return _post(to, "npu.npu_mhc_post", y, x, post, comb)


def _post(to: Calls, key: str, y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    out: Tensor = to(key, x, comb, y.to(x.dtype).contiguous(), post)
    return out


def transformer_unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Four streams of a multiple of 128, twenty rounds: the limits of its document."""
    if config.hidden_size % 128:
        return f"hidden size {config.hidden_size} is no multiple of 128"
    return _four_streams(config) or rounded(config, engine, family)


def vendorpack_unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Four streams of 4096, twenty rounds: the limits of its document."""
    if config.hidden_size not in _C_HIDDEN:
        return f"hidden size {config.hidden_size}, and its document knows {', '.join(map(str, _C_HIDDEN))}"
    return _four_streams(config) or rounded(config, engine, family)


def stock_unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """4, 6 or 8 streams."""
    if config.hc_mult not in (4, 6, 8):
        return f"{config.hc_mult} streams, and its document knows 4, 6 and 8"
    return rounded(config, engine, family)


def _four_streams(config: ModelConfig) -> str | None:
    if config.hc_mult != 4:
        return f"{config.hc_mult} streams, and its document knows 4"
    if config.hc_sinkhorn_iters != _SINKHORN:
        return f"{config.hc_sinkhorn_iters} rounds of balancing, and its document knows {_SINKHORN}"
    return None
