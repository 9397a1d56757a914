"""Write the grammar of an answer in llguidance's Lark: its form, and the call blocks of the declared tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from v4sdk.errors import PromptError
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.options import schema_of
from v4sdk.tokenizer import Tokenizer


class GrammarWriter:
    """Writes one Lark grammar; control tokens stand in it by id."""

    def __init__(self, guidance: Any, dialect: Dialect, tokenizer: Tokenizer) -> None:
        self._guidance, self._dialect = guidance, dialect
        self._dsml = f"<[{tokenizer.control_id(dialect.dsml)}]>" if dialect.dsml else ""
        self._rules: list[str] = []

    def write(
        self, functions: Sequence[Mapping[str, Any]], form: Mapping[str, Any] | None, *, opened: bool
    ) -> str:
        """Return the grammar: the answer in its form, or calls where tools are declared."""
        kind = "text" if form is None else form.get("type")
        if kind == "regex":
            assert form is not None
            answer = f"/{_slashed(form['regex'])}/"
        elif kind in ("json_object", "json_schema"):
            assert form is not None
            schema = {"type": "object"} if kind == "json_object" else schema_of(form)
            answer = "%json " + json.dumps(schema)
        else:
            answer = "TEXT"
        if opened:
            start = self._calls(functions, opened=True)
        elif functions:
            # text may end in a call block; a form leaves no room for text before it
            lead = r"/((.|\n)*\n\n)?</" if kind == "text" else r"/(\n\n)?</"
            self._rules.append(f"LEAD: {lead}")
            start = f"answer | LEAD {self._calls(functions, opened=False)}"
        else:
            start = "answer"
        lines = ["%llguidance {}", f"start: {start}", f"answer: {answer}", *self._rules]
        return "\n".join([*lines, r"TEXT: /(.|\n)*/", r"RAW: /(.|\n)*<\//"])

    def _calls(self, functions: Sequence[Mapping[str, Any]], *, opened: bool) -> str:
        names = [self._invoke(number, function) for number, function in enumerate(functions)]
        self._rules.append(f"invoke: {' | '.join(names)}")
        word = self._dialect.calls_word
        close = f'"\\n</" {self._dsml} {_quoted(word + ">")}'
        block = f'"<" invoke ("\\n<" invoke)* {close}'
        return block if opened else f"{self._dsml} {_quoted(word + '>' + chr(10))} {block}"

    def _invoke(self, number: int, function: Mapping[str, Any]) -> str:
        schema = function.get("parameters") or {}
        properties: Mapping[str, Any] = schema.get("properties") or {}
        required = schema.get("required") or ()
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts: list[str] = []
        for key, value in properties.items():
            rule = self._parameter(f"p{number}_{len(parts)}", key, value, shared, function)
            parts.append(rule if key in required else f"{rule}?")
        if not properties:
            free = schema.get("additionalProperties", bool(schema)) is not False
            parts.append(f"{self._any_parameter(number)}*" if free else '"\\n"?')
        word = self._dialect.invoke_word
        head = _quoted(f'{word} name="{function["name"]}">\n')
        self._rules.append(
            f'i{number}: {self._dsml} {head} {" ".join(parts)} "</" {self._dsml} {_quoted(word + ">")}'
        )
        return f"i{number}"

    def _parameter(
        self, rule: str, key: str, schema: object, shared: Mapping[str, Any], function: Mapping[str, Any]
    ) -> str:
        if any(letter in key for letter in '"\n<>'):
            raise PromptError(f"parameter {key!r} of tool `{function['name']}` cannot be spelled in a call")
        ways, meant = [], _resolved(schema, shared)
        if _may_be_text(meant):
            ways.append(f"{_quoted(self._head(key, True))} {_text_value(meant)}")
        if not _is_text(meant):
            # text has its own spelling, so this one is for everything else
            value = self._json(schema, shared, function)
            ways.append(f'{_quoted(self._head(key, False))} {value} "</"')
        self._rules.append(f'{rule}: "<" {self._dsml} ({" | ".join(ways)}) {self._tail()}')
        return rule

    def _any_parameter(self, number: int) -> str:
        start, end = self._head("\0", True).split("\0")
        name = f"{_quoted(start)} KEY"
        text, other = _quoted(end), _quoted(end.replace("true", "false"))
        self._rules.append(
            f'a{number}: "<" {self._dsml} {name} ({text} RAW | {other} %json {{}} "</") {self._tail()}'
        )
        if r"KEY: /[^\"<>\n]+/" not in self._rules:
            self._rules.append(r"KEY: /[^\"<>\n]+/")
        return f"a{number}"

    def _head(self, key: str, is_text: bool) -> str:
        return f'{self._dialect.parameter_word} name="{key}" string="{"true" if is_text else "false"}">'

    def _tail(self) -> str:
        return f"{self._dsml} {_quoted(self._dialect.parameter_word + '>' + chr(10))}"

    def _json(self, schema: object, shared: Mapping[str, Any], function: Mapping[str, Any]) -> str:
        whole = {**schema, **shared} if isinstance(schema, Mapping) else schema
        text = json.dumps(whole)
        grammar = self._guidance.LLMatcher.grammar_from_lark(f"start: %json {text}")
        problem = problem_of(self._guidance, grammar)
        if problem is not None:
            if function.get("strict") is True:
                raise PromptError(f"strict tool `{function['name']}` cannot be enforced: {problem}")
            # the schema is advice here: valid JSON is still better than nothing
            return "%json {}"
        return f"%json {text}"


def problem_of(guidance: Any, grammar: str, vocabulary: Any = None) -> str | None:
    """Return the first line of what is wrong with a grammar; None if nothing is."""
    is_error, messages = guidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    return str(messages[0]).splitlines()[0].rstrip(".") if is_error else None


def _resolved(schema: object, shared: Mapping[str, Any]) -> object:
    """Follow a reference into the shared definitions, as far as it is a plain one."""
    for _ in range(8):
        target = schema.get("$ref") if isinstance(schema, Mapping) else None
        place, _, name = str(target).removeprefix("#/").partition("/")
        if target is None or name not in shared.get(place, {}):
            break
        schema = shared[place][name]
    return schema


def _is_text(schema: object) -> bool:
    """Whether a schema admits strings only."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _may_be_text(schema: object) -> bool:
    """Whether a schema may admit a string; without a plain `type` it may."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind)


def _text_value(schema: object) -> str:
    """Return the grammar of a raw text value together with the `</` behind it."""
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(schema, Mapping) and "const" in schema:
        choices = [schema["const"]]
    texts = [choice for choice in choices or () if isinstance(choice, str)]
    if not texts:
        return "RAW"
    return "(" + " | ".join(_quoted(text + "</") for text in texts) + ")"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _slashed(expression: str) -> str:
    """Escape the slashes of a regular expression that are not escaped already."""
    out, escaped = [], False
    for letter in expression:
        out.append("\\/" if letter == "/" and not escaped else letter)
        escaped = letter == "\\" and not escaped
    return "".join(out).replace("\n", "\\n")
