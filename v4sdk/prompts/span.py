"""Prompt pieces: text that must never become a control token, and control tokens that are never text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of a rendered prompt.

    Args:
        text: the spelling. Of a control span: exactly one added token of the tokenizer.
        control: whether the piece is that token (True) or ordinary text (False).
    """

    text: str
    control: bool = False


class SpanWriter:
    """Collects spans and joins neighbouring text, which a tokenizer has to see as one."""

    def __init__(self, spellings: Iterable[str] = ()) -> None:
        # longest first, so that one spelling inside another cannot shadow it
        self._spellings = sorted(set(spellings), key=len, reverse=True)
        self._done: list[Span] = []
        self._text: list[str] = []

    def text(self, text: str) -> None:
        """Append text of unknown origin: never read for control tokens."""
        if text:
            self._text.append(text)

    def control(self, token: str) -> None:
        """Append one control token."""
        self._flush()
        self._done.append(Span(token, True))

    def trusted(self, text: str) -> None:
        """Append the dialect's own wording, in which a spelled control token is that token."""
        while text:
            at, token = self._next(text)
            if token is None:
                self.text(text)
                return
            self.text(text[:at])
            self.control(token)
            text = text[at + len(token) :]

    def spans(self) -> list[Span]:
        """Return what was collected so far."""
        self._flush()
        return list(self._done)

    def _next(self, text: str) -> tuple[int, str | None]:
        best: tuple[int, str | None] = (len(text), None)
        for token in self._spellings:
            at = text.find(token)
            if 0 <= at < best[0]:
                best = (at, token)
        return best

    def _flush(self) -> None:
        if self._text:
            self._done.append(Span("".join(self._text)))
            self._text.clear()


def plain(spans: Sequence[Span]) -> str:
    """Return the prompt as one string, for display and for comparison with reference renderings."""
    return "".join(span.text for span in spans)
