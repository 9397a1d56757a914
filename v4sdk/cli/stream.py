"""Shows an answer while it is made: text for people, events for programs; speed and progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from v4sdk.backend import PagingUsage
    from v4sdk.output import Piece, Result, Usage
    from v4sdk.progress import Progress
    from v4sdk.prompts import ToolCall

_PROGRESS_TTY_S = 0.2
_PROGRESS_PIPE_S = 10.0
_LABELS = {"notice": "note"}


class Printer(Protocol):
    """Takes the pieces of one answer."""

    def show(self, piece: Piece) -> None: ...


class TextPrinter:
    """Content on stdout, reasoning on stderr."""

    def __init__(self) -> None:
        self._last = ""
        self._reasoning = ""

    def show(self, piece: Piece) -> None:
        """Print one piece at once."""
        if piece.kind == "reasoning":
            self._reasoning = piece.text or self._reasoning
            click.echo(click.style(piece.text, dim=True), nl=False, err=True)
            return
        if piece.text or piece.tool_call or piece.finish_reason:
            self._end_reasoning()
        text = piece.text
        if piece.tool_call is not None:
            text = (
                ("" if self._last in ("", "\n") else "\n")
                + json.dumps({"tool_call": call_json(piece.tool_call)})
                + "\n"
            )
        if piece.finish_reason is not None and self._last not in ("", "\n"):
            text += "\n"
        if text:
            self._last = text[-1]
            click.echo(text, nl=False)

    def _end_reasoning(self) -> None:
        if self._reasoning and not self._reasoning.endswith("\n"):
            click.echo(err=True)
        self._reasoning = ""


class EventPrinter:
    """One JSON object per piece on stdout."""

    def show(self, piece: Piece) -> None:
        """Print one piece at once."""
        if piece.finish_reason is not None:
            usage = usage_json(piece.usage) if piece.usage else None
            self.event("finish", finish_reason=piece.finish_reason, usage=usage, ids=list(piece.ids))
            return
        fields: dict[str, Any] = {"ids": list(piece.ids)}
        if piece.tool_call is not None:
            fields["tool_call"] = call_json(piece.tool_call)
        else:
            fields["text"] = piece.text
        self.event(piece.kind, **fields)

    def event(self, name: str, **fields: Any) -> None:
        """Print one event."""
        show_json({"event": name} | fields)


class ProgressLine:
    """Says how far loading or a long prefill is, in place on a terminal and now and then elsewhere; notices in full."""

    def __init__(self) -> None:
        self._is_tty = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._open = False

    def __call__(self, report: Progress) -> None:
        """Show one report, unless the last one is fresh."""
        if report.text:
            self.clear()
            click.echo(f"{_LABELS.get(report.kind, report.kind)}: {report.text}", err=True)
            return
        now = time.monotonic()
        if report.done >= report.total:
            self.clear()
        elif now - self._shown >= (_PROGRESS_TTY_S if self._is_tty else _PROGRESS_PIPE_S):
            self._shown = now
            self._say(f"{report.kind} {report.done:,} / {report.total:,} {report.unit}")

    def _say(self, line: str) -> None:
        if self._is_tty:
            self._open = True
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)
        else:
            click.echo(line, err=True)

    def clear(self) -> None:
        """Take an unfinished line off the terminal."""
        if self._open:
            click.echo("\r\x1b[K", nl=False, err=True)
        self._open = False


def show_json(fields: dict[str, Any]) -> None:
    """Print one JSON line, escaped where stdout could not carry every character."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(fields, ensure_ascii=not utf8))


def call_json(call: ToolCall) -> dict[str, Any]:
    """A tool call in the shape the chat messages take back."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage as counted and timed."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "recomputed_tokens": usage.recomputed_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "prefill_s": round(usage.prefill_s, 4),
        "decode_s": round(usage.decode_s, 4),
    }


def result_json(result: Result) -> dict[str, Any]:
    """A whole answer as one object."""
    found = {
        "content": result.content,
        "reasoning": result.reasoning,
        "tool_calls": [call_json(call) for call in result.tool_calls],
        "finish_reason": result.finish_reason,
        "usage": usage_json(result.usage),
    }
    return found | ({"parse_error": result.error} if result.error else {})


def speed_line(usage: Usage, setting: str) -> str:
    """How many tokens one answer took, how fast, and in which setting."""
    read = usage.prompt_tokens - usage.cached_tokens
    # the first token of an answer comes out of the prefill
    decoded = max(0, usage.completion_tokens - 1)
    parts = [f"{read:,} prompt tokens in {usage.prefill_s:.2f} s{_rate(read, usage.prefill_s)}"]
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens:,} cached")
    parts.append(
        f"{usage.completion_tokens:,} tokens in {usage.decode_s:.2f} s{_rate(decoded, usage.decode_s)}"
    )
    return "; ".join([*parts, setting])


def batch_line(usages: Sequence[Usage], elapsed_s: float, setting: str) -> str:
    """The same for many answers, which share their time."""
    read, written = (sum(getattr(u, name) for u in usages) for name in ("prompt_tokens", "completion_tokens"))
    return (
        f"{len(usages):,} answers in {elapsed_s:.1f} s: {read:,} prompt tokens, "
        f"{written:,} tokens{_rate(written, elapsed_s)}; {setting}"
    )


def paging_line(usage: PagingUsage, tokens: int) -> str:
    """How often chosen experts were in memory, what a token read from disk, and how fast that came."""
    return (
        f"experts: {usage.hit_rate:.1%} of {usage.hits + usage.misses:,} choices were in memory; "
        f"{usage.read_bytes / max(1, tokens) / 1e6:,.1f} MB read from disk per token, "
        f"at {usage.disk_bytes_per_s / 1e6:,.0f} MB/s in the {usage.read_s:.2f} s spent waiting for it"
    )


def _rate(tokens: int, seconds: float) -> str:
    return f" ({tokens / seconds:.1f}/s)" if tokens and seconds > 0 else ""


def show_all(pieces: Iterable[Piece], printer: Printer) -> Usage | None:
    """Show every piece; give back the usage of the last."""
    usage = None
    for piece in pieces:
        printer.show(piece)
        usage = piece.usage or usage
    return usage
