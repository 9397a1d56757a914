"""Read tool calls back: where a call block opens, and what one closed invoke says.

Works on text in which a real DSML token is the single character `MARK`, so that text which merely looks like
markup is never markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.tools import to_json

# a lone surrogate cannot come out of decoded text
MARK = "\ud800"
# how long a block name or the space behind it may be before it is taken for prose
MAX_WORD = 32
_WORD = re.compile(r"[^<>\n\"=\ud800-\udfff]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_PARAMETER = re.compile(r' name="([^"\ud800-\udfff]*)" string="(true|false)">')


class Verdict(Enum):
    """What the text so far says about a tag."""

    YES = "yes"
    NO = "no"
    MORE = "more text is needed"


@dataclass(frozen=True)
class ToolCall:
    """A call the model made, checked against the declared tools.

    Args:
        arguments: JSON text of an object.
    """

    id: str
    name: str
    arguments: str


class CallRefused(Exception):
    """An invoke that cannot be a call; the message says why. Never leaves this package."""


class Markup:
    """The tag words of one dialect. A space before a word is optional, as the versions differ in it."""

    def __init__(self, dialect: Dialect) -> None:
        self.invoke = dialect.invoke_word.strip()
        self.parameter = dialect.parameter_word.strip()
        self.calls = dialect.calls_word.strip()
        self._invoke_close = re.compile(f"</{MARK} ?{re.escape(self.invoke)}>")
        self._parameter_open = re.compile(f"<{MARK} ?{re.escape(self.parameter)}(?= name=)")
        self._parameter_close = re.compile(f"</{MARK} ?{re.escape(self.parameter)}>")
        self._calls_open = re.compile(f"<{MARK} ?{re.escape(self.calls)}>")
        words = "|".join(map(re.escape, (self.invoke, self.parameter, self.calls)))
        self._nested = re.compile(f"</?{MARK} ?(?:{words})[ >]")

    def invoke_at(self, text: str, at: int) -> Verdict:
        """Say whether an invoke opens at `at`."""
        rest = text[at : at + len(self.invoke) + 10]
        verdict = Verdict.NO
        for space in ("", " "):
            tag = f'<{MARK}{space}{self.invoke} name="'
            if rest.startswith(tag):
                return Verdict.YES
            if tag.startswith(rest):
                verdict = Verdict.MORE
        return verdict

    def block_at(self, text: str, at: int) -> tuple[Verdict, int]:
        """Say whether a call block opens at `at`, and where its first invoke begins.

        A block is an invoke, or any short name in a tag that an invoke follows: a misspelt block name is a
        known habit of the model, a name followed by anything else is prose.
        """
        direct = self.invoke_at(text, at)
        if direct is Verdict.YES:
            return direct, at
        word = _WORD.match(text, at + 2)
        end = at + 2 if word is None else word.end()
        if end - at > MAX_WORD:
            return Verdict.NO, at
        if end == len(text):
            return Verdict.MORE, at
        if text[end] != ">":
            return Verdict.NO, at
        first = skip_space(text, end + 1)
        if first - end > MAX_WORD:
            return Verdict.NO, at
        return self.invoke_at(text, first), first

    def names_block(self, text: str, at: int) -> bool:
        """Say whether the tag at `at` is the opening tag of a call block, whatever follows it."""
        return self._calls_open.match(text, at) is not None

    def block_end(self, text: str, at: int) -> tuple[Verdict, int]:
        """Say whether a closing tag of a block stands at `at`, and where it ends."""
        if not text.startswith(f"</{MARK}"[: len(text) - at], at):
            return Verdict.NO, at
        word = _WORD.match(text, at + 3)
        end = len(text) if word is None else word.end()
        if end >= len(text):
            return (Verdict.MORE if end - at <= MAX_WORD else Verdict.NO), at
        return (Verdict.YES, end + 1) if text[end] == ">" and end - at <= MAX_WORD else (Verdict.NO, at)

    def invoke_end(self, text: str, at: int) -> int | None:
        """Return where the invoke that opens at `at` ends, None while it is not closed."""
        found = self._invoke_close.search(text, at)
        return None if found is None else found.end()

    def read_invoke(self, text: str, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
        """Return name and JSON arguments of one whole invoke.

        Raises:
            CallRefused: if it is malformed or does not fit the declared tools.
        """
        at = text.index('"') + 1
        name, quote, _ = text[at:].partition('"')
        at += len(name) + 1
        if not quote or not text.startswith(">", at):
            _refuse("the invoke tag is malformed")
        if name not in tools:
            _refuse(f"tool `{name}` is not among the declared tools {sorted(tools)}")
        close = self._invoke_close.search(text, at)
        values = self._parameters(text[at + 1 : len(text) if close is None else close.start()], name)
        missing = [key for key in _required(tools[name]) if key not in values]
        if missing:
            _refuse(f"call of `{name}` lacks the required parameters {missing}")
        return name, "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in values.items()) + "}"

    def _parameters(self, text: str, name: str) -> dict[str, str]:
        """Return parameter names and their values as JSON text."""
        values: dict[str, str] = {}
        at = skip_space(text, 0)
        while at < len(text):
            opened = self._parameter_open.match(text, at)
            head = None if opened is None else _PARAMETER.match(text, opened.end())
            if head is None:
                _refuse(f"call of `{name}` holds something that is not a parameter")
            closed = self._parameter_close.search(text, head.end())
            key, kind = head.groups()
            if closed is None:
                _refuse(f"parameter `{key}` of `{name}` is not closed")
            if key in values:
                _refuse(f"parameter `{key}` of `{name}` is given twice")
            values[key] = self._value(
                text[head.end() : closed.start()], kind == "true", f"`{key}` of `{name}`"
            )
            at = skip_space(text, closed.end())
        return values

    def _value(self, raw: str, is_text: bool, what: str) -> str:
        if self._nested.search(raw):
            # either a closing tag is missing or the value quotes markup: two readings, so none
            _refuse(f"the value of parameter {what} contains call markup")
        if is_text:
            return to_json(raw)
        try:
            json.loads(raw, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            _refuse(f"the value of parameter {what} is not JSON")
        return raw.strip()


def skip_space(text: str, at: int) -> int:
    """Return the first position from `at` on that is not white space."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _required(function: Mapping[str, Any]) -> Sequence[str]:
    parameters = function.get("parameters")
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    return required if isinstance(required, Sequence) and not isinstance(required, str) else ()


def _no_constant(word: str) -> NoReturn:
    raise ValueError(word)


def _refuse(message: str) -> NoReturn:
    raise CallRefused(message)


def control_marks(dialect: Dialect) -> tuple[dict[str, str], dict[str, str]]:
    """Return one private character per control token of the dialect, and the way back."""
    others = [token for token in dialect.control_tokens if token != dialect.dsml]
    marks = {dialect.dsml: MARK} | {token: chr(ord(MARK) + 1 + n) for n, token in enumerate(others)}
    return marks, {mark: token for token, mark in marks.items()}
