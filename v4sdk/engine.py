"""Moves sequences forward and back: chunked prefill, decode, snapshots, fork, rewind. Knows no text and no locks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from v4sdk.backend import Backend
from v4sdk.decode import DecodeStep, Sampler, TokenLogprob
from v4sdk.device_errors import translated
from v4sdk.kv_cache import KVCache
from v4sdk.model import V4Model
from v4sdk.sequence import SequenceState

Check = Callable[[], None]
OnChunk = Callable[[int, int], None]


def _nothing(*_: object) -> None:
    pass


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(a), len(b))
    for i in range(limit):
        if a[i] != b[i]:
            return i
    return limit


class Engine:
    """One model over one cache.

    Args:
        prefill_chunk: most tokens of one forward pass, over all sequences in it.
        snapshot_interval: tokens between snapshots of a held sequence.
    """

    def __init__(
        self, model: V4Model, cache: KVCache, backend: Backend, prefill_chunk: int, snapshot_interval: int
    ) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.prefill_chunk, self.snapshot_interval = prefill_chunk, snapshot_interval

    def new_state(self) -> SequenceState:
        """An empty sequence."""
        with torch.inference_mode():
            return SequenceState(self.cache.allocate())

    def close(self) -> None:
        """Let go of model and cache, whoever still holds this engine."""
        del self.model, self.cache

    def free(self, state: SequenceState) -> None:
        """Give a sequence's rows back."""
        state.snapshots.clear()
        self.cache.release(state.rows)

    def fork(self, state: SequenceState) -> SequenceState:
        """Copy a sequence."""
        with torch.inference_mode():
            rows = self.cache.fork(state.rows)
        # snapshots are never written to, so both may hold the same ones
        return SequenceState(
            rows, list(state.ids), state.num_cached, dict(state.snapshots), list(state.turns), set(), state.seed, state.stream
        )  # fmt: skip

    def restore(self, state: SequenceState, position: int) -> int:
        """Go back to the nearest snapshot at or before `position`; the tokens stay, pending. Returns where it stands."""
        if position < state.num_cached:
            at = state.nearest(position)
            with torch.inference_mode():
                if at:
                    self.cache.restore_fixed(state.rows, state.snapshots[at])
                self.cache.truncate(state.rows, at)
            state.num_cached = at
        state.forget(state.num_cached)
        return state.num_cached

    def rewind(
        self, state: SequenceState, num_tokens: int, check: Check = _nothing, on_chunk: OnChunk = _nothing
    ) -> int:
        """Cut a sequence to its first tokens; returns how many of them were computed again."""
        del state.ids[num_tokens:]
        before = min(state.num_cached, num_tokens)
        at = self.restore(state, num_tokens)
        if at >= before:
            return 0
        # on the way, one back from the end: drawing another answer from here reads the last token again
        state.marks = {before - 1}
        keep, state.ids = state.ids[before:], state.ids[:before]
        try:
            self.advance([state], check, on_chunk)
        finally:
            state.ids += keep
        return before - at

    def remember(self, state: SequenceState, turn: bool = True) -> None:
        """Take a snapshot of a held sequence where it stands."""
        if state.keeps and state.num_cached:
            with torch.inference_mode():
                state.keep(self.cache.snapshot_fixed(state.rows), turn)

    def advance(
        self, states: Sequence[SequenceState], check: Check = _nothing, on_chunk: OnChunk = _nothing,
        select: Callable[[SequenceState, int, int], list[int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Read all pending tokens of several sequences, packed, in chunks.

        Args:
            check: raises to stop; asked before each layer. on_chunk: told (tokens done, tokens in all).
            select: positions first..last of a sequence whose logits are wanted; by default its very last token's.

        Shapes:
            -> logits [rows, V] float32 in the order of `states`
        """
        select = select or _last_only
        total, done = sum(s.pending for s in states), 0
        found: dict[int, list[Tensor]] = {id(s): [] for s in states}
        with torch.inference_mode():
            for state in states:
                # at once: growing page by page would copy what is there again and again
                self.cache.reserve(state.rows, len(state.ids))
        while waiting := [s for s in states if s.pending]:
            plan = self._plan(waiting)
            streams = self._chunk(plan, check)
            at = 0
            rows, owners = [], []
            for state, count in plan:
                first = state.num_cached - count
                wanted = select(state, first, first + count)
                rows += [at + position - first for position in wanted]
                owners += [id(state)] * len(wanted)
                at += count
            if rows:
                with torch.inference_mode():
                    picked = streams[torch.tensor(rows, device=streams.device)]
                    for owner, row in zip(owners, self.model.logits(picked), strict=True):
                        found[owner].append(row)
            done += at
            on_chunk(done, total)
        with torch.inference_mode():
            return torch.stack([row for s in states for row in found[id(s)]])

    def _plan(self, waiting: Sequence[SequenceState]) -> list[tuple[SequenceState, int]]:
        budget, plan = self.prefill_chunk, []
        for state in waiting:
            count = min(state.pending, budget)
            if not count:
                break
            ends = [
                m - state.num_cached for m in state.marks if state.num_cached < m < state.num_cached + count
            ]
            count = min(ends, default=count)
            budget -= count
            plan.append((state, count))
        return plan

    def _chunk(self, plan: list[tuple[SequenceState, int]], check: Check) -> Tensor:
        """Run one packed chunk; on any exception the sequences stand where they stood."""
        states = [s for s, _ in plan]
        with torch.inference_mode(), translated(self.backend):
            saved = [self.cache.snapshot_fixed(s.rows) for s in states]
            try:
                check()
                tokens = [s.ids[s.num_cached : s.num_cached + n] for s, n in plan]
                batch = self.cache.batch([s.rows for s in states], tokens, [s.num_cached for s in states])
                streams = self.model.forward(batch, self.cache, on_layer=lambda _: check())
            except BaseException:
                for state, fixed in zip(states, saved, strict=True):
                    self.cache.restore_fixed(state.rows, fixed)
                    self.cache.truncate(state.rows, state.num_cached)
                raise
        for state, count in plan:
            state.num_cached += count
            self._remember_on_the_way(state)
        return streams

    def _remember_on_the_way(self, state: SequenceState) -> None:
        if state.num_cached in state.marks:
            state.marks.discard(state.num_cached)
            self.remember(state)
        elif state.num_cached - state.nearest_lasting(state.num_cached) >= self.snapshot_interval:
            self.remember(state, turn=False)

    def first_tokens(
        self, sampler: Sampler, states: Sequence[SequenceState], logits: Tensor
    ) -> list[TokenLogprob]:
        """Draw from the logits of a finished prefill and append."""
        with torch.inference_mode(), translated(self.backend):
            sampler.prepare()
            tokens = sampler.read(sampler.draw(self.model, logits))
        for state, token in zip(states, tokens, strict=True):
            state.ids.append(token.id)
        return tokens

    def decode_step(self, states: Sequence[SequenceState], sampler: Sampler) -> DecodeStep:
        """Buffers for decoding these sequences, one pending token each."""
        with torch.inference_mode(), translated(self.backend):
            return DecodeStep(self.model, self.cache, self.backend, states, sampler)

    def decode(self, step: DecodeStep, states: Sequence[SequenceState]) -> list[TokenLogprob]:
        """Run one step; an exception in the middle of it sends the sequences back to their last snapshots."""
        try:
            with torch.inference_mode(), translated(self.backend):
                tokens = step.run()
        except BaseException:
            for state in states:
                self._restart(state)
            raise
        for state in states:
            self._remember_on_the_way(state)
        return tokens

    def _restart(self, state: SequenceState) -> None:
        # the fixed part may be half written: even a snapshot at this very position must be put back
        state.num_cached += 1
        self.restore(state, state.num_cached - 1)


def _last_only(state: SequenceState, first: int, last: int) -> list[int]:
    return [last - 1] if last == len(state.ids) else []
