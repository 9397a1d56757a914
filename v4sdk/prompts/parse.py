"""Token ids of a completion to content, reasoning and tool calls, piece by piece and independent of the cuts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts.completion import Collector, Completion, Event, Phase, completion_start, prompt_thinks
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.dsml import (
    MARK,
    CallRefused,
    Markup,
    Verdict,
    control_marks,
    skip_space,
)
from v4sdk.prompts.options import choose_tools
from v4sdk.prompts.span import Span
from v4sdk.prompts.tools import check_tools
from v4sdk.tokenizer import Tokenizer

_TAIL = re.compile(r"\n*<?\Z")
_NEWLINES = re.compile(r"\n*\Z")
_NO_CALL = "the completion has no call where one was required"


class CompletionParser:
    """Parses one completion.

    The start of an answer and what stands before `</think>` or a call block loses its line breaks, as with the
    hosted API. A call is given out when its invoke has closed, names a declared tool, has all required
    parameters and valid JSON; otherwise its text becomes content and `error` says why. Without tools, markup
    is content. Control tokens in the wrong place are spelled out as text.

    Args:
        tools: the tools shown to the model; None or empty switches calls off.
        start: where the completion begins; by default as `thinking` says. See `completion_start`.
        continues: whether the prompt already holds the beginning of this text, so that leading line breaks count.
        stop: stop strings; they apply to content only and are removed.
    """

    def __init__(
        self,
        dialect: Dialect,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stop: Sequence[str] = (),
        start: Phase | None = None,
        continues: bool = False,
    ) -> None:
        self._dialect, self._tokenizer = dialect, tokenizer
        self._tools = {function["name"]: function for function in check_tools(tools)}
        self._marks, self._spellings = control_marks(dialect)
        self._markup = Markup(dialect)
        self._decoder = tokenizer.stream_decoder()
        self._out = Collector(stop, continues=continues)
        self.phase: Phase = start or ("reasoning" if thinking else "content")
        if self.phase == "calls" and not self._tools:
            raise PromptError("a completion that starts inside a call block needs `tools`")
        self._thinks = thinking or self.phase == "reasoning"
        self._buffer = ""
        self._trailing: list[str] = []
        self._block_failed = self._invoke_open = False
        self._finish_reason: str | None = None
        self.error: str | None = None

    @classmethod
    def for_prompt(
        cls,
        spans: Sequence[Span],
        dialect: Dialect,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        stop: Sequence[str] = (),
    ) -> CompletionParser:
        """Return the parser for the completion of a prompt that `encode_chat` rendered with the same options."""
        start = completion_start(spans, dialect)
        thinking = start == "reasoning"
        functions, _ = choose_tools(tools, tool_choice, thinking=thinking)
        return cls(
            dialect,
            tokenizer,
            thinking=thinking or prompt_thinks(spans, dialect),
            tools=[{"type": "function", "function": function} for function in functions],
            stop=stop,
            start=start,
            continues=bool(spans) and not spans[-1].control and start != "calls",
        )

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete: EOS, a stop string, or a finished call block."""
        return self.phase == "done"

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the content."""
        return self._out.stop_string

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Take the next ids and return what they complete."""
        added = ""
        for index in ids:
            spelling = self._tokenizer.control_spelling(index)
            if spelling is None:
                added += self._decoder.feed([index])
            else:
                added += self._decoder.finish() + self._marks.get(spelling, spelling)
        self._buffer += added
        # a long argument is not searched again for every token: only these two can end an open invoke
        if not self._invoke_open or ">" in added or self._marks[self._dialect.eos] in added:
            self._run(final=False)
        return self._out.take()

    def finish(self, reason: str = "stop") -> list[Event]:
        """End the completion for `reason` ("stop", "length", ...) and return what was held back."""
        self._buffer += self._decoder.finish()
        self._run(final=True)
        if self.phase == "calls" and not self._out.calls and not self._block_failed:
            self.error = self.error or _NO_CALL
        self._out.flush()
        self._finish_reason = "tool_calls" if self._out.calls and reason == "stop" else reason
        self.phase = "done"
        return self._out.take()

    def result(self) -> Completion:
        """Return everything given out so far."""
        return Completion(
            self._out.text("content"),
            self._out.text("reasoning") if self._thinks else None,
            tuple(self._out.calls),
            self._finish_reason or "stop",
            self.error,
            "".join(self._trailing),
        )

    def _run(self, *, final: bool) -> None:
        moved = True
        while moved and self._buffer and self.phase != "done":
            moved = self._in_calls(final) if self.phase == "calls" else self._in_text(final)
        if self.phase == "done" and self._buffer:
            if self.stop_string is None:
                self._trailing.append(self._spelled(self._buffer.replace(self._marks[self._dialect.eos], "")))
            self._buffer = ""

    def _in_text(self, final: bool) -> bool:
        """Consume reasoning or content up to the next control token; False to wait for more."""
        at = next((i for i, letter in enumerate(self._buffer) if "\ud800" <= letter <= "\udfff"), -1)
        if at < 0:
            keep = len(self._buffer) if final else self._certain(self._buffer)
            self._say(self._buffer[:keep])
            self._buffer = self._buffer[keep:]
            return False
        before, token = self._buffer[:at], self._spellings[self._buffer[at]]
        if self._buffer[at] == MARK:
            return self._at_dsml(at, final)
        after = self._buffer[at + 1 :]
        if token == self._dialect.eos:
            self._say(before)
            self._end()
        elif token == self._dialect.end_think and self.phase == "reasoning":
            self._say(before.rstrip("\n"))
            self.phase, self._out.at_start = "content", True
        elif token == self._dialect.think and not before.strip("\n") and self._out.nothing_said:
            # opened again at the very start, or opened in chat mode: what follows is reasoning
            self.phase, self._thinks = "reasoning", True
        else:
            self._say(before + token)
        self._buffer = after
        return True

    def _certain(self, text: str) -> int:
        """Return how much of text without control tokens can be given out: line breaks may turn out to be the
        separator before `</think>` or a call block, and `<` the beginning of a tag.
        """
        if self.phase == "content" and not self._tools:
            return len(text)
        tail = (_TAIL if self._tools else _NEWLINES).search(text)
        return len(text) if tail is None else tail.start()

    def _at_dsml(self, at: int, final: bool) -> bool:
        """Decide about the DSML token at `at`: a call block, or prose that mentions it."""
        opens = bool(self._tools) and at > 0 and self._buffer[at - 1] == "<"
        verdict, _ = self._markup.block_at(self._buffer, at - 1) if opens else (Verdict.NO, 0)
        before = self._buffer[: max(at - 1, 0)]
        if verdict is Verdict.MORE and not final:
            ready = len(before.rstrip("\n"))
            self._say(before[:ready])
            self._buffer = self._buffer[ready:]
            return False
        if verdict is Verdict.YES:
            self._say(before.rstrip("\n"))
            self._buffer = self._buffer[at - 1 :]
            if not self.stopped:
                self._out.flush()
                self.phase, self._block_failed = "calls", False
            return True
        empty_block = opens and self._markup.names_block(self._buffer, at - 1)
        self._say(self._buffer[:at] + self._dialect.dsml)
        self._buffer = self._buffer[at + 1 :]
        if empty_block and not self.stopped:
            self.error = self.error or "a call block holds no call"
        return True

    def _in_calls(self, final: bool) -> bool:
        """Consume one invoke, or the end of the block; False to wait for more."""
        text = self._buffer
        eos = text.find(self._marks[self._dialect.eos])
        cut = text if eos < 0 else text[:eos]
        over = final or eos >= 0
        begin = skip_space(cut, 0)
        verdict = self._markup.invoke_at(cut, begin)
        at_start = not self._out.calls and not self._block_failed
        if verdict is not Verdict.YES and at_start and cut.startswith(f"<{MARK}", begin):
            verdict, begin = self._markup.block_at(cut, begin)
        if verdict is Verdict.YES:
            return self._one_invoke(cut, begin, over)
        ended, end = self._markup.block_end(cut, begin)
        waits = verdict is Verdict.MORE or ended is Verdict.MORE or begin == len(cut)
        if waits and not over:
            return False
        if ended is Verdict.YES:
            self._close_block(end)
        elif self._out.calls or self._block_failed:
            self._close_block(0)
        else:
            # only where the prompt opened the block: the model did not go on with a call
            self.error = self.error or _NO_CALL
            self.phase = "content"
        return True

    def _one_invoke(self, cut: str, begin: int, over: bool) -> bool:
        end = self._markup.invoke_end(cut, begin)
        self._invoke_open = end is None and not over
        if end is None:
            if over:
                self._fail("a tool call was cut off before its closing tag", len(cut))
            return over
        try:
            name, arguments = self._markup.read_invoke(cut[begin:end], self._tools)
        except CallRefused as refused:
            self._fail(str(refused), end)
            return True
        self._out.call(name, self._spelled(arguments))
        self._block_failed = False
        self._buffer = self._buffer[end:]
        return True

    def _fail(self, message: str, end: int) -> None:
        """Give the text of a refused call out as content, so that nothing is lost and nothing is called."""
        self.error = self.error or message
        self._block_failed = True
        self._say(self._buffer[:end])
        self._buffer = self._buffer[end:]

    def _close_block(self, end: int) -> None:
        closing, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._block_failed:
            self._say(closing)
        if self._out.calls:
            self._end()
        elif not self.stopped:
            self.phase, self._block_failed = "content", False

    def _say(self, text: str) -> None:
        """Give out text of the current phase; what call markup leaves behind is content."""
        self._out.say("reasoning" if self.phase == "reasoning" else "content", self._spelled(text))
        if self._out.stop_string is not None:
            self.phase = "done"

    def _end(self) -> None:
        self._out.flush()
        self.phase = "done"

    def _spelled(self, text: str) -> str:
        for mark, spelling in self._spellings.items():
            if mark in text:
                text = text.replace(mark, spelling)
        return text
