"""The backend: the CPU once more, with two kernels of its own. Everything else runs its parts or its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from v4sdk import ops
from v4sdk.backend import Backend, EngineConfig, Kernel, kernel
from v4sdk.config import ModelConfig
from v4sdk.encodings import IntegerLayout


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The same norm with the scale folded into one product."""
    y = x.float()
    inverse = (y.pow(2).sum(-1, keepdim=True) / y.shape[-1] + eps).rsqrt()
    return (y * (inverse * weight.float())).to(dtype)


def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The same mix of streams as one batched matrix product."""
    mixed = torch.bmm(comb.float().transpose(1, 2), x.float())
    return (mixed + post.float().unsqueeze(-1) * y.float().unsqueeze(1)).to(x.dtype)


def _too_wide(config: ModelConfig, engine: EngineConfig) -> str | None:
    return f"hidden_size {config.hidden_size} > 16384" if config.hidden_size > 16384 else None


class EchoBackend(Backend):
    """Tensors in main memory."""

    name = "echo"
    priority = -10
    evidence = "emulated"

    def unavailable(self) -> str | None:
        """Never."""
        return None

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        """The table."""
        return (kernel(ops.rms_norm, rms_norm, unless=_too_wide), kernel(ops.hc_post, hc_post))

    def convert_targets(self) -> Mapping[str, IntegerLayout]:
        """For `v4sdk convert SOURCE TARGET --for echo-w8`: experts as int8, all else float."""
        return {"echo-w8": IntegerLayout("echo-w8", int8=("*.ffn.experts.*", "*.ffn.shared_experts.*"))}
