"""Chat prompts: dialects, the encoder, and the parser of completions. Knows no model and no hardware."""

from __future__ import annotations

from v4sdk.prompts.completion import Completion, Event, completion_start
from v4sdk.prompts.dialect import Dialect, Frame
from v4sdk.prompts.dsml import ToolCall
from v4sdk.prompts.encode import encode_chat
from v4sdk.prompts.options import resolve_effort
from v4sdk.prompts.parse import CompletionParser
from v4sdk.prompts.span import Span, plain

__all__ = [
    "Completion",
    "CompletionParser",
    "Dialect",
    "Event",
    "Frame",
    "Span",
    "ToolCall",
    "completion_start",
    "encode_chat",
    "plain",
    "resolve_effort",
]
