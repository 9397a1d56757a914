"""A decode step as one ACL graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from v4sdk.recorded import Recorded


class RecordedStep(Recorded):
    """A step that becomes a `torch.npu.NPUGraph`.

    Args:
        devices: `torch.npu`. pool: memory that several graphs share.
    """

    def __init__(self, step: Callable[[], None], devices: Any, pool: Any) -> None:
        super().__init__(step)
        self._devices, self._pool = devices, pool

    def capture(self, step: Callable[[], None]) -> Any:
        """On a stream of its own; one that fails to end would stay current, and is left here."""
        devices = self._devices
        stream = devices.current_stream()
        try:
            graph = devices.NPUGraph()
            with devices.graph(graph, pool=self._pool):
                step()
        except RuntimeError:
            devices.set_stream(stream)
            raise
        return graph
