"""A decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from v4sdk.recorded import Recorded


class RecordedStep(Recorded):
    """A step that becomes a `torch.cuda.CUDAGraph`.

    Args:
        pool: memory that several graphs share.
    """

    def __init__(self, step: Callable[[], None], pool: Any) -> None:
        super().__init__(step)
        self._pool = pool

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """On a stream of its own, which torch ends whatever happens."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph
