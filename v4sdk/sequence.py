"""One sequence: its token ids, the cache rows it owns, and snapshots to go back to. Knows no model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from v4sdk.errors import StateError
from v4sdk.kv_cache import CacheRows

Snapshot = list[dict[str, Tensor]]
# turn ends beyond the last few are thinned out, so that many short turns do not pile up fixed-size copies
KEPT_TURNS = 4


@dataclass(eq=False)
class SequenceState:
    """What the engine knows of a sequence.

    Tokens from `num_cached` on are pending: they are part of the sequence, the model has not read them yet.

    Attributes:
        rows: cache rows. ids: every token. num_cached: tokens the model has read.
        snapshots: copies of the fixed-size cache part by the number of tokens read.
        turns: positions of turn-end snapshots, oldest first. marks: positions where prefill takes one on its way.
        seed, stream: where the sequence's uniforms come from; the position is the number of tokens.
        keeps: whether snapshots are worth taking (a sequence somebody holds).
        in_use: an answer is being generated.
    """

    rows: CacheRows
    ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    marks: set[int] = field(default_factory=set)
    seed: int | None = None
    stream: int = 0
    keeps: bool = False
    in_use: bool = False

    @property
    def pending(self) -> int:
        """Tokens the model has not read."""
        return len(self.ids) - self.num_cached

    def nearest(self, position: int) -> int:
        """The last snapshot at or before `position`; 0 is the empty sequence."""
        return max((at for at in self.snapshots if at <= position), default=0)

    def nearest_lasting(self, position: int) -> int:
        """The last snapshot at or before `position` that does not make room as a turn end does."""
        return max((at for at in self.snapshots if at <= position and at not in self.turns), default=0)

    def forget(self, position: int) -> None:
        """Drop snapshots behind `position`."""
        for at in [at for at in self.snapshots if at > position]:
            del self.snapshots[at]
        self.turns = [at for at in self.turns if at <= position]

    def keep(self, snapshot: Snapshot, turn: bool) -> None:
        """File a snapshot of the current position; older turn ends make room."""
        if turn and self.num_cached not in self.snapshots:
            self.turns.append(self.num_cached)
        self.snapshots[self.num_cached] = snapshot
        while len(self.turns) > KEPT_TURNS:
            self.snapshots.pop(self.turns.pop(0), None)


class SequenceOwner(Protocol):
    """What a `Sequence` asks of the session it belongs to."""

    def fork_sequence(self, sequence: Sequence) -> Sequence: ...
    def rewind_sequence(self, sequence: Sequence, num_tokens: int) -> int: ...
    def save_sequence(self, sequence: Sequence, path: str | Path) -> None: ...
    def drop_state(self, state: SequenceState) -> None: ...


class Sequence:
    """One growing context of a session: made by `Session.sequence`, `Session.resume` or `fork`.

    Its memory goes back to the session with `close`, at the end of a `with` block, or when it is garbage collected.
    """

    def __init__(self, owner: SequenceOwner, state: SequenceState) -> None:
        self._owner, self._state = owner, state
        state.keeps = True
        # the callback may run in any thread at any time: it only leaves a note for the session
        self._drop = weakref.finalize(self, _dropper(owner), state)
        self._drop.atexit = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token: prompts, answers, end tokens."""
        return tuple(self._state.ids)

    def __len__(self) -> int:
        return len(self._state.ids)

    @property
    def num_cached(self) -> int:
        """Tokens the model has read; the last generated token waits for the next call."""
        return self._state.num_cached

    @property
    def is_closed(self) -> bool:
        """Its memory was given back."""
        return not self._drop.alive

    @property
    def snapshot_bytes(self) -> int:
        """Memory held by snapshots."""
        return sum(t.nbytes for s in self._state.snapshots.values() for layer in s for t in layer.values())

    def fork(self) -> Sequence:
        """Copy this sequence; both go on independently.

        Raises:
            StateError: if it is closed or generating.
        """
        return self._owner.fork_sequence(self)

    def rewind(self, num_tokens: int) -> int:
        """Go back to the first `num_tokens` tokens and return how many of them had to be computed again.

        Raises:
            StateError: if it is closed or generating, or has fewer tokens.
        """
        return self._owner.rewind_sequence(self, num_tokens)

    def save(self, path: str | Path) -> None:
        """Write the whole state to one file, atomically; `Session.resume` reads it.

        Raises:
            StateError: if it is closed or generating, or the file cannot be written.
        """
        self._owner.save_sequence(self, path)

    def close(self) -> None:
        """Give the memory back; closing twice is fine."""
        self._drop()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_for(self, owner: SequenceOwner) -> SequenceState:
        """Give the state to its session.

        Raises:
            StateError: if it is closed, generating, or belongs to another session.
        """
        if self._owner is not owner:
            raise StateError(
                "the sequence belongs to another session",
                hint="make one with session.sequence(), or save it and resume it there",
            )
        if self.is_closed:
            raise StateError("the sequence is closed", hint="make a new one with session.sequence()")
        if self._state.in_use:
            raise StateError(
                "the sequence is already generating",
                hint="exhaust or close its stream first, or fork it before",
            )
        return self._state


def _dropper(owner: SequenceOwner) -> Callable[[SequenceState], None]:
    # weak: a forgotten sequence must not keep its session's weights alive
    session = weakref.ref(owner)

    def drop(state: SequenceState) -> None:
        alive = session()
        if alive is not None:
            alive.drop_state(state)

    return drop
