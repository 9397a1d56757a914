"""Render a conversation into spans: the reference encoder's rules, and the hosted API's normalisation of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from v4sdk.errors import PromptError
from v4sdk.prompts import wording
from v4sdk.prompts.dialect import Dialect, Frame
from v4sdk.prompts.messages import Turn, check_results, hosted_order, read_messages, reference_order
from v4sdk.prompts.span import Span, SpanWriter
from v4sdk.prompts.tools import check_tools, hosted_schema, open_calls, to_json, write_calls

Normalise = Literal["reference", "hosted"]
_HOSTED_EFFORTS = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
_WAYS_OUT = "use a checkpoint folder with its `encoding/` file, or pip install deepseek-recipe"


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    dialect: Dialect,
    *,
    thinking: bool = True,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    response_format: Mapping[str, Any] | None = None,
    drop_thinking: bool = True,
    normalise: Normalise = "reference",
    add_generation_prompt: bool = True,
) -> list[Span]:
    """Render a conversation as spans, ready for `Tokenizer.encode_spans`.

    Args:
        thinking: whether the completion starts inside `<think>`.
        effort: reasoning effort by the dialect's names; ignored in chat mode.
        tools: function tools, declared on the leading system message (an empty one is implied).
        tool_choice: "auto", "none" (the tools are left out), "required", or {"type": "function", "function":
            {"name": ...}}; the last two only without thinking, and the completion starts inside the call block.
        response_format: {"type": "text" | "json_object" | "json_schema" | "regex", ...}; only the wording is
            written here, enforcing it is `prompts.grammar`'s work.
        drop_thinking: leave out the reasoning of turns before the last user turn; off when tools are declared.
        normalise: "reference" renders as the shipped encoder, "hosted" first puts the request in order as
            DeepSeek's API does.
        add_generation_prompt: end with the header of the assistant turn to be written. With False a trailing
            user turn stays open.

    Raises:
        PromptError: if the conversation or an option is invalid, or wording is needed that is nowhere to be had.
    """
    if normalise not in ("reference", "hosted"):
        raise PromptError(f"`normalise` is {normalise!r}, expected `reference` or `hosted`")
    hosted = normalise == "hosted"
    turns = read_messages(messages)
    declared, forced = choose_tools(tools, tool_choice, thinking=thinking)
    if hosted:
        check_results(turns)
        if tool_choice == "none":
            for turn in turns:
                turn.tools = []
        turns = hosted_order(turns)
    else:
        turns = reference_order(turns)
    _lead_with_system(turns, declared, response_format, dialect, hosted=hosted)
    out = SpanWriter(dialect.control_tokens)
    drops = drop_thinking and not any(turn.tools for turn in turns)
    if thinking and drops:
        turns = _without_old_developers(turns)
    prefix = _effort_prefix(dialect, effort, thinking=thinking, hosted=hosted)
    _Renderer(out, dialect, turns, thinking, drops, hosted, add_generation_prompt).render(prefix)
    if forced:
        open_calls(out, dialect)
    return out.spans()


def choose_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any], *, thinking: bool
) -> tuple[list[Mapping[str, Any]], bool]:
    """Apply `tool_choice`: the function objects shown to the model, and whether a call is forced.

    Raises:
        PromptError: if the choice is malformed, names no declared tool, or forces a call in thinking mode.
    """
    functions = check_tools(tools)
    if choice == "auto":
        return functions, False
    if choice == "none":
        return [], False
    if isinstance(choice, Mapping):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise PromptError(
                '`tool_choice` object is malformed, expected {"type": "function", "function": {"name": ...}}'
            )
        known = [function["name"] for function in functions]
        if name not in known:
            raise PromptError(f"`tool_choice` names `{name}`, which is not among the declared tools {known}")
        functions = [function for function in functions if function["name"] == name]
    elif choice != "required":
        raise PromptError(
            f"`tool_choice` is {choice!r}, expected `auto`, `none`, `required` or a named function"
        )
    if thinking:
        raise PromptError(
            "`tool_choice` forces a call, which thinking mode does not support",
            hint='set thinking off, or tool_choice="auto"',
        )
    if not functions:
        raise PromptError('`tool_choice` is "required", but no tools are declared')
    return functions, True


def resolve_effort(dialect: Dialect, effort: str | None, *, hosted: bool = False) -> str | None:
    """Return the effort name that applies, or None for no prefix.

    Raises:
        PromptError: if the dialect has no effort of that name.
    """
    known = _efforts(dialect)
    if effort is None:
        # the API means `high` where the shipped encoder means its own default
        return "high" if hosted and "high" in known else dialect.default_effort
    name = _HOSTED_EFFORTS.get(effort, effort) if hosted and effort not in known else effort
    if name not in known:
        names = ", ".join(f"`{n}`" for n in known) or "none"
        raise PromptError(f"unknown reasoning effort `{effort}` for dialect `{dialect.name}`, known: {names}")
    return name


def _efforts(dialect: Dialect) -> Mapping[str, str]:
    if dialect.efforts is not None:
        return dialect.efforts
    found = wording.from_recipe(dialect.name)
    if found is not None and found.efforts is not None:
        return found.efforts
    # names are facts, their texts are not at hand
    return dict.fromkeys({"v4-april": ("high", "max")}.get(dialect.name, ("low", "high", "max")), _MISSING)


_MISSING = "\0"


def _effort_prefix(dialect: Dialect, effort: str | None, *, thinking: bool, hosted: bool) -> str:
    if not thinking:
        return ""
    name = resolve_effort(dialect, effort, hosted=hosted)
    if name is None:
        return ""
    text = _efforts(dialect)[name]
    if text != _MISSING:
        return text
    # these two have no text in their dialect, so nothing is missing
    if (dialect.name, name) in (("v4-april", "high"), ("v4-0731", "low")):
        return ""
    raise PromptError(
        f"the text of reasoning effort `{name}` of dialect `{dialect.name}` is not at hand", hint=_WAYS_OUT
    )


def _frame(dialect: Dialect, what: Literal["tools", "json_schema"]) -> Frame:
    own: Frame | None = getattr(dialect, what)
    if own is not None:
        return own
    found = wording.from_recipe(dialect.name)
    pair: tuple[str, str] | None = None if found is None else getattr(found, what)
    if pair is None:
        label = "tool block" if what == "tools" else "response format"
        raise PromptError(
            f"the {label} wording of dialect `{dialect.name}` is not at hand", hint=_ways_out(dialect)
        )
    return Frame(*pair)


def _ways_out(dialect: Dialect) -> str:
    return "add the template to `dialect` in `v4sdk.json`" if dialect.family == "own" else _WAYS_OUT


def _lead_with_system(
    turns: list[Turn],
    functions: list[Mapping[str, Any]],
    response_format: Mapping[str, Any] | None,
    dialect: Dialect,
    *,
    hosted: bool,
) -> None:
    """Put request-level tools and response format on the leading system turn, making one if needed."""
    form = check_response_format(response_format)
    if hosted and form is not None and form.get("type") == "json_object":
        _require_json_word(turns)
    if dialect.default_system and turns[0].role != "system":
        turns.insert(0, Turn("system", dialect.default_system))
    if not functions and form is None:
        return
    if turns[0].role != "system":
        turns.insert(0, Turn("system"))
    lead = turns[0]
    lead.tools = [*lead.tools, *functions]
    if form is not None:
        lead.response_format = form


def check_response_format(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the response format if it has wording, None for plain text and for a regular expression.

    Raises:
        PromptError: if its type is unknown, or a JSON schema is missing.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise PromptError(f"`response_format` is {type(response_format).__name__}, expected an object")
    kind = response_format.get("type")
    if kind in ("text", "regex"):
        return None
    if kind == "json_object":
        return response_format
    if kind == "json_schema":
        schema_of(response_format)
        return response_format
    known = "`text`, `json_object`, `json_schema`, `regex`"
    raise PromptError(f"`response_format.type` is {kind!r}, expected one of {known}")


def schema_of(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a `json_schema` response format.

    Raises:
        PromptError: if it is missing or not an object.
    """
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise PromptError(
            "`response_format.json_schema.schema` is missing, expected a JSON schema",
            hint='{"type": "json_schema", "json_schema": {"name": "answer", "schema": {...}}}',
        )
    return schema


def _require_json_word(turns: Sequence[Turn]) -> None:
    texts = [turn.text for turn in turns] + [text for turn in turns for _, text in turn.blocks]
    if not any("json" in text.lower() for text in texts):
        raise PromptError(
            'response format `json_object` needs the word "json" somewhere in the messages',
            hint="say in a message that the answer is to be JSON, or give a json_schema",
        )


def _without_old_developers(turns: Sequence[Turn]) -> list[Turn]:
    last = _last_user(turns)
    return [turn for index, turn in enumerate(turns) if index >= last or turn.role != "developer"]


def _last_user(turns: Sequence[Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


class _Renderer:
    """One rendering; holds what every turn's rules look at."""

    def __init__(
        self,
        out: SpanWriter,
        dialect: Dialect,
        turns: Sequence[Turn],
        thinking: bool,
        drops: bool,
        hosted: bool,
        add_generation_prompt: bool,
    ) -> None:
        self.out, self.dialect, self.turns = out, dialect, turns
        self.thinking, self.drops, self.hosted = thinking, drops, hosted
        self.add_generation_prompt = add_generation_prompt
        self.last_user = _last_user(turns)

    def render(self, effort_prefix: str) -> None:
        self.out.control(self.dialect.bos)
        self.out.trusted(effort_prefix)
        for index, turn in enumerate(self.turns):
            if turn.role == "assistant":
                self._assistant(index, turn)
            else:
                self._other(turn)
            self._transition(index, turn)

    def _other(self, turn: Turn) -> None:
        if turn.role == "user":
            self.out.control(self.dialect.user)
            for number, (call_id, text) in enumerate(turn.blocks):
                self.out.text("\n\n" if number else "")
                self.out.text(text if call_id is None else f"<tool_result>{text}</tool_result>")
            return
        if turn.role == "developer":
            self.out.control(self.dialect.user)
        elif turn.role == "latest_reminder":
            self.out.control(self.dialect.latest_reminder)
        self.out.text(turn.text)
        if turn.role in ("system", "developer"):
            self._declarations(turn)

    def _declarations(self, turn: Turn) -> None:
        if turn.tools:
            frame = _frame(self.dialect, "tools")
            shown = [hosted_schema(function) if self.hosted else function for function in turn.tools]
            self._framed(frame, "\n".join(to_json(function) for function in shown))
        if turn.response_format is not None:
            self._response_format(turn.response_format)

    def _response_format(self, form: Any) -> None:
        kind = form.get("type") if isinstance(form, Mapping) else None
        if kind == "json_object":
            text = self._json_object_text()
            if text is not None:
                self.out.text("\n\n")
                self.out.trusted(text)
                return
        if kind == "json_schema":
            form = schema_of(form)
        self._framed(_frame(self.dialect, "json_schema"), to_json(form))

    def _json_object_text(self) -> str | None:
        """Return the wording of plain JSON mode; the shipped encoder has none and shows the format object."""
        if self.dialect.json_object is not None:
            return self.dialect.json_object
        if not self.hosted:
            return None
        found = wording.from_recipe(self.dialect.name)
        if found is None or found.json_object is None:
            raise PromptError(
                f"the `json_object` wording of dialect `{self.dialect.name}` is not at hand",
                hint=_ways_out(self.dialect),
            )
        return found.json_object

    def _framed(self, frame: Frame, inner: str) -> None:
        self.out.text("\n\n")
        self.out.trusted(frame.before)
        self.out.text(inner)
        self.out.trusted(frame.after)

    def _assistant(self, index: int, turn: Turn) -> None:
        after_task = index > 0 and self.turns[index - 1].task is not None
        if self.hosted and index > 0 and self.turns[index - 1].role == "assistant":
            self._header(self._keeps(index))
        if self.thinking and not after_task and self._keeps(index):
            self.out.text(turn.reasoning)
            # an unfinished thought stays open, so that the completion goes on with it
            if not (turn.continues and turn.reasoning and not turn.text and not turn.calls):
                self.out.control(self.dialect.end_think)
        self.out.text(turn.text)
        if turn.calls:
            write_calls(self.out, turn.calls, self.dialect, blank_line=not self.hosted)
        if not turn.continues:
            self.out.control(self.dialect.eos)

    def _keeps(self, index: int) -> bool:
        """Whether the turn at `index` shows reasoning, or would."""
        return not self.drops or index > self.last_user

    def _header(self, thinks: bool) -> None:
        self.out.control(self.dialect.assistant)
        self.out.control(self.dialect.think if self.thinking and thinks else self.dialect.end_think)

    def _transition(self, index: int, turn: Turn) -> None:
        """Write what stands between this turn and the next: a task token or an assistant header."""
        is_last = index + 1 == len(self.turns)
        if not is_last and self.turns[index + 1].role not in ("assistant", "latest_reminder"):
            return
        if turn.task is not None:
            self._task(turn.task)
        elif turn.role in ("user", "developer"):
            if not is_last or self.add_generation_prompt:
                self._header(not self.drops or index >= self.last_user)
        elif is_last and self.hosted and self.add_generation_prompt and not turn.continues:
            self._header(True)

    def _task(self, task: str) -> None:
        token = self.dialect.tasks.get(task)
        if token is None:
            raise PromptError(
                f"unknown task `{task}`, known: {', '.join(f'`{t}`' for t in self.dialect.tasks)}"
            )
        if task == "action":
            self._header(True)
        self.out.control(token)
