"""What `v4sdk run` does with a loaded session: answer once, answer many, go on."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from v4sdk.cli.inputs import Request, conversation
from v4sdk.cli.settings import Settings
from v4sdk.cli.stream import (
    EventPrinter,
    ProgressLine,
    TextPrinter,
    batch_line,
    paging_line,
    result_json,
    show_all,
    show_json,
    speed_line,
)
from v4sdk.errors import Cancelled, RankLost, V4Error

if TYPE_CHECKING:
    from v4sdk.expert_parallel import Team
    from v4sdk.output import Piece, Result, Usage
    from v4sdk.sequence import Sequence as HeldSequence
    from v4sdk.session import Session

EXIT_CANCELLED = 130
_BATCH = 16


@contextmanager
def open_session(settings: Settings, team: Team | None = None) -> Iterator[Session]:
    """Load the model, saying on stderr how far that is and what the user should know."""
    # torch comes with it: everything that can be refused without has been
    from v4sdk.session import Session

    quiet_log()
    progress = ProgressLine()
    session = Session.load(
        settings.model,
        backend=settings.backend,
        numerics=settings.numerics,
        kv_format=settings.kv_format,
        revision=settings.revision,
        strict=settings.strict,
        dialect=settings.dialect,
        ep=team,
        memory_limit=settings.memory_limit,
        on_progress=progress,
    )
    progress.clear()
    with session:
        _introduce(session)
        yield session


def quiet_log() -> None:
    """Notices arrive as progress; without a handler, logging would print each a second time."""
    logging.getLogger("v4sdk").addHandler(logging.NullHandler())


def _introduce(session: Session) -> None:
    loaded = session.loaded
    if loaded.is_bundled:
        tasks = ", ".join(task["about"] for task in loaded.settings.raw.get("demo", {}).get("tasks", ()))
        does = f", trained to {tasks}" if tasks else ""
        click.echo(
            f"note: this is v4-nano, a small demonstration model{does}; name a real checkpoint with --model PATH|ID",
            err=True,
        )
    bare, total = loaded.binding.without_kernel, len(loaded.binding.ops)
    if bare:
        names = "" if len(bare) == total else ": " + ", ".join(row.op for row in bare)
        click.echo(
            f"note: {len(bare)} of {total} ops run the reference on {loaded.backend.name}{names}", err=True
        )


def answer(session: Session, text: str, settings: Settings) -> int:
    """Answer one prompt."""
    held = held_sequence(session, settings)

    def start() -> Iterator[Piece]:
        if settings.raw:
            return session.stream(text, settings.params(), held)
        messages = conversation(text, None, settings.system)
        return session.chat(
            messages, stream=True, params=settings.params(), sequence=held, **settings.chat_options
        )

    return show(session, start, held, settings)


def go_on(session: Session, settings: Settings) -> int:
    """Let a saved answer go on where it stopped."""
    held = held_sequence(session, settings)
    return show(session, lambda: session.stream([], settings.params(), held), held, settings)


def held_sequence(session: Session, settings: Settings) -> HeldSequence | None:
    if settings.resume is not None:
        return session.resume(settings.resume)
    return session.sequence() if settings.save is not None else None


def show(
    session: Session, start: Callable[[], Iterator[Piece]], held: HeldSequence | None, settings: Settings
) -> int:
    printer = EventPrinter() if settings.as_json else TextPrinter()
    if isinstance(printer, EventPrinter):
        printer.event("start", **_setting(session))
    cancelled, usage = False, None
    try:
        with _cancel_on_interrupt(session) as interrupted:
            usage = show_all(start(), printer)
            cancelled = interrupted()
    except Cancelled:
        cancelled = True
    if usage is not None:
        click.echo(speed_line(usage, _setting_words(session)), err=True)
        _show_paging(session, [usage])
    if held is not None and settings.save is not None:
        held.save(settings.save)
    return EXIT_CANCELLED if cancelled else 0


def answer_requests(session: Session, requests: Sequence[Request], settings: Settings) -> int:
    """Answer a file of requests in packed batches; a request that fails becomes a line with its error."""
    usages: list[Usage] = []
    failed, start = False, time.monotonic()
    with _cancel_on_interrupt(session) as interrupted:
        for batch in _batches(requests):
            for request, outcome in _outcomes(session, batch, settings):
                fields: dict[str, Any] = {"index": request.index} | (
                    {} if request.id is None else {"id": request.id}
                )
                if isinstance(outcome, V4Error):
                    failed = True
                    fields |= {"error": outcome.message, "hint": outcome.hint}
                else:
                    usages.append(outcome.usage)
                    fields |= result_json(outcome)
                show_json(fields)
            if interrupted():
                return EXIT_CANCELLED
    click.echo(batch_line(usages, time.monotonic() - start, _setting_words(session)), err=True)
    _show_paging(session, usages)
    return int(failed)


def _show_paging(session: Session, usages: Sequence[Usage]) -> None:
    """Say how often experts were in memory and what the disk gave, where they come from disk."""
    if session.loaded.paging is not None:
        tokens = sum(
            u.prompt_tokens - u.cached_tokens + u.recomputed_tokens + u.completion_tokens for u in usages
        )
        click.echo(paging_line(session.loaded.paging.usage(), tokens), err=True)


def _batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Neighbours of one kind with the same sampling, a few at a time, so that results appear on the way."""
    for _, group in groupby(requests, key=lambda r: (r.messages is None, repr(sorted(r.sampling.items())))):
        alike = list(group)
        for at in range(0, len(alike), _BATCH):
            yield alike[at : at + _BATCH]


def _outcomes(
    session: Session, batch: list[Request], settings: Settings
) -> list[tuple[Request, Result | V4Error]]:
    try:
        params = settings.params(batch[0].sampling)
        if batch[0].messages is None:
            results = session.generate([str(r.prompt) for r in batch], params)
        else:
            asked = [(r.messages or [], {**settings.chat_options, **r.options}) for r in batch]
            results = session.chat_many(asked, params)
        return list(zip(batch, results, strict=True))
    except Cancelled:
        return []
    except RankLost:
        # every further request would fail with it
        raise
    except V4Error as exc:
        if len(batch) == 1:
            return [(batch[0], exc)]
        # one of them is wrong: find out which
        return [outcome for request in batch for outcome in _outcomes(session, [request], settings)]


@contextmanager
def _cancel_on_interrupt(session: Session) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end the answer cleanly, and a second one end the program."""
    count = 0

    def cancel(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        session.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _setting(session: Session) -> dict[str, Any]:
    return {
        "model": "v4-nano" if session.loaded.is_bundled else str(session.loaded.folder),
        "backend": session.loaded.backend.name,
        "numerics": session.numerics.name,
        "kv_format": session.kv_format,
    }


def _setting_words(session: Session) -> str:
    return f"{session.numerics.name} numerics, {session.kv_format} KV, {session.loaded.backend.name}"
