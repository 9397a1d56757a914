"""What a parsed completion consists of, and where the completion of a prompt begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.dsml import ToolCall
from v4sdk.prompts.span import Span
from v4sdk.prompts.stops import StopFilter

Phase = Literal["reasoning", "content", "calls", "done"]


@dataclass(frozen=True)
class Event:
    """One piece of a parsed completion; `tool_call` is set on events of that kind only."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    tool_call: ToolCall | None = None


@dataclass(frozen=True)
class Completion:
    """A whole parsed completion.

    Args:
        reasoning: None when the completion was neither asked to think nor did so.
        error: why call markup was not taken as a call; its text is then part of the content.
        trailing: text behind a finished call block, which is not part of the answer.
    """

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    error: str | None = None
    trailing: str = ""


class Collector:
    """Gathers what a parser gives out: text without the line breaks at its start, content up to a stop string."""

    def __init__(self, stop: Sequence[str], *, continues: bool) -> None:
        self._stops = StopFilter(stop)
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self._events: list[Event] = []
        self.calls: list[ToolCall] = []
        self.at_start = not continues

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the content."""
        return self._stops.found

    @property
    def nothing_said(self) -> bool:
        """Whether no text at all was given out, nor stood in the prompt already."""
        return self.at_start and not any(self._texts.values())

    def say(self, kind: Literal["content", "reasoning"], text: str) -> None:
        """Give out text."""
        text = text.lstrip("\n") if self.at_start else text
        if not text:
            return
        self.at_start = False
        self._put(kind, self._stops.feed(text) if kind == "content" else text)

    def call(self, name: str, arguments: str) -> None:
        """Give out a tool call."""
        call = ToolCall(f"call_{len(self.calls)}", name, arguments)
        self.calls.append(call)
        self._events.append(Event("tool_call", arguments, call))

    def flush(self) -> None:
        """Give out the content that was held back for a stop string, which cannot reach across this point."""
        self._put("content", self._stops.flush())

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events

    def text(self, kind: Literal["content", "reasoning"]) -> str:
        """Return all text of a kind."""
        return "".join(self._texts[kind])

    def _put(self, kind: Literal["content", "reasoning"], text: str) -> None:
        if text:
            self._texts[kind].append(text)
            self._events.append(Event(kind, text))


def completion_start(spans: Sequence[Span], dialect: Dialect) -> Phase:
    """Return where a completion of this prompt begins: in reasoning, in content or in a call block."""
    for index in range(len(spans) - 1, -1, -1):
        span = spans[index]
        if span.control and span.text == dialect.think:
            return "reasoning"
        if span.control and span.text == dialect.dsml:
            # a call that the prompt itself finished is closed by EOS, so this block is open
            return "calls"
        if span.control:
            return "content"
    return "content"


def prompt_thinks(spans: Sequence[Span], dialect: Dialect) -> bool:
    """Whether the last assistant turn of a prompt was opened with reasoning."""
    header = Span(dialect.assistant, True)
    last = max((index for index, span in enumerate(spans) if span == header), default=len(spans))
    return spans[last + 1 : last + 2] == [Span(dialect.think, True)]
