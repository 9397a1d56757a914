"""A conversation on a terminal: the state is kept from turn to turn, and an error ends a turn, not the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4sdk.cli.errors import show_error
from v4sdk.cli.inputs import conversation
from v4sdk.cli.serve import held_sequence, show
from v4sdk.cli.settings import Settings
from v4sdk.errors import PromptError, RankLost, V4Error

if TYPE_CHECKING:
    from v4sdk.output import Piece
    from v4sdk.session import Session


def chat(session: Session, settings: Settings) -> int:
    """Converse until the user leaves."""
    _enable_line_editing()
    talk = _Conversation(session, settings)
    click.echo(
        "Type a message; /reset starts over, /save FILE writes the state, /exit or Ctrl-D leaves.", err=True
    )
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            break
        if text == "/exit":
            break
        with _errors_end_the_turn():
            talk.take(text)
    if settings.save is not None:
        talk.save(settings.save)
    return 0


class _Conversation:
    """The turns so far and the sequence that has read them."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session, self._settings = session, settings
        self._held = held_sequence(session, settings) or session.sequence()
        self._turns: list[dict[str, Any]] = []

    def take(self, text: str) -> None:
        """Do what one line asks for."""
        command, _, rest = text.partition(" ")
        if command == "/reset":
            self._held, self._turns = self._session.sequence(), []
        elif command == "/save":
            if not rest.strip():
                raise PromptError("`/save` names no file", hint="/save FILE")
            self.save(Path(rest.strip()))
        elif text.startswith("/") and text[1:].isalpha():
            # one word only: a message may well begin with a path
            raise PromptError(f"command `{text}` is unknown", hint="known: /reset, /save FILE, /exit")
        elif text:
            self._answer(text)

    def save(self, path: Path) -> None:
        """Write the state."""
        self._held.save(path)

    def _answer(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})
        said = {"content": "", "reasoning": ""}
        try:
            show(self._session, lambda: self._pieces(said), None, self._settings)
        except V4Error:
            self._turns.pop()
            raise
        self._turns.append(
            {"role": "assistant", "content": said["content"], "reasoning_content": said["reasoning"]}
        )

    def _pieces(self, said: dict[str, str]) -> Iterator[Piece]:
        settings = self._settings
        pieces = self._session.chat(
            conversation(None, self._turns, settings.system),
            stream=True,
            params=settings.params(),
            sequence=self._held,
            **settings.chat_options,
        )
        for piece in pieces:
            if piece.kind in said:
                said[piece.kind] += piece.text
            yield piece


@contextmanager
def _errors_end_the_turn() -> Iterator[None]:
    try:
        yield
    except RankLost:
        # no further turn can be answered
        raise
    except V4Error as exc:
        show_error(exc)


def _enable_line_editing() -> None:
    """Give `input` history and cursor keys, where Python was built with them."""
    with suppress(ImportError):
        import readline  # noqa: F401
