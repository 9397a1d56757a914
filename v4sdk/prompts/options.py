"""What a request asks for beside its messages: tools and their choice, response format, reasoning effort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from v4sdk.errors import PromptError
from v4sdk.prompts import wording
from v4sdk.prompts.dialect import Dialect, Frame
from v4sdk.prompts.tools import check_tools

_HOSTED_EFFORTS = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
_EFFORT_NAMES = {
    "v4-april": ("high", "max"),
    "v4-0731": ("low", "high", "max"),
    "v4.1": ("low", "high", "max"),
}
# efforts that have no text in their dialect: nothing is missing when no wording is at hand
_EMPTY_EFFORTS = {("v4-april", "high"), ("v4-0731", "low")}
_WAYS_OUT = "use a checkpoint folder that has its `encoding/` file, or pip install deepseek-recipe"


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
        functions = _named_tool(functions, choice)
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
        raise PromptError("`tool_choice` is `required`, but no tools are declared")
    return functions, True


def _named_tool(functions: list[Mapping[str, Any]], choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = choice.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise PromptError(
            "`tool_choice` is an object without a function name",
            hint='{"type": "function", "function": {"name": ...}}',
        )
    chosen = [function for function in functions if function["name"] == name]
    if not chosen:
        known = [function["name"] for function in functions]
        raise PromptError(f"`tool_choice` names `{name}`, which is not among the declared tools {known}")
    return chosen


def check_response_format(response_format: object) -> Mapping[str, Any] | None:
    """Return the response format if it has wording, None for plain text and for a regular expression.

    Raises:
        PromptError: if its type is unknown, or a JSON schema is missing.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise PromptError(f"`response_format` is {type(response_format).__name__}, expected an object")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "regex":
        if not isinstance(response_format.get("regex"), str):
            raise PromptError("`response_format.regex` is missing, expected a regular expression")
        return None
    if kind == "json_schema":
        schema_of(response_format)
    elif kind != "json_object":
        known = "`text`, `json_object`, `json_schema`, `regex`"
        raise PromptError(f"`response_format.type` is {kind!r}, expected one of {known}")
    return response_format


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


def resolve_effort(dialect: Dialect, effort: str | None, *, hosted: bool = False) -> str | None:
    """Return the effort name that applies, or None for no prefix.

    Raises:
        PromptError: if the dialect has no effort of that name.
    """
    known = effort_names(dialect)
    if effort is None:
        # the API means `high` where the shipped encoder means its own default; an own dialect states what it means
        return "high" if hosted and dialect.family != "own" and "high" in known else dialect.default_effort
    name = _HOSTED_EFFORTS.get(effort, effort) if hosted and effort not in known else effort
    if name not in known:
        names = ", ".join(f"`{n}`" for n in known) or "none"
        raise PromptError(f"unknown reasoning effort `{effort}` for dialect `{dialect.name}`, known: {names}")
    return name


def effort_names(dialect: Dialect) -> tuple[str, ...]:
    """Return the efforts of a dialect; the names of the built-in ones are known without their texts."""
    if dialect.efforts is not None:
        return tuple(dialect.efforts)
    return _EFFORT_NAMES.get(dialect.name, ())


def effort_text(dialect: Dialect, name: str | None) -> str:
    """Return the prefix of an effort.

    Raises:
        PromptError: if its text is not at hand.
    """
    if name is None or (dialect.efforts is None and (dialect.name, name) in _EMPTY_EFFORTS):
        return ""
    texts = dialect.efforts
    if texts is None:
        found = wording.from_recipe(dialect.name)
        texts = None if found is None else found.efforts
    if texts is None or name not in texts:
        raise PromptError(
            f"the text of reasoning effort `{name}` of dialect `{dialect.name}` is not at hand",
            hint=_WAYS_OUT,
        )
    return texts[name]


def frame(dialect: Dialect, what: Literal["tools", "json_schema"]) -> Frame:
    """Return the wording around tool schemas or around a response schema.

    Raises:
        PromptError: if neither the dialect nor an installed deepseek-recipe has it.
    """
    own: Frame | None = dialect.tools if what == "tools" else dialect.json_schema
    if own is not None:
        return own
    found = wording.from_recipe(dialect.name)
    pair = None if found is None else found.tools if what == "tools" else found.json_schema
    if pair is None:
        label = "tool block" if what == "tools" else "response format"
        raise PromptError(
            f"the {label} wording of dialect `{dialect.name}` is not at hand", ways_out(dialect)
        )
    return Frame(*pair)


def json_object_text(dialect: Dialect, *, hosted: bool) -> str | None:
    """Return the wording of plain JSON mode; None where the dialect shows the format object instead.

    Raises:
        PromptError: if the hosted wording is wanted and not at hand.
    """
    if dialect.json_object is not None or not hosted or dialect.family == "v4.1":
        return dialect.json_object
    found = wording.from_recipe(dialect.name)
    if found is None or found.json_object is None:
        what = f"the `json_object` wording of dialect `{dialect.name}`"
        raise PromptError(f"{what} is not at hand", hint=ways_out(dialect))
    return found.json_object


def ways_out(dialect: Dialect) -> str:
    """Return the hint for missing wording."""
    return "add the template to `dialect` in `v4sdk.json`" if dialect.family == "own" else _WAYS_OUT
