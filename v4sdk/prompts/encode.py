"""Render a conversation into spans, as the shipped encoder does or as the hosted API does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from v4sdk.errors import PromptError
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.messages import Turn, check_results, hosted_order, read_messages, reference_order
from v4sdk.prompts.options import check_response_format, choose_tools, effort_text, resolve_effort
from v4sdk.prompts.render import HostedRenderer, ReferenceRenderer, last_user_index
from v4sdk.prompts.span import Span, SpanWriter
from v4sdk.prompts.tools import open_calls

Normalise = Literal["reference", "hosted"]


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
        effort: reasoning effort by the dialect's names; without effect in chat mode.
        tools: function tools, declared on the leading system message (an empty one is implied).
        tool_choice: "auto", "none" (the tools are left out), "required", or {"type": "function", "function":
            {"name": ...}}; the last two only without thinking, with the call block already opened.
        response_format: {"type": "text" | "json_object" | "json_schema" | "regex", ...}; only the wording is
            written here, enforcing it is the work of `prompts.grammar`.
        drop_thinking: leave out the reasoning of historical turns; off when tools are declared.
        normalise: "reference" renders as the shipped encoder; "hosted" puts the request in order as the API
            does: three keys per tool, one leading system message, effort `high` unless named otherwise.
        add_generation_prompt: end with the header of the assistant turn to be written. With False a trailing
            user turn stays open. An assistant message with "prefix": true is continued instead.

    Raises:
        PromptError: if the conversation or an option is invalid, or wording is needed that is not at hand.
    """
    if normalise not in ("reference", "hosted"):
        raise PromptError(f"`normalise` is {normalise!r}, expected `reference` or `hosted`")
    hosted = normalise == "hosted"
    if dialect.family == "v4.1" and not hosted:
        raise PromptError(
            "dialect `v4.1` is rendered in the hosted order only", hint='pass normalise="hosted"'
        )
    turns = read_messages(messages)
    functions, forced = choose_tools(tools, tool_choice, thinking=thinking)
    form = check_response_format(response_format)
    # checked in chat mode too, where the API ignores it and a typing error would go unseen
    effort = resolve_effort(dialect, effort, hosted=hosted)
    prefix = effort_text(dialect, effort) if thinking else ""
    if hosted:
        _check_hosted(turns, form)
        turns = hosted_order(turns, hoist=dialect.system is None)
    else:
        turns = reference_order(turns)
    if tool_choice == "none":
        for turn in turns:
            turn.tools = []
    _lead_with_system(turns, functions, form, dialect)
    drops = drop_thinking and not any(turn.tools for turn in turns)
    out = SpanWriter(dialect.control_tokens)
    if hosted:
        ways = HostedRenderer(out, dialect, thinking=thinking, drops=drops)
        ways.render(turns, prefix, add_generation_prompt=add_generation_prompt)
    else:
        if thinking and drops:
            turns = _without_old_developers(turns)
        shipped = ReferenceRenderer(out, dialect, thinking=thinking, drops=drops)
        shipped.render(turns, prefix, add_generation_prompt=add_generation_prompt)
    if forced:
        open_calls(out, dialect)
    return out.spans()


def _lead_with_system(
    turns: list[Turn],
    functions: list[Mapping[str, Any]],
    form: Mapping[str, Any] | None,
    dialect: Dialect,
) -> None:
    """Put request-level tools and response format on the leading system turn, making one if needed."""
    if dialect.default_system and turns[0].role != "system":
        turns.insert(0, Turn("system", dialect.default_system))
    if not functions and form is None:
        return
    if turns[0].role != "system":
        turns.insert(0, Turn("system"))
    turns[0].tools = [*turns[0].tools, *functions]
    if form is not None:
        turns[0].response_format = form


def _check_hosted(turns: Sequence[Turn], form: Mapping[str, Any] | None) -> None:
    """Apply the rules by which the API refuses a conversation."""
    check_results(turns)
    if any(turn.role == "developer" or turn.task is not None for turn in turns):
        raise PromptError(
            "role `developer` and `task` are the encoder's own and not part of the API",
            hint='pass normalise="reference", or use role `system` or `user`',
        )
    if form is None or form.get("type") != "json_object":
        return
    texts = [turn.text for turn in turns] + [text for turn in turns for _, text in turn.blocks]
    if not any("json" in text.lower() for text in texts):
        raise PromptError(
            "response format `json_object` needs the word `json` somewhere in the messages",
            hint="say in a message that the answer is to be JSON, or give a json_schema",
        )


def _without_old_developers(turns: Sequence[Turn]) -> list[Turn]:
    last = last_user_index(turns)
    return [turn for index, turn in enumerate(turns) if index >= last or turn.role != "developer"]
