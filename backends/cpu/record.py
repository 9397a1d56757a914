"""A decode step run once and then replayed: every kernel's argument block, bound to the addresses of the first run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .library import Library

log = logging.getLogger("v4sdk")

# memory and views: they compute nothing, and what they made is held by the recording
_FREE = frozenset({"aten::empty.memory_format", "aten::empty_strided", "aten::detach"})


class _TensorCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a step computes outside the kernels: a replay would leave it out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        gives_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if name not in _FREE and not gives_view:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


class RecordedStep:
    """Runs a step: the first time as it is, taking notes; from then on all its kernels in one native call.

    A step that computes anything outside the kernels (an op without one, a layout a kernel cannot take) is never replayed.

    Attributes:
        num_calls: native calls of one replay, None before the first run or where the step cannot be replayed.
        outside: tensor calls that stand in the way of a replay.
    """

    def __init__(self, library: Library, step: Callable[[], None]) -> None:
        self._library, self._step = library, step
        self._run: Callable[[], None] = self._first
        self.num_calls: int | None = None
        self.outside: tuple[str, ...] = ()

    def __call__(self) -> None:
        self._run()

    def _first(self) -> None:
        recording = self._library.record()
        calls = _TensorCalls()
        try:
            with calls:
                self._step()
        finally:
            self._library.stop()
        self.outside = tuple(sorted(calls.found))
        if self.outside:
            log.info("the decode step is not recorded: it also runs %s", ", ".join(self.outside))
            self._run = self._step
            return
        replay = self._library.replay(recording)
        self.num_calls = replay.num_calls
        self._run = replay
