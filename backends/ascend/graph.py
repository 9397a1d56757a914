"""A decode step run once and then replayed as one ACL graph: no operator is started by Python again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("v4sdk")


class RecordedStep:
    """Runs a step: the first time as it is, the second time while it is captured, from then on as a graph.

    The first run compiles kernels and sets aside the workspaces they keep, none of which may happen during a capture. A capture
    computes nothing, so it is replayed at once. A step that cannot be captured (an op that asks the host for a value) goes on as
    it was.

    Args:
        step: reads and writes the same buffers every time. devices: `torch.npu`. pool: memory that several graphs share.

    Attributes:
        graph: the captured step, a `torch.npu.NPUGraph`; None before the second run and where it cannot be captured.
        reason: why it is not captured, None otherwise.
    """

    def __init__(self, step: Callable[[], None], devices: Any, pool: Any) -> None:
        self._step, self._devices, self._pool = step, devices, pool
        self._run: Callable[[], None] = self._first
        self.graph: Any = None
        self.reason: str | None = None

    def __call__(self) -> None:
        self._run()

    def _first(self) -> None:
        self._step()
        self._run = self._capture

    def _capture(self) -> None:
        devices = self._devices
        stream = devices.current_stream()
        try:
            graph = devices.NPUGraph()
            with devices.graph(graph, pool=self._pool):
                self._step()
        except RuntimeError as exc:
            # a capture that fails to end leaves its own stream current; nothing has run: the step is still to be made
            devices.set_stream(stream)
            self.reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            log.warning("the decode step is not captured as a graph: %s", self.reason)
            self._run = self._step
            self._step()
            return
        self.graph = graph
        self._run = graph.replay
        graph.replay()
