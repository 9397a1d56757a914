"""Runs requests: admits what fits, prefills it packed, decodes all of it together until each is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from v4sdk.decode import Constraint, DecodeStep, Sampler, TokenLogprob
from v4sdk.engine import Engine, OnChunk
from v4sdk.errors import Cancelled
from v4sdk.output import FinishReason, Piece, Transcript
from v4sdk.sampling import SamplingParams
from v4sdk.sequence import SequenceState


@dataclass(eq=False)
class Request:
    """One answer to generate.

    Attributes:
        ids: the prompt of a fresh state. params: with every value filled in.
        max_tokens: most to generate. end_ids: tokens that end it. hidden_ids: tokens that are not text.
        seed, stream: where its uniforms come from.
        held: somebody's sequence, whose pending tokens are the prompt; else rows are taken when it is admitted.
    """

    ids: list[int]
    params: SamplingParams
    transcript: Transcript
    max_tokens: int
    end_ids: frozenset[int]
    hidden_ids: frozenset[int]
    seed: int | None
    stream: int
    held: SequenceState | None = None
    constraint: Constraint | None = None
    finish_reason: FinishReason | None = None
    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float = 0.0
    running: SequenceState | None = None
    released: bool = False

    @property
    def state(self) -> SequenceState:
        """The sequence it runs on, once it is admitted."""
        assert self.running is not None
        return self.running


class Scheduler:
    """Generates for several requests at once; rows leave when they finish and waiting requests take their place.

    Args:
        cancelled: asked before every layer of prefill and before every token of decode.
        on_chunk: told (tokens read, tokens to read) during prefill.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], max_batch: int, cancelled: Callable[[], bool], on_chunk: OnChunk
    ) -> None:  # fmt: skip
        self._engine, self._max_batch = engine, max_batch
        self._cancelled, self._on_chunk = cancelled, on_chunk
        self._all = list(requests)
        self._waiting, self._running = list(requests), list[Request]()
        for request in self._all:
            if request.held is not None:
                request.held.in_use = True
        self._events = self._run()

    def next_event(self) -> tuple[Request, list[Piece]] | None:
        """What the next token of some request completed; None when all have finished.

        Raises:
            Cancelled: while prompts are read and no request has a token yet. The sequence stands at its last chunk.
        """
        return next(self._events, None)

    def _run(self) -> Generator[tuple[Request, list[Piece]]]:
        try:
            step: DecodeStep | None = None
            while self._waiting or self._running:
                if self._waiting and len(self._running) < self._max_batch:
                    try:
                        admitted, logits = self._admit()
                    except Cancelled:
                        if not any(r.first_token_s for r in self._all):
                            raise
                        # what others have answered is not lost with the prompts that were being read
                        yield from self._stop_all()
                        return
                    yield from self._begin(admitted, logits)
                    step = None
                    continue
                if self._cancelled():
                    yield from self._stop_all()
                    return
                if step is None or step.is_spent:
                    step = self._decode_step()
                running = list(self._running)
                tokens = self._engine.decode(step, [r.state for r in running])
                for request, token in zip(running, tokens, strict=True):
                    yield request, self._take(request, token)
                if len(self._running) < len(running):
                    step = None
        finally:
            self._leave()

    def close(self) -> None:
        """Leave every sequence as it stands, and let go of the model."""
        self._events.close()
        # a generator that never began has no `finally` to run
        self._leave()

    def _leave(self) -> None:
        for request in self._all:
            self._release(request)
        self._waiting, self._running = [], []

    def _admit(self) -> tuple[list[Request], Tensor]:
        """Read the prompts of as many requests as there is room for: those, and logits [n, V] after their last tokens."""
        new = self._waiting[: self._max_batch - len(self._running)]
        for request in new:
            request.running = request.held or self._fresh_state(request)
        states = [r.state for r in new]
        try:
            logits = self._engine.advance(states, self._check, self._on_chunk)
        except BaseException:
            # what was not read is not part of the sequence
            for state in states:
                del state.ids[state.num_cached :]
            raise
        self._waiting = self._waiting[len(new) :]
        return new, logits

    def _begin(self, new: list[Request], logits: Tensor) -> Iterator[tuple[Request, list[Piece]]]:
        now = time.perf_counter()
        tokens = self._engine.first_tokens(self._sampler(new), [r.state for r in new], logits)
        for request in new:
            request.first_token_s = now
        self._running += new
        for request, token in zip(new, tokens, strict=True):
            yield request, self._take(request, token)

    def _fresh_state(self, request: Request) -> SequenceState:
        state = self._engine.new_state()
        state.ids, state.seed, state.stream = list(request.ids), request.seed, request.stream
        return state

    def _decode_step(self) -> DecodeStep:
        return self._engine.decode_step([r.state for r in self._running], self._sampler(self._running))

    def _sampler(self, requests: Sequence[Request]) -> Sampler:
        model = self._engine.model
        return Sampler(
            [r.params for r in requests], [r.state for r in requests], [r.constraint for r in requests],
            model.config.vocab_size, self._engine.cache.device,
        )  # fmt: skip

    def _take(self, request: Request, token: TokenLogprob) -> list[Piece]:
        pieces = request.transcript.feed(token, shown=token.id not in request.hidden_ids)
        if token.id in request.end_ids or request.transcript.stopped:
            return pieces + self._finish(request, "stop")
        if request.transcript.num_tokens >= request.max_tokens:
            return pieces + self._finish(request, "length")
        return pieces

    def _finish(self, request: Request, reason: FinishReason) -> list[Piece]:
        now = time.perf_counter()
        first = request.first_token_s or now
        request.finish_reason = reason
        self._running = [r for r in self._running if r is not request]
        if request.held is not None:
            self._engine.remember(request.held)
        pieces = request.transcript.finish(reason, first - request.started_s, now - first)
        self._release(request)
        return pieces

    def _release(self, request: Request) -> None:
        # once: a held sequence may be in another answer's use by the time this scheduler is closed
        if request.released:
            return
        request.released = True
        if request.held is not None:
            request.held.in_use = False
        elif request.running is not None:
            self._engine.free(request.running)
        request.running = None

    def _stop_all(self) -> Iterator[tuple[Request, list[Piece]]]:
        for request in [*self._running, *self._waiting]:
            yield request, self._finish(request, "cancelled")

    def _check(self) -> None:
        if self._cancelled():
            raise Cancelled(
                "generation was cancelled while the prompt was read", hint="send it again to go on"
            )
