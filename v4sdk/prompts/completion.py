"""What a parsed completion consists of, and where the completion of a prompt begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.dsml import ToolCall
from v4sdk.prompts.span import Span

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
