"""Turns to spans, in the order of the shipped encoder or of the hosted API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts.dialect import Dialect, Frame
from v4sdk.prompts.messages import Turn
from v4sdk.prompts.options import frame, json_object_text, schema_of
from v4sdk.prompts.span import SpanWriter
from v4sdk.prompts.tools import hosted_schema, to_json, write_calls


class Renderer:
    """Writes turns of one conversation.

    Args:
        thinking: whether the completion is to think.
        drops: whether the reasoning of historical turns is left out.
    """

    hosted = False

    def __init__(self, out: SpanWriter, dialect: Dialect, *, thinking: bool, drops: bool) -> None:
        self.out, self.dialect, self.thinking, self.drops = out, dialect, thinking, drops

    def header(self, thinks: bool) -> None:
        """Open an assistant turn, thinking or not."""
        self.out.control(self.dialect.assistant)
        self.out.control(self.dialect.think if self.thinking and thinks else self.dialect.end_think)

    def user(self, turn: Turn) -> None:
        self.out.control(self.dialect.user)
        for number, (call_id, text) in enumerate(turn.blocks):
            self.out.text("\n\n" if number else "")
            self.out.text(text if call_id is None else f"<tool_result>{text}</tool_result>")

    def assistant(self, turn: Turn, *, shows_reasoning: bool) -> None:
        """Write a turn behind its header."""
        if shows_reasoning:
            self.out.text(turn.reasoning)
            if not turn.open_thought:
                self.out.control(self.dialect.end_think)
        self.out.text(turn.text)
        if turn.calls:
            # only the hosted V4 leaves out the empty line of a call without arguments
            write_calls(self.out, turn.calls, self.dialect, blank_line=not self.hosted or self._later)
        if not turn.continues:
            self.out.control(self.dialect.eos)

    def declarations(self, turn: Turn) -> None:
        """Write the tools and the response format that a turn carries."""
        if turn.tools:
            shown = [hosted_schema(function) if self.hosted else function for function in turn.tools]
            self._framed(frame(self.dialect, "tools"), "\n".join(to_json(function) for function in shown))
        if turn.response_format is not None:
            self._response_format(turn.response_format)

    @property
    def _later(self) -> bool:
        return self.dialect.family == "v4.1"

    def _response_format(self, form: Any) -> None:
        kind = form.get("type") if isinstance(form, Mapping) else None
        text = json_object_text(self.dialect, hosted=self.hosted) if kind == "json_object" else None
        if text is not None:
            self.out.text("\n\n")
            self.out.trusted(text)
            return
        shown = schema_of(form) if kind == "json_schema" else form
        self._framed(frame(self.dialect, "json_schema"), to_json(shown))

    def _framed(self, words: Frame, inner: str) -> None:
        self.out.text("\n\n")
        self.out.trusted(words.before)
        self.out.text(inner)
        self.out.trusted(words.after)


class ReferenceRenderer(Renderer):
    """The shipped encoder's order: a user turn writes the header of the answer that follows it."""

    def render(self, turns: Sequence[Turn], effort: str, *, add_generation_prompt: bool) -> None:
        last_user = last_user_index(turns)
        self.out.control(self.dialect.bos)
        self.out.trusted(effort)
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                after_task = index > 0 and turns[index - 1].task is not None
                shows = self.thinking and not after_task and (not self.drops or index > last_user)
                self.assistant(turn, shows_reasoning=shows)
            else:
                self._other(turn)
            follower = turns[index + 1].role if index + 1 < len(turns) else None
            if follower in (None, "assistant", "latest_reminder") and (follower or add_generation_prompt):
                self._transition(turn, thinks=not self.drops or index >= last_user)

    def _other(self, turn: Turn) -> None:
        if turn.role == "user":
            self.user(turn)
            return
        tokens = {"developer": self.dialect.user, "latest_reminder": self.dialect.latest_reminder}
        if turn.role in tokens:
            self.out.control(tokens[turn.role])
        self.out.text(turn.text)
        self.declarations(turn)

    def _transition(self, turn: Turn, *, thinks: bool) -> None:
        """Write what stands between a turn and the answer to it: a task token or a header."""
        if turn.task is None:
            if turn.role in ("user", "developer"):
                self.header(thinks)
            return
        token = self.dialect.tasks.get(turn.task)
        if token is None:
            known = ", ".join(f"`{task}`" for task in self.dialect.tasks)
            raise PromptError(f"unknown task `{turn.task}`, known: {known}")
        if turn.task == "action":
            self.header(True)
        self.out.control(token)


class HostedRenderer(Renderer):
    """The hosted API's order: every assistant turn has its own header, and finished turns are history."""

    hosted = True

    def render(self, turns: Sequence[Turn], effort: str, *, add_generation_prompt: bool) -> None:
        self.out.control(self.dialect.bos)
        self._lead(turns[0], effort)
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                thinks = turn.continues or not self.drops
                self.header(thinks)
                self.assistant(turn, shows_reasoning=self.thinking and thinks)
            elif turn.role == "user":
                self.user(turn)
            elif turn.role == "system":
                if index > 0 and self.dialect.system is not None:
                    self.out.control(self.dialect.system)
                self.out.text(turn.text)
                self.declarations(turn)
            else:
                self.out.control(self.dialect.latest_reminder)
                self.out.text(turn.text)
        if add_generation_prompt and not turns[-1].continues:
            self.header(True)

    def _lead(self, first: Turn, effort: str) -> None:
        """Write the effort text; where the dialect has a system token, it opens the leading system text."""
        leads = first.role == "system" and bool(first.text or first.tools or first.response_format)
        if self.dialect.system is not None and (effort or leads):
            self.out.control(self.dialect.system)
        self.out.trusted(effort)


def last_user_index(turns: Sequence[Turn]) -> int:
    """Return the index of the last user or developer turn, -1 without one."""
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
