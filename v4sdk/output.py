"""What generation gives out: pieces, results and usage; and the readers that turn token ids into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from v4sdk.decode import TokenLogprob
from v4sdk.prompts import CompletionParser, ToolCall
from v4sdk.prompts.stops import StopFilter
from v4sdk.tokenizer import Tokenizer

Kind = Literal["content", "reasoning", "tool_call"]
# `stop`: end token or stop string; `length`: max_tokens; `tool_calls`; `cancelled`: by `Session.cancel`
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, and seconds.

    Attributes:
        prompt_tokens: the whole prompt. cached_tokens: those whose state was there already.
        recomputed_tokens: those that had been computed before and were computed again, to go back to a snapshot.
        completion_tokens: generated, end token included; reasoning_tokens: those up to `</think>`.
        prefill_s: until the first token was drawn. decode_s: from there to the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Piece:
    """One part of an answer as it is generated. The texts of one kind, joined, are the result's.

    Attributes:
        ids, logprobs: tokens since the piece before; text may lag behind tokens.
        tool_call: a complete call, on pieces of that kind.
        finish_reason, usage: on the last piece only, which has no text.
    """

    kind: Kind
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_call: ToolCall | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer.

    Attributes:
        reasoning: None where the model was not asked to think and did not.
        ids: every generated token, the end token included. logprobs: of each, when asked for.
        stop: the stop string that ended it. error: why call markup was not taken as a call.
        seed: what its draws came from; give it again for the same answer.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    stop: str | None = None
    error: str | None = None
    seed: int | None = None


class Reader(Protocol):
    """Turns the token ids of one answer into pieces and a result; `ids` and `usage` are added by the caller."""

    @property
    def stopped(self) -> bool: ...
    @property
    def is_reasoning(self) -> bool: ...
    def feed(self, token_id: int) -> list[Piece]: ...
    def finish(self, reason: FinishReason) -> list[Piece]: ...
    def result(self) -> Result: ...


class RawReader:
    """Plain text with stop strings; without a tokenizer there is no text, only ids."""

    is_reasoning = False

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._stops = StopFilter(stop)
        self._text: list[str] = []
        self._reason: FinishReason = "stop"

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stops.found is not None

    def feed(self, token_id: int) -> list[Piece]:
        """Take one id and return what it completes."""
        if self._decoder is None:
            return []
        return self._say(self._stops.feed(self._decoder.feed([token_id])))

    def finish(self, reason: FinishReason) -> list[Piece]:
        """End the answer and return what was held back."""
        self._reason = reason
        rest = self._decoder.finish() if self._decoder else ""
        return self._say(self._stops.feed(rest) + self._stops.flush())

    def result(self) -> Result:
        """Everything so far."""
        return Result("".join(self._text), finish_reason=self._reason, stop=self._stops.found)

    def _say(self, text: str) -> list[Piece]:
        if not text:
            return []
        self._text.append(text)
        return [Piece("content", text)]


class ChatReader:
    """A completion parsed into content, reasoning and tool calls."""

    def __init__(self, parser: CompletionParser) -> None:
        self._parser = parser
        self._reason: FinishReason = "stop"

    @property
    def stopped(self) -> bool:
        """The answer is complete."""
        return self._parser.stopped

    @property
    def is_reasoning(self) -> bool:
        """The next token belongs to the reasoning."""
        return self._parser.phase == "reasoning"

    def feed(self, token_id: int) -> list[Piece]:
        """Take one id and return what it completes."""
        return [Piece(e.kind, e.text, tool_call=e.tool_call) for e in self._parser.feed([token_id])]

    def finish(self, reason: FinishReason) -> list[Piece]:
        """End the answer and return what was held back."""
        self._reason = reason
        return [Piece(e.kind, e.text, tool_call=e.tool_call) for e in self._parser.finish(reason)]

    def result(self) -> Result:
        """Everything so far."""
        done = self._parser.result()
        reason: FinishReason = "tool_calls" if done.finish_reason == "tool_calls" else self._reason
        return Result(
            done.content, done.reasoning, done.tool_calls, finish_reason=reason, stop=self._parser.stop_string,
            error=done.error,
        )  # fmt: skip


class Transcript:
    """Pairs a reader's pieces with the tokens they came from, and collects the result."""

    def __init__(self, reader: Reader, usage: Usage, keep_logprobs: bool, seed: int | None) -> None:
        self._reader, self._keep, self._seed = reader, keep_logprobs, seed
        self._tokens: list[TokenLogprob] = []
        self._given = 0
        self.usage = usage
        self.result: Result | None = None

    @property
    def stopped(self) -> bool:
        """The reader wants no more."""
        return self._reader.stopped

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def feed(self, token: TokenLogprob, shown: bool = True) -> list[Piece]:
        """Take one token; `shown` False keeps it out of the text."""
        self._tokens.append(token)
        reasoning = int(self._reader.is_reasoning)
        self.usage = replace(
            self.usage,
            completion_tokens=self.usage.completion_tokens + 1,
            reasoning_tokens=self.usage.reasoning_tokens + reasoning,
        )
        return self._paired(self._reader.feed(token.id) if shown else [])

    def finish(self, reason: FinishReason, prefill_s: float, decode_s: float) -> list[Piece]:
        """End it: the pieces held back, and the last one with reason and usage."""
        pieces = self._paired(self._reader.finish(reason))
        done = self._reader.result()
        self.usage = replace(self.usage, prefill_s=prefill_s, decode_s=decode_s)
        self.result = replace(
            done,
            ids=tuple(t.id for t in self._tokens),
            logprobs=tuple(self._tokens) if self._keep else (),
            usage=self.usage,
            seed=self._seed,
        )
        last = Piece("content", finish_reason=done.finish_reason, usage=self.usage)
        return [*pieces, *self._paired([last])]

    def _paired(self, pieces: list[Piece]) -> list[Piece]:
        if not pieces:
            return []
        new, self._given = self._tokens[self._given :], len(self._tokens)
        ids, kept = tuple(t.id for t in new), tuple(new) if self._keep else ()
        return [replace(pieces[0], ids=ids, logprobs=kept), *pieces[1:]]
