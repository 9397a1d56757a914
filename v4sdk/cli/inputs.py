"""Reads prompts: arguments, files, standard input, and JSON Lines of requests."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4sdk.errors import PromptError

SAMPLING_FIELDS: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop")
OPTION_FIELDS: tuple[str, ...] = ("tools", "tool_choice", "response_format", "thinking", "effort")
_REQUEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": object,
    "prompt": str,
    "messages": list,
    "system": str,
    "tools": list,
    "tool_choice": (str, dict),
    "response_format": dict,
    "thinking": bool,
    "effort": str,
    "raw": bool,
    **dict.fromkeys(SAMPLING_FIELDS, object),
}


@dataclass(frozen=True)
class Request:
    """One line of a prompts file.

    Attributes:
        index: from 0; id: echoed as given; messages: the conversation, or None for a raw `prompt`.
        options: `tools`, `tool_choice`, `response_format`, `thinking`, `effort`, where given.
        sampling: the sampling fields that were given.
    """

    index: int
    id: Any
    prompt: str | None
    messages: list[dict[str, Any]] | None
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


def decode(data: bytes, source: str, replace_invalid: bool) -> str:
    """Decode UTF-8.

    Raises:
        PromptError: with the byte offset of the first invalid sequence, unless it may be replaced.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        if replace_invalid:
            return data.decode("utf-8", errors="replace")
        raise PromptError(
            f"{source} is not valid UTF-8: byte 0x{data[exc.start]:02x} at offset {exc.start}",
            hint="convert it, or go on with --replace-invalid",
        ) from None


def read_file(path: Path, replace_invalid: bool) -> str:
    """Read a text file; `-` is standard input.

    Raises:
        PromptError: if it cannot be read, holds nothing, or no valid UTF-8.
    """
    if str(path) == "-":
        return read_stdin(replace_invalid)
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise PromptError(f"`{path}` cannot be read: {exc.strerror}") from None
    if not data:
        raise PromptError(f"`{path}` is empty, expected text")
    return decode(data, f"`{path}`", replace_invalid)


def read_stdin(replace_invalid: bool) -> str:
    """Read standard input to its end.

    Raises:
        PromptError: if it holds nothing, or no valid UTF-8.
    """
    # a program started without standard input has none
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    if not data:
        raise PromptError(
            "standard input is empty, expected a prompt", hint='v4sdk run "..." takes it as an argument'
        )
    return decode(data, "standard input", replace_invalid)


def check_argument(text: str, replace_invalid: bool) -> str:
    """A command-line argument arrives with its invalid bytes escaped; judge it like any other input."""
    return decode(os.fsencode(text), "the prompt argument", replace_invalid)


def read_requests(path: Path, replace_invalid: bool, raw: bool, system: str | None) -> list[Request]:
    """Read a whole file of requests, so a mistake in the last line is found before the first answer.

    Raises:
        PromptError: naming the file and the line.
    """
    requests: list[Request] = []
    # only "\n" ends a line: JSON strings may hold other line separators
    for number, line in enumerate(read_file(path, replace_invalid).split("\n"), 1):
        if line.strip():
            requests.append(_request(len(requests), line, f"`{path}` line {number}", raw, system))
    if not requests:
        raise PromptError(
            f"`{path}` holds no request", hint='write one JSON object per line, such as {"prompt": "..."}'
        )
    return requests


def _request(index: int, line: str, where: str, raw: bool, system: str | None) -> Request:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as exc:
        raise PromptError(f"{where} is not JSON: {exc}") from None
    if not isinstance(fields, dict):
        raise PromptError(f"{where} is a JSON {type(fields).__name__}, expected an object")
    for name, value in fields.items():
        if name not in _REQUEST_FIELDS:
            raise PromptError(
                f"{where} has unknown field `{name}`", hint=f"known: {', '.join(_REQUEST_FIELDS)}"
            )
        if not isinstance(value, _REQUEST_FIELDS[name]):
            raise PromptError(f"{where} has `{name}` of type {type(value).__name__}")
    if ("prompt" in fields) == ("messages" in fields):
        raise PromptError(f"{where} has to hold either `prompt` or `messages`")
    return _checked(index, fields, where, raw, system)


def _checked(index: int, fields: dict[str, Any], where: str, raw: bool, system: str | None) -> Request:
    raw = fields.get("raw", raw)
    messages = fields.get("messages")
    if raw and (messages is not None or "tools" in fields):
        raise PromptError(f"{where} is raw and has messages or tools, expected only `prompt`")
    if not raw:
        messages = conversation(fields.get("prompt"), messages, fields.get("system", system))
    options = {name: fields[name] for name in OPTION_FIELDS if name in fields}
    sampling = {name: fields[name] for name in SAMPLING_FIELDS if name in fields}
    return Request(index, fields.get("id"), fields.get("prompt"), messages, options, sampling)


def conversation(
    prompt: str | None, messages: list[dict[str, Any]] | None, system: str | None
) -> list[dict[str, Any]]:
    """Put a system message, where one is given, in front of a conversation or of one user prompt."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, *(messages if messages is not None else [{"role": "user", "content": prompt}])]
