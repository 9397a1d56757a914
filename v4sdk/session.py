"""The front door: a loaded model, its sequences, and text in and out. Assembles the parts; computes nothing itself."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from v4sdk import loading, prompting, state
from v4sdk.backend import Backend
from v4sdk.config import ModelConfig
from v4sdk.engine import Engine
from v4sdk.errors import Cancelled, ConfigError, MemoryRefused, StateError
from v4sdk.expert_parallel import Team
from v4sdk.numerics import KVFormat, Numerics
from v4sdk.output import Piece, Result, Usage
from v4sdk.progress import OnProgress, Progress, silent
from v4sdk.prompting import ChatOptions
from v4sdk.prompts import Dialect
from v4sdk.sampling import SamplingParams
from v4sdk.scheduler import Request, Scheduler
from v4sdk.sequence import Sequence, SequenceState
from v4sdk.stream import Stream
from v4sdk.tokenizer import Tokenizer

__all__ = ["ChatOptions", "Piece", "Progress", "Result", "SamplingParams", "Sequence", "Session", "Usage"]

PREFILL_CHUNK = 1024
SNAPSHOT_INTERVAL = 16384
MAX_BATCH = 16
LOGITS_LIMIT_BYTES = 512 << 20

Prompt = str | Many[int]
Message = Mapping[str, Any]


class Session:
    """A model on a backend. Make one with `Session.load`, close it or use it in a `with` block.

    Methods may be called from several threads; they take turns, a stream token by token. Only `cancel` does not wait.

    Attributes:
        on_progress: called with a `Progress` during loading and long prompts, and for notices.
    """

    def __init__(
        self, loaded: loading.Loaded, *, context_limit: int | None = None, snapshot_interval: int = SNAPSHOT_INTERVAL,
        prefill_chunk: int = PREFILL_CHUNK, max_batch: int = MAX_BATCH, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        for name, value in (
            ("snapshot_interval", snapshot_interval), ("prefill_chunk", prefill_chunk), ("max_batch", max_batch),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"`{name}` is {value}, expected a positive integer")
        most = loaded.config.max_position_embeddings
        if context_limit is not None and not 1 <= context_limit <= most:
            raise ConfigError(
                f"`context_limit` is {context_limit}, expected 1 to `max_position_embeddings`, {most}"
            )
        self._context_limit = context_limit or most
        self._max_batch = max_batch
        self._loaded: loading.Loaded | None = loaded
        self._engine: Engine | None = Engine(
            loaded.model, loaded.cache, loaded.backend, prefill_chunk, snapshot_interval
        )
        self.on_progress: OnProgress = on_progress or silent
        self._lock = threading.RLock()
        self._cancellations = 0
        self._noticed = False
        # calls in progress; more than one only where a callback calls back
        self._turns = 0
        # states whose `Sequence` is gone, left here by whatever thread collected it
        self._dropped: deque[SequenceState] = deque()
        self._abandoned: deque[Scheduler] = deque()
        self._active: weakref.WeakSet[Scheduler] = weakref.WeakSet()

    @classmethod
    def load(
        cls, model: str | Path | None = None, *, backend: str | Backend | None = None,
        numerics: str | Numerics | None = None, kv_format: str | None = None, context_limit: int | None = None,
        revision: str | None = None, strict: bool = False, dialect: str | Dialect | None = None,
        snapshot_interval: int = SNAPSHOT_INTERVAL, prefill_chunk: int = PREFILL_CHUNK, max_batch: int = MAX_BATCH,
        ep: int | Team | None = None, memory_limit: int | str | None = None, on_progress: OnProgress | None = None,
    ) -> Session:  # fmt: skip
        """Load a model.

        Args:
            model: a checkpoint folder or a hub id; None is the small model that comes with v4sdk.
            backend: a name, `auto`, or a `Backend`; None asks `V4SDK_BACKEND`, then means `auto`.
            numerics: `exact`, `reference` or `fast` (default). kv_format: `float32`, `bf16` or `native`.
            context_limit: most tokens of a sequence; `max_position_embeddings` by default.
            revision: of a hub id. strict: refuse ops that run without a kernel of the backend.
            dialect: prompt dialect, where the folder does not say: `v4-april` or `v4-0731`.
            snapshot_interval: tokens between the snapshots that make `rewind` cheap.
            prefill_chunk: most tokens of one forward pass. max_batch: most prompts answered at once.
            ep: share the routed experts among this many processes, or the ranks of a `Team`; this one is rank 0 and the
                others call `Session.serve`. Closing the session dismisses them. See `v4sdk.expert_parallel`.
            memory_limit: most main memory this process may use, in bytes or like `8GB`; routed experts that do not fit are
                read from disk as they are chosen. None asks `V4SDK_MEMORY_LIMIT`; the system's limits count always.
            on_progress: called during loading and prefill, and for notices.

        Raises:
            V4Error: naming what is wrong with the model, an option or the backend.
        """
        team = _team(ep)
        if team and not team.is_driver:
            what = f"rank {team.rank} of {team.processes} cannot load a session, only rank 0 does"
            team.close(what)
            raise ConfigError(what, hint="call Session.serve(...) there, with the same model and options")
        options = loading.LoadOptions(
            backend, numerics, kv_format, revision, strict, dialect, context_limit, team, memory_limit, prefill_chunk,
        )  # fmt: skip
        try:
            loaded = loading.open_model(model, options, on_progress or silent)
            return cls(
                loaded, context_limit=context_limit, snapshot_interval=snapshot_interval,
                prefill_chunk=prefill_chunk, max_batch=max_batch, on_progress=on_progress,
            )  # fmt: skip
        except BaseException:
            if team:
                team.close()
            raise

    @staticmethod
    def serve(
        model: str | Path | None = None, *, ep: int | Team, backend: str | Backend | None = None,
        numerics: str | Numerics | None = None, revision: str | None = None, on_progress: OnProgress | None = None,
    ) -> None:  # fmt: skip
        """Hold a share of the routed experts for the session of rank 0; returns when that is closed.

        Args:
            model, backend, numerics, revision: as rank 0 has them. ep: number of processes, or the `Team` joined before.

        Raises:
            RankLost: if another rank has ended. V4Error: as `load`.
        """
        team = _team(ep)
        if team is None or team.is_driver:
            if team:
                team.close()
            raise ConfigError("rank 0 cannot serve, it drives", hint="call Session.load(...) there")
        options = loading.LoadOptions(backend, numerics, None, revision, team=team)
        loading.serve_experts(model, options, on_progress or silent)

    @property
    def loaded(self) -> loading.Loaded:
        """The parts: folder, settings, binding, backend.

        Raises:
            StateError: after `close`.
        """
        if self._loaded is None:
            raise StateError("the session is closed", hint="load it again with Session.load(...)")
        return self._loaded

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.loaded.config

    @property
    def numerics(self) -> Numerics:
        """Which roundings run."""
        return self.loaded.numerics

    @property
    def kv_format(self) -> KVFormat:
        """How cache rows are stored."""
        return self.loaded.kv_format

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: if the folder has none; prompts of token ids work without.
        """
        return prompting.tokenizer_of(self.loaded)

    @property
    def dialect(self) -> Dialect:
        """How conversations are spelled.

        Raises:
            PromptError: if neither the folder nor the `dialect` option says.
        """
        return prompting.dialect_of(self.loaded)

    @property
    def context_limit(self) -> int:
        """Most tokens of a sequence."""
        return self._context_limit

    @property
    def default_params(self) -> SamplingParams:
        """What a None in `SamplingParams` means here."""
        return self.loaded.settings.sampling

    @property
    def default_thinking(self) -> bool:
        """Whether chat thinks unless told otherwise."""
        return self.loaded.settings.thinking

    @property
    def cache_bytes(self) -> int:
        """Memory of all sequences' rows, spare capacity included; snapshots are counted by their sequence."""
        return self.loaded.cache.nbytes

    def sequence(self) -> Sequence:
        """Make an empty sequence."""
        with self._turn() as engine:
            return Sequence(self, engine.new_state())

    def resume(self, path: str | Path) -> Sequence:
        """Read a sequence that `Sequence.save` wrote, in this process or another.

        Rows of a wider KV format are re-quantised, with a notice; of a narrower one they are widened exactly.

        Raises:
            StateError: if the file is damaged, or was written by another model or in other numerics.
        """
        with self._turn() as engine:
            found, notes = prompting.read_sequence(self.loaded, path)
            for note in notes:
                self._notice(note)
            sequence = Sequence(self, found)
            engine.remember(found)
            return sequence

    def fork_sequence(self, sequence: Sequence) -> Sequence:
        """See `Sequence.fork`."""
        with self._turn() as engine:
            return Sequence(self, engine.fork(sequence.state_for(self)))

    def rewind_sequence(self, sequence: Sequence, num_tokens: int) -> int:
        """See `Sequence.rewind`."""
        with self._turn() as engine:
            held = sequence.state_for(self)
            if not 0 <= num_tokens <= len(held.ids):
                raise StateError(f"cannot rewind to {num_tokens} tokens, expected 0 to {len(held.ids)}")
            return engine.rewind(held, num_tokens, self._checker(), self._on_chunk)

    def save_sequence(self, sequence: Sequence, path: str | Path) -> None:
        """See `Sequence.save`."""
        with self._turn():
            held = sequence.state_for(self)
            state.write_state(path, prompting.state_header(self.loaded, held), held, self.loaded.cache)

    def drop_state(self, dropped: SequenceState) -> None:
        """Take note that nobody holds this state any more; called from any thread."""
        self._dropped.append(dropped)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Many[int], params: SamplingParams | None = None, sequence: Sequence | None = None
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompts: Many[str] | Many[Many[int]],
        params: SamplingParams | None = None,
        sequence: None = None,
    ) -> list[Result]: ...

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: SamplingParams | None = None,
        sequence: Sequence | None = None,
    ) -> Result | list[Result]:
        """Continue one prompt, or several at once, without any prompt format.

        Text never becomes a control token; a text prompt of an empty sequence gets the begin-of-sentence token in front.
        A list of prompts is answered in packed batches of `max_batch`, each from a fresh state.

        Args:
            prompts: text, token ids, or a list of either. No ids at all continue `sequence` where it stands.
            params: None for the model's defaults.
            sequence: to append to; None for a fresh state.

        Raises:
            ContextOverflow, SamplingError, PromptError, StateError, Cancelled: see their texts.
        """
        if isinstance(prompts, str) or not any(isinstance(p, (str, Many)) for p in prompts):
            return self._results(*self._raw([prompts], params, sequence))[0]  # type: ignore[list-item]
        if sequence is not None:
            raise StateError(f"a sequence takes one prompt at a time, got {len(prompts)}")
        return self._results(*self._raw(prompts, params, None))  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, sequence: Sequence | None = None
    ) -> Stream:
        """Like `generate` for one prompt, piece by piece; the last piece has finish reason and usage.

        Closing the iterator early leaves a sequence at the token it has reached.
        """
        return self._raw([prompt], params, sequence)[0]

    @overload
    def chat(
        self, messages: Many[Message], *, stream: Literal[False] = False, params: SamplingParams | None = None,
        sequence: Sequence | None = None, **options: Unpack[ChatOptions],
    ) -> Result: ...  # fmt: skip

    @overload
    def chat(
        self, messages: Many[Message], *, stream: Literal[True], params: SamplingParams | None = None,
        sequence: Sequence | None = None, **options: Unpack[ChatOptions],
    ) -> Stream: ...  # fmt: skip

    def chat(
        self, messages: Many[Message], *, stream: bool = False, params: SamplingParams | None = None,
        sequence: Sequence | None = None, **options: Unpack[ChatOptions],
    ) -> Result | Stream:  # fmt: skip
        """Answer a conversation.

        With a sequence, the longest common prefix of its tokens and the new prompt is kept and the rest computed; the
        answer is the same as from a fresh state.

        Args:
            messages: dicts with `role` and `content`, as the hosted API takes them.
            stream: give an iterator of pieces instead of a result.
            options: `tools`, `tool_choice`, `thinking`, `effort`, `response_format`, `drop_thinking`, `normalise`.

        Raises:
            PromptError: if the conversation or an option is invalid, or the dialect is unknown; else as `generate`.
        """
        pieces, requests = self._chat([(messages, options)], params, sequence)
        return pieces if stream else self._results(pieces, requests)[0]

    def chat_many(
        self,
        conversations: Many[tuple[Many[Message], Mapping[str, Any]]],
        params: SamplingParams | None = None,
    ) -> list[Result]:
        """Answer several conversations, each (messages, options of `chat`), in packed batches from fresh states."""
        return self._results(*self._chat(conversations, params, None))

    def logits(
        self, ids: Many[int], positions: Many[int] | None = None, limit_bytes: int = LOGITS_LIMIT_BYTES
    ) -> Tensor:
        """Score the vocabulary after each of `positions` (all by default) of one prompt, from a fresh state.

        Shapes:
            -> [len(positions), V] float32; row i scores the token that follows ids[positions[i]]

        Raises:
            MemoryRefused: if the result is larger than `limit_bytes`.
        """
        with self._turn() as engine:
            tokens = prompting.checked_ids(self.loaded, ids, self._context_limit)
            chosen = range(len(tokens)) if positions is None else positions
            bad = [p for p in chosen if p not in range(-len(tokens), len(tokens))]
            if bad:
                raise StateError(f"position {bad[0]} is outside the prompt, expected 0 to {len(tokens) - 1}")
            rows = [int(p) % len(tokens) for p in chosen]
            size = 4 * len(rows) * self.config.vocab_size
            if size > limit_bytes:
                raise MemoryRefused(
                    f"logits of {len(rows):,} positions take {size:,} bytes, expected at most {limit_bytes:,}",
                    hint="ask for fewer positions, or raise limit_bytes",
                )
            if not rows:
                return torch.empty(0, self.config.vocab_size)
            held = engine.new_state()
            try:
                held.ids = tokens
                order = sorted(set(rows))
                at = {p: i for i, p in enumerate(order)}
                found = engine.advance(
                    [held],
                    self._checker(),
                    self._on_chunk,
                    lambda _, a, b: [p for p in range(a, b) if p in at],
                )
                return found[[at[p] for p in rows]]
            finally:
                engine.free(held)

    def cancel(self) -> None:
        """Stop what is running now; may be called from any thread, does not wait.

        While a prompt is read, the call raises `Cancelled` and its sequence stands at the last completed chunk. Once an
        answer has begun, it ends with finish reason `cancelled`, and so do all that wait in the same list.
        """
        self._cancellations += 1

    def close(self) -> None:
        """Give back weights, caches and mapped files, when what is running has ended. Closing twice is fine.

        Raises:
            StateError: inside `on_progress`; what is running is cancelled all the same.
        """
        self.cancel()
        with self._lock:
            if self._turns:
                # the lock is ours, so a call of this very thread is below us
                raise StateError(
                    "the session is still at work, and cannot be closed from its own callback",
                    hint="call cancel() there, and close it after the call has returned",
                )
            for scheduler in list(self._active):
                scheduler.close()
            if self._engine is not None:
                self._engine.close()
            if self._loaded is not None and self._loaded.team is not None:
                self._loaded.team.close()
            if self._loaded is not None:
                self._loaded.backend.close()
            self._loaded = self._engine = None
            self._dropped.clear()
            self._abandoned.clear()
        loading.collect()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _turn(self) -> Iterator[Engine]:
        """Hold the lock for one step."""
        with self._lock:
            if self._engine is None:
                raise StateError("the session is closed", hint="load it again with Session.load(...)")
            while self._abandoned:
                self._abandoned.popleft().close()
            while self._dropped:
                self._engine.free(self._dropped.popleft())
            self._turns += 1
            try:
                yield self._engine
            finally:
                self._turns -= 1

    def _cancelled(self) -> Callable[[], bool]:
        before = self._cancellations
        return lambda: self._cancellations != before

    def _checker(self) -> Callable[[], None]:
        cancelled = self._cancelled()

        def check() -> None:
            if cancelled():
                raise Cancelled("the operation was cancelled")

        return check

    def _on_chunk(self, done: int, total: int) -> None:
        self.on_progress(Progress("prefill", done, total, "tokens"))

    def _notice(self, text: str) -> None:
        loading.log.warning(text)
        self.on_progress(Progress("notice", text=text))

    def _raw(
        self, prompts: Many[Prompt], params: SamplingParams | None, sequence: Sequence | None
    ) -> tuple[Stream, list[Request]]:
        with self._turn():
            fresh = sequence is None or not len(sequence)
            ready = [prompting.raw_prompt(self.loaded, p, params, fresh) for p in prompts]
            return self._started(ready, sequence, reuse=False)

    def _chat(
        self, conversations: Many[tuple[Many[Message], Mapping[str, Any]]], params: SamplingParams | None,
        sequence: Sequence | None,
    ) -> tuple[Stream, list[Request]]:  # fmt: skip
        with self._turn():
            ready = [prompting.chat_prompt(self.loaded, m, options, params) for m, options in conversations]
            return self._started(ready, sequence, reuse=True)

    def _started(
        self, ready: list[prompting.Ready], sequence: Sequence | None, reuse: bool
    ) -> tuple[Stream, list[Request]]:
        """Check everything, then touch the sequence: nothing is left behind when a prompt is refused."""
        with self._turn() as engine:
            held = None if sequence is None else sequence.state_for(self)
            for one in ready:
                before = 0 if held is None or reuse else len(held.ids)
                if not one.ids and not before:
                    raise StateError(
                        "the prompt is empty, expected at least one token", hint="give it some text"
                    )
                self._check_length(one, before)
            requests = [
                prompting.request(self.loaded, engine, one, held, stream, self._context_limit, reuse)
                for stream, one in enumerate(ready)
            ]
            scheduler = Scheduler(engine, requests, self._max_batch, self._cancelled(), self._on_chunk)
            self._active.add(scheduler)
            return Stream(scheduler, self._turn, self._abandoned.append), requests

    def _check_length(self, one: prompting.Ready, before: int) -> None:
        prompting.check_length(one, before, self._context_limit)
        trained = self.loaded.settings.trained_context
        if trained is not None and before + len(one.ids) > trained and not self._noticed:
            self._noticed = True
            self._notice(
                f"the prompt has {before + len(one.ids):,} tokens, more than the {trained:,} this model was trained for; "
                f"expect worse answers"
            )

    @staticmethod
    def _results(pieces: Stream, requests: list[Request]) -> list[Result]:
        for _ in pieces:
            pass
        return [r.transcript.result for r in requests if r.transcript.result is not None]


def _team(ep: int | Team | None) -> Team | None:
    """The ranks this one works with; None where there are no others."""
    team = Team.join(ep) if isinstance(ep, int) else ep
    return team if team and team.processes > 1 else None
