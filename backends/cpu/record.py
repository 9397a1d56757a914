"""A decode step run once and then replayed: every kernel's argument block, bound to the addresses of the first run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .kernels import Library

log = logging.getLogger("v4sdk")


class _TensorCalls(TorchFunctionMode):
    """Notes what a step computes outside the kernels: a replay would leave it out.

    New memory, views and questions compute nothing; what they made is held by the recording. (A dispatch mode would see
    more exactly, but its first use costs more than a second of imports.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if _computes(func, args, kwargs or {}, made):
            self.found.add(getattr(func, "__name__", str(func)))
        return made


def _computes(func: Any, args: Any, kwargs: Any, made: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.startswith("__")):
        return True
    if name.startswith("__i") and name != "__index__":
        return True
    if func in (torch.empty, torch.empty_like, torch.empty_strided):
        return False
    given = {t.untyped_storage().data_ptr() for t in _tensors(args)}
    return any(t.untyped_storage().data_ptr() not in given for t in _tensors(made))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


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
