"""Prompt dialects: the control tokens, the words of the call grammar, and whose wording goes around them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts import wording

TASKS: Mapping[str, str] = MappingProxyType(
    {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
)


@dataclass(frozen=True)
class Frame:
    """Wording with one hole: what stands before and after the schemas."""

    before: str
    after: str

    @classmethod
    def parse(cls, template: str, hole: str, where: str) -> Frame:
        """Split `template` at its only `{hole}`.

        Raises:
            PromptError: if the hole does not occur exactly once.
        """
        parts = template.split("{" + hole + "}")
        if len(parts) != 2:
            raise PromptError(f"`{where}` has {len(parts) - 1} holes `{{{hole}}}`, expected exactly one")
        return cls(parts[0], parts[1])


@dataclass(frozen=True)
class Dialect:
    """How conversations are spelled for one family of checkpoints.

    The token spellings and grammar words are facts of the format. The wording (`tools`, `json_schema`,
    `json_object`, `efforts`) belongs to the checkpoint: it is read from its folder, and a piece that is
    None is looked up in an installed deepseek-recipe when it is needed, or refused.

    Args:
        efforts: effort name to the prefix written after BOS in thinking mode; None: not known here.
        default_effort: the effort meant when none is named; None means no prefix.
        default_system: system text used when the conversation brings none (own dialects only).
        source: where the wording came from, in words, for `info` and for error messages.
    """

    name: str
    bos: str = "<｜begin▁of▁sentence｜>"
    eos: str = "<｜end▁of▁sentence｜>"
    user: str = "<｜User｜>"
    assistant: str = "<｜Assistant｜>"
    think: str = "<think>"
    end_think: str = "</think>"
    dsml: str = "｜DSML｜"
    latest_reminder: str = "<｜latest_reminder｜>"
    system: str | None = None
    tasks: Mapping[str, str] = field(default_factory=lambda: TASKS)
    calls_word: str = "tool_calls"
    invoke_word: str = "invoke"
    parameter_word: str = "parameter"
    efforts: Mapping[str, str] | None = None
    default_effort: str | None = None
    tools: Frame | None = None
    json_schema: Frame | None = None
    json_object: str | None = None
    default_system: str | None = None
    family: str = "v4"
    source: str = field(default="built in", compare=False)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token this dialect may write or meet."""
        fixed = (self.bos, self.eos, self.user, self.assistant, self.think, self.end_think, self.dsml)
        system = () if self.system is None else (self.system,)
        return (*fixed, self.latest_reminder, *system, *self.tasks.values())

    @classmethod
    def named(cls, name: str) -> Dialect:
        """Return a built-in dialect: "v4-april", "v4-0731" (also of 0813) or "v4.1".

        Raises:
            PromptError: if no dialect has that name.
        """
        if name == "v4-april":
            return cls(name)
        if name in ("v4-0731", "v4-0813"):
            return cls("v4-0731", default_effort="low")
        if name == "v4.1":
            return cls(
                name,
                system="<｜System｜>",
                calls_word=" calls",
                invoke_word=" invoke",
                parameter_word=" parameter",
                default_effort="high",
                family="v4.1",
            )
        raise PromptError(
            f"unknown prompt dialect `{name}`, expected one of `v4-april`, `v4-0731`, `v4.1`",
            hint="v4-april is the preview of April 2026, v4-0731 the official V4 of July and August 2026",
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Dialect | None:
        """Find the dialect of a checkpoint folder.

        `v4sdk.json` decides if it has a "dialect" (a name, or an object with its own wording); else the
        encoding file the checkpoint ships is read as text, never run. None if neither says anything.

        Raises:
            PromptError: if `v4sdk.json` is not readable or its dialect is malformed.
        """
        folder = Path(path)
        stated = _read_settings(folder / "v4sdk.json").get("dialect")
        if isinstance(stated, str):
            return _with_file(cls.named(stated), folder)
        if stated is not None:
            return custom_dialect(stated)
        return _with_file(None, folder)


def _with_file(known: Dialect | None, folder: Path) -> Dialect | None:
    """Add the wording of the folder's encoding file, which also tells the dialect when it is not known."""
    found = wording.read_encoding_file(folder)
    if found is None:
        return known
    base = known or Dialect.named(found.dialect)
    if base.name != found.dialect:
        return base
    return replace(
        base,
        tools=None if found.tools is None else Frame(*found.tools),
        json_schema=None if found.json_schema is None else Frame(*found.json_schema),
        efforts=found.efforts,
        default_effort=base.default_effort if found.efforts is None else found.default_effort,
        calls_word=found.calls_word or base.calls_word,
        source=found.source,
    )


_OWN_KEYS = {
    "name",
    "efforts",
    "default_effort",
    "tools_template",
    "json_schema_template",
    "json_object_text",
}
_OWN_KEYS |= {"default_system", "calls_word", "invoke_word", "parameter_word"}


def custom_dialect(stated: object) -> Dialect:
    """Build a dialect from the object under "dialect" in `v4sdk.json`.

    Keys: `name` (required); `tools_template` with the hole `{schemas}`; `json_schema_template` with the hole
    `{schema}`; `json_object_text`; `efforts` (name to prefix) and `default_effort`; `default_system`;
    `calls_word`, `invoke_word`, `parameter_word`. A control token spelled in the wording is that token.

    Raises:
        PromptError: on an unknown key, a value of the wrong type, or a template without its hole.
    """
    if not isinstance(stated, Mapping):
        raise PromptError(
            f"`dialect` in `v4sdk.json` is {type(stated).__name__}, expected a name or an object"
        )
    unknown = sorted(set(stated) - _OWN_KEYS)
    if unknown:
        raise PromptError(
            f"`dialect` in `v4sdk.json` has unknown keys {unknown}, expected {sorted(_OWN_KEYS)}"
        )
    if not isinstance(stated.get("name"), str):
        raise PromptError("`dialect.name` in `v4sdk.json` is missing, expected a string")
    efforts = stated.get("efforts", {})
    if not isinstance(efforts, Mapping) or not all(isinstance(v, str) for v in efforts.values()):
        raise PromptError("`dialect.efforts` in `v4sdk.json` must map effort names to prefix texts")
    for key in _OWN_KEYS - {"efforts"}:
        if not isinstance(stated.get(key), str | None):
            raise PromptError(
                f"`dialect.{key}` in `v4sdk.json` is {type(stated[key]).__name__}, expected a string"
            )
    if stated.get("default_effort") is not None and stated["default_effort"] not in efforts:
        raise PromptError(
            f"`dialect.default_effort` `{stated['default_effort']}` is not among {sorted(efforts)}"
        )
    tools, schema = stated.get("tools_template"), stated.get("json_schema_template")
    words = {key: stated[key] for key in ("calls_word", "invoke_word", "parameter_word") if stated.get(key)}
    return Dialect(
        name=stated["name"],
        efforts=dict(efforts),
        default_effort=stated.get("default_effort"),
        tools=None if tools is None else Frame.parse(tools, "schemas", "dialect.tools_template"),
        json_schema=None if schema is None else Frame.parse(schema, "schema", "dialect.json_schema_template"),
        json_object=stated.get("json_object_text"),
        default_system=stated.get("default_system"),
        family="own",
        source="v4sdk.json",
        **words,
    )


def _read_settings(path: Path) -> Mapping[str, Any]:
    """Read `v4sdk.json`; an absent file has no settings."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PromptError(f"`{path.name}` cannot be read: {error}") from error
    if not isinstance(settings, Mapping):
        raise PromptError(f"`{path.name}` holds {type(settings).__name__}, expected an object")
    return settings
