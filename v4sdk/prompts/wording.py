"""Where wording comes from: the checkpoint's encoding file, read as text, or an installed deepseek-recipe."""

from __future__ import annotations

import ast
import importlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1 << 20
_FILES = ("encoding_dsv4.py", "encoding.py")


@dataclass(frozen=True)
class Wording:
    """The wording of one dialect; a missing piece is None.

    Args:
        tools, json_schema: text before and after the schemas.
        efforts: effort name to prefix.
    """

    dialect: str
    source: str
    efforts: Mapping[str, str] | None = None
    default_effort: str | None = None
    tools: tuple[str, str] | None = None
    json_schema: tuple[str, str] | None = None
    json_object: str | None = None
    calls_word: str | None = None


def read_encoding_file(folder: Path) -> Wording | None:
    """Read the constants of the encoding file in a checkpoint folder, without running it.

    Returns None when there is no such file, it does not parse, or none of its constants tells the dialect.
    """
    for name in _FILES:
        path = folder / "encoding" / name
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            constants = module_constants(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        found = _from_constants(constants, f"encoding/{name}")
        if found is not None:
            return found
    return None


def module_constants(source: str) -> dict[str, Any]:
    """Return the module-level names of `source` that are bound to literals."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
            value: ast.expr | None = node.value
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                try:
                    found[target.id] = ast.literal_eval(value)
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    continue
    return found


def _from_constants(constants: Mapping[str, Any], source: str) -> Wording | None:
    """Decide the dialect by the constant that only its encoder defines, and collect the wording."""
    prompts = constants.get("REASONING_EFFORT_PROMPTS")
    longest = constants.get("REASONING_EFFORT_MAX")
    if isinstance(prompts, dict) and all(isinstance(v, str) for v in prompts.values()):
        name, efforts = "v4-0731", {str(k): str(v) for k, v in prompts.items()}
        default = constants.get("DEFAULT_REASONING_EFFORT", "low")
    elif isinstance(longest, str):
        # the preview takes `high` and gives it no text
        name, efforts, default = "v4-april", {"high": "", "max": longest}, None
    elif "<｜System｜>" in (v for v in constants.values() if isinstance(v, str)):
        return Wording("v4.1", source)
    else:
        return None
    tokens = {
        "dsml_token": constants.get("dsml_token", "｜DSML｜"),
        "thinking_start_token": constants.get("thinking_start_token", "<think>"),
        "thinking_end_token": constants.get("thinking_end_token", "</think>"),
    }
    block = constants.get("tool_calls_block_name")
    return Wording(
        name,
        source,
        efforts=efforts,
        default_effort=default if isinstance(default, str) else None,
        tools=_frame(constants.get("TOOLS_TEMPLATE"), "tool_schemas", tokens),
        json_schema=_frame(constants.get("response_format_template"), "schema", tokens),
        calls_word=block if isinstance(block, str) else None,
    )


def _frame(template: object, hole: str, tokens: Mapping[str, object]) -> tuple[str, str] | None:
    """Fill a format string with the token spellings and split it at its hole; None if it has another form."""
    if not isinstance(template, str):
        return None
    parts = [""]
    try:
        for literal, name, _, _ in string.Formatter().parse(template):
            parts[-1] += literal
            if name == hole:
                parts.append("")
            elif name is not None:
                parts[-1] += str(tokens[name])
    except (ValueError, KeyError):
        return None
    return (parts[0], parts[1]) if len(parts) == 2 else None


@cache
def from_recipe(dialect: str) -> Wording | None:
    """Cut the wording out of small prompts rendered by deepseek-recipe; None when it is not installed.

    The package renders the later effort texts; its `high` is the text that the preview uses for `max`.
    """
    if dialect not in ("v4-april", "v4-0731", "v4.1"):
        return None
    try:
        return _probe(importlib.import_module("deepseek_recipe"), dialect)
    except (ImportError, AttributeError, TypeError, ValueError):
        # another version of the package is as good as none
        return None


def _probe(recipe: Any, dialect: str) -> Wording:
    later = dialect == "v4.1"
    encoding = recipe.DeepseekV41Encoding() if later else recipe.DeepseekV4Encoding()
    user = recipe.UserMessage("u")

    def render(**options: Any) -> str:
        conversation = recipe.Conversation([user], **options)
        text = str(encoding.render_conversation(conversation).prompt)
        text = text[len("<｜begin▁of▁sentence｜>") : text.rindex("<｜User｜>")]
        return text.removeprefix("<｜System｜>")

    tool = recipe.ToolDefinition("probe", "", {"type": "object"})
    schema = {"type": "object", "title": "probe"}
    tools = render(tools=[tool], thinking_mode=False).partition(_line("probe", {"type": "object"}))
    formats = render(response_schema=schema, thinking_mode=False).partition(json.dumps(schema))
    efforts = {name: render(reasoning_effort=name) for name in ("low", "high", "max")}
    if dialect == "v4-april":
        efforts = {"high": "", "max": efforts["high"]}
    return Wording(
        dialect,
        "deepseek-recipe",
        efforts=efforts,
        default_effort={"v4-april": None, "v4-0731": "low", "v4.1": "high"}[dialect],
        tools=_cut(tools),
        json_schema=_cut(formats),
        json_object=render(response_format="json_object", thinking_mode=False).removeprefix("\n\n"),
    )


def _cut(parts: tuple[str, str, str]) -> tuple[str, str] | None:
    return (parts[0].removeprefix("\n\n"), parts[2]) if parts[1] else None


def _line(name: str, parameters: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "description": "", "parameters": parameters})
