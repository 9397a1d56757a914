"""A step run once and then replayed as one graph of a device: no kernel is started by Python again."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

log = logging.getLogger("v4sdk")


class Recorded(ABC):
    """Runs a step: the first time as it is, the second time while it is captured, from then on as a graph.

    The first run compiles kernels and sets aside what they keep (counters, workspaces of libraries), none of which may happen
    during a capture. A capture computes nothing, so it is replayed at once. A step that cannot be captured (an op that asks the
    host for a value) goes on as it was.

    Args:
        step: reads and writes the same buffers every time.

    Attributes:
        graph: the captured step, None before the second run and where it cannot be captured.
        reason: why it is not captured, None otherwise.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._run: Callable[[], None] = self._first
        self.graph: Any = None
        self.reason: str | None = None

    def __call__(self) -> None:
        self._run()

    @abstractmethod
    def capture(self, step: Callable[[], None]) -> Any:
        """Run the step while the device only notes what it is told to do; what is given back has `replay()`.

        Raises:
            RuntimeError: it cannot be captured; nothing of it has run, and the device is as before.
        """

    def _first(self) -> None:
        self._step()
        self._run = self._capture

    def _capture(self) -> None:
        try:
            graph = self.capture(self._step)
        except RuntimeError as exc:
            # the step is still to be made
            self.reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            log.warning("the decode step is not captured as a graph: %s", self.reason)
            self._run = self._step
            self._step()
            return
        self.graph = graph
        self._run = graph.replay
        graph.replay()
