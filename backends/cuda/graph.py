"""A decode step run once and then replayed as one CUDA graph: no kernel is started by Python again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("v4sdk")


class RecordedStep:
    """Runs a step: the first time as it is, the second time while it is captured, from then on as a graph.

    The first run compiles kernels and sets aside what they keep (counters, workspaces of libraries), none of which may happen
    during a capture. A capture computes nothing, so it is replayed at once. A step that cannot be captured (an op that asks the
    host for a value) goes on as it was.

    Attributes:
        graph: the captured step, None before the second run and where it cannot be captured.
        reason: why it is not captured, None otherwise.
    """

    def __init__(self, step: Callable[[], None], pool: Any) -> None:
        self._step, self._pool = step, pool
        self._run: Callable[[], None] = self._first
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reason: str | None = None

    def __call__(self) -> None:
        self._run()

    def _first(self) -> None:
        self._step()
        self._run = self._capture

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._step()
        except RuntimeError as exc:
            # nothing has run: the step is still to be made
            self.reason = str(exc).strip().splitlines()[0]
            log.warning("the decode step is not captured as a graph: %s", self.reason)
            self._run = self._step
            self._step()
            return
        self.graph = graph
        self._run = graph.replay
        graph.replay()
