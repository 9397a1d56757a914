"""How much a deep stack of stream mixes may amplify a signal: with the mixes of mHC, and without their constraint.

Both sides get the same drawn matrices H. Unconstrained hyper-connections mix the streams with H itself; mHC mixes them with
`sinkhorn(H)`, the function the model runs. The gain of a product of mixes is the largest absolute row sum (what a signal may
grow by on its way up) or column sum (a gradient on its way down), the larger of the two, and the largest over all depths.
Source: Xie et al., mHC, arXiv 2512.24880, sections 3.1 and 5.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4sdk.ops.hyper_connection import sinkhorn

# V4-Pro: attention and FFN of 61 layers
SUBLAYERS = 122
STREAMS = 4
# what a token adds to the drawn part that all tokens share
_OF_TOKEN = 0.1


@dataclass(frozen=True)
class Draws:
    """What the matrices H are drawn from: `diagonal` * I + `scale` * normal, a tenth of the normal part per token.

    Attributes:
        alike: all sub-layers share the part that does not depend on the token, as layers that learnt the same mix would.
    """

    diagonal: float
    scale: float
    alike: bool = False
    sublayers: int = SUBLAYERS
    streams: int = STREAMS
    tokens: int = 32

    def matrices(self, seed: int) -> Tensor:
        """Draw H: [sublayers, tokens, M, M] float32, row j the source stream, column k the destination."""
        random = torch.Generator().manual_seed(seed)
        m = self.streams
        shared = torch.randn(1 if self.alike else self.sublayers, 1, m, m, generator=random)
        own = torch.randn(self.sublayers, self.tokens, m, m, generator=random)
        return self.diagonal * torch.eye(m) + self.scale * (shared + _OF_TOKEN * own)


@dataclass(frozen=True)
class Gains:
    """Largest gain over all depths, of every token and seed: [seeds * tokens] float64."""

    constrained: Tensor
    unconstrained: Tensor


def measure(draws: Draws, seeds: range, iterations: int = 20, eps: float = 1e-6) -> Gains:
    """Gains of both kinds of stack over several seeds.

    Args:
        iterations, eps: of Sinkhorn, as the released configurations have them.
    """
    ours, free = [], []
    for seed in seeds:
        h = draws.matrices(seed)
        ours.append(largest_gain(constrain(h, iterations, eps)))
        free.append(largest_gain(h))
    return Gains(torch.cat(ours), torch.cat(free))


def constrain(h: Tensor, iterations: int = 20, eps: float = 1e-6) -> Tensor:
    """The mixes of mHC for drawn matrices: the model's own Sinkhorn on every one."""
    m = h.shape[-1]
    return sinkhorn(h.reshape(-1, m, m), iterations, eps).view_as(h)


def largest_gain(mixes: Tensor) -> Tensor:
    """The largest gain over all depths of a stack.

    Shapes:
        mixes [sublayers, T, M, M], row source, column destination -> [T] float64
    """
    product = torch.eye(mixes.shape[-1], dtype=torch.float64)
    best = torch.ones(mixes.shape[1], dtype=torch.float64)
    for mix in mixes.double():
        # x'_k = sum_j mix[j, k] x_j
        product = mix.transpose(-1, -2) @ product
        best = torch.maximum(best, gain(product))
    return best


def gain(mapping: Tensor) -> Tensor:
    """The largest absolute row or column sum of square matrices: [..., M, M] -> [...]."""
    size = mapping.abs()
    return torch.maximum(size.sum(-1).amax(-1), size.sum(-2).amax(-1))


def imbalance(mixes: Tensor) -> tuple[float, float]:
    """How far mixes are from doubly stochastic: the largest |column sum - 1| and |row sum - 1|."""
    wide = mixes.double()
    return float((wide.sum(-2) - 1).abs().max()), float((wide.sum(-1) - 1).abs().max())
