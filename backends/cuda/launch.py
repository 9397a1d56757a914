"""How a kernel is started. Every wrapper goes through one `Launch`, so running, interpreting, compiling and counting are the
same code up to this door.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from .failures import explained
from .target import Target

# programs of one launch that may finish in several groups, each with a counter of its own
COUNTERS = 1 << 16
R = TypeVar("R")


class Launch:
    """Starts kernels on one chip.

    Attributes:
        target: what tiles are chosen for. device: where tensors lie. tally: counts launches by kernel while it is there.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        self.target = target
        self.tally: Counter[str] | None = None
        self.device = device
        self._counters: Tensor | None = None

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any
    ) -> None:
        """Run `kernel` over `grid`; no program, no launch.

        Args:
            args: tensors, numbers or None, in the kernel's order. constants: its `tl.constexpr` parameters.

        Raises:
            KernelFailed: Triton cannot compile or start it.
        """
        if 0 in grid:
            return
        if self.tally is not None:
            self.tally[kernel.fn.__name__] += 1
        # the default of multiply-add fusion changes between versions of Triton: results must not
        try:
            kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        except Exception as exc:
            found = explained(kernel.fn.__name__, exc)
            if found is None:
                raise
            raise found from exc

    def counters(self, count: int) -> Tensor:
        """Zeros that kernels leave as zeros: [count] int32, the same memory every time. See `kernels.numbers.arrive`.

        Kernels that use them never run beside each other: they are on one stream.
        """
        if count > COUNTERS:
            raise ValueError(f"a launch wants {count} counters, expected at most {COUNTERS}")
        if self._counters is None:
            self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=self.device)
        return self._counters[:count]


def result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a kernel writes: the caller's tensor if it has the layout that kernels write, else fresh memory."""
    if out is not None and out.dtype == dtype and tuple(out.shape) == shape and out.is_contiguous():
        return out
    return torch.empty(shape, dtype=dtype, device=device)


def deliver(out: R | None, made: R) -> R:
    """Give what was made, copied into the caller's tensor (or tuple of tensors) where that is another one."""
    if out is None or out is made:
        return made
    if isinstance(made, Tensor) and isinstance(out, Tensor):
        out.copy_(made)
    elif isinstance(made, tuple) and isinstance(out, tuple):
        for o, m in zip(out, made, strict=True):
            deliver(o, m)
    return out
