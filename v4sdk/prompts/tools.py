"""Tool declarations and tool calls: validation, schema lines, and the DSML call grammar written out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.span import SpanWriter

_NAME = re.compile(r"[a-zA-Z0-9_-]+")


def to_json(value: object) -> str:
    """Write JSON as the reference encoder does: `", "` and `": "`, non-ASCII unescaped."""
    return json.dumps(value, ensure_ascii=False)


def check_tools(tools: object, where: str = "tools") -> list[Mapping[str, Any]]:
    """Return the inner function objects of a tool list.

    Raises:
        PromptError: if an entry is not a function tool, has a name outside [a-zA-Z0-9_-], repeats a name,
            or has parameters that are not a JSON schema of type object.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise PromptError(f"`{where}` is {type(tools).__name__}, expected a list of function tools")
    functions: list[Mapping[str, Any]] = []
    for index, tool in enumerate(tools):
        functions.append(_check_tool(tool, f"{where}[{index}]"))
    names = [function["name"] for function in functions]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise PromptError(f"`{where}` declares {repeated} more than once, expected unique names")
    return functions


def _check_tool(tool: object, where: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise PromptError(f"`{where}` is {type(tool).__name__}, expected an object")
    if tool.get("type", "function") != "function":
        raise PromptError(f"`{where}.type` is `{tool['type']}`, expected `function`")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise PromptError(
            f"`{where}.function` is missing, expected an object",
            hint='a tool is {"type": "function", "function": {"name": ..., "parameters": {...}}}',
        )
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise PromptError(f"`{where}.function.name` is {name!r}, expected letters, digits, `_` or `-`")
    if not isinstance(function.get("description"), str | None):
        raise PromptError(f"`{where}.function.description` is not a string")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise PromptError(
            f"`{where}.function.parameters` is {type(parameters).__name__}, expected a JSON schema"
        )
    if parameters and parameters.get("type") != "object":
        kind = parameters.get("type")
        raise PromptError(f"`{where}.function.parameters.type` is {kind!r}, expected `object`")
    try:
        to_json(function)
    except (TypeError, ValueError) as error:
        raise PromptError(f"`{where}.function` cannot be written as JSON: {error}") from error
    return function


def hosted_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the function object as the hosted API shows it to the model: three keys, always present."""
    parameters = function.get("parameters") or {}
    if function.get("strict") is True:
        parameters = _strict_order(parameters)
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": parameters,
    }


_STRICT_FIRST = ("type", "properties")
_STRICT_LAST = ("additionalProperties", "required", "description")
_STRICT_LEAF = ("type", "description", "pattern", "format", "enum", "const", "default")


def _strict_order(schema: object) -> Any:
    """Put a strict schema into the key order of the hosted API; unlike there, no constraint is left out."""
    if isinstance(schema, list):
        return [_strict_order(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("type") != "object":
        return {key: _strict_order(schema[key]) for key in _order(schema, _STRICT_LEAF, ())}
    full = {"properties": {}, "additionalProperties": False, "required": [], **schema}
    ordered = {key: full[key] for key in _order(full, _STRICT_FIRST, _STRICT_LAST)}
    # property names are not keywords: their order is the caller's
    ordered["properties"] = {name: _strict_order(value) for name, value in full["properties"].items()}
    return ordered


def _order(keys: Mapping[str, Any], first: Sequence[str], last: Sequence[str]) -> list[str]:
    middle = [key for key in keys if key not in first and key not in last]
    return [*(key for key in first if key in keys), *middle, *(key for key in last if key in keys)]


def write_calls(
    out: SpanWriter, calls: Sequence[Mapping[str, Any]], dialect: Dialect, *, blank_line: bool
) -> None:
    """Write a block of tool calls, with the blank line that precedes it.

    Args:
        blank_line: whether a call without arguments has an empty line inside, as the reference writes it.
    """
    out.text("\n\n")
    _tag(out, dialect, dialect.calls_word)
    for call in calls:
        name, arguments = call["name"], call["arguments"]
        out.text("\n")
        _tag(out, dialect, dialect.invoke_word, f' name="{name}"')
        for key, value in arguments.items():
            is_text = isinstance(value, str)
            out.text("\n")
            _tag(
                out,
                dialect,
                dialect.parameter_word,
                f' name="{key}" string="{"true" if is_text else "false"}"',
            )
            out.text(value if is_text else to_json(value))
            _tag(out, dialect, dialect.parameter_word, close=True)
        if not arguments and blank_line:
            out.text("\n")
        out.text("\n")
        _tag(out, dialect, dialect.invoke_word, close=True)
    out.text("\n")
    _tag(out, dialect, dialect.calls_word, close=True)


def open_calls(out: SpanWriter, dialect: Dialect) -> None:
    """Write the start of a call block, so that the completion can only go on with a call."""
    out.text("\n\n")
    _tag(out, dialect, dialect.calls_word)
    out.text("\n")


def _tag(out: SpanWriter, dialect: Dialect, word: str, attributes: str = "", *, close: bool = False) -> None:
    out.text("</" if close else "<")
    out.control(dialect.dsml)
    out.text(f"{word}{attributes}>")


def check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant message as {id, name, arguments}, arguments always a dict.

    JSON text becomes its object; text that is not a JSON object becomes the single argument `arguments`; an
    object given in place of text is taken as it is, never nested.

    Raises:
        PromptError: if a call has no function name, or arguments that are neither text nor an object.
    """
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"`{where}.tool_calls` is {type(calls).__name__}, expected a list")
    checked: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(f"`{where}.tool_calls[{index}]` has no function name")
        arguments = function.get("arguments", "{}")
        checked.append(
            {
                "id": call.get("id") or "",
                "name": function["name"],
                "arguments": _arguments(arguments, f"{where}.tool_calls[{index}].function.arguments"),
            }
        )
    return checked


def _arguments(arguments: object, where: str) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not isinstance(arguments, str):
        raise PromptError(f"`{where}` is {type(arguments).__name__}, expected JSON text or an object")
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}
