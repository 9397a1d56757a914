"""The iterator an application holds while an answer is generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType

from v4sdk.engine import Engine
from v4sdk.errors import StateError
from v4sdk.output import Piece
from v4sdk.scheduler import Scheduler

Turn = Callable[[], AbstractContextManager[Engine]]


class Stream(Iterator[Piece]):
    """Pieces of one answer. Closing it early leaves its sequence at the token it has reached.

    Args:
        turn: holds the session's lock; each step takes one.
        abandon: takes note of a scheduler whose stream was dropped without being exhausted.
    """

    def __init__(self, scheduler: Scheduler, turn: Turn, abandon: Callable[[Scheduler], None]) -> None:
        self._scheduler, self._turn, self._abandon = scheduler, turn, abandon
        self._ready: deque[Piece] = deque()
        self._open = True

    def __next__(self) -> Piece:
        while not self._ready:
            if not self._open:
                raise StopIteration
            with self._turn():
                event = self._scheduler.next_event()
            if event is None:
                self._open = False
            else:
                self._ready.extend(event[1])
        return self._ready.popleft()

    def close(self) -> None:
        """End the answer here; closing twice is fine."""
        if self._open:
            self._open = False
            self._ready.clear()
            # closing the session has closed it already
            with suppress(StateError), self._turn():
                self._scheduler.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # runs in any thread, so it only leaves a note
        if self._open:
            self._abandon(self._scheduler)
