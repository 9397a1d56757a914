"""Hold an answer to a response format or to the call grammar: one token mask per step, by llguidance.

Reasoning is left free. A `string="true"` parameter is held to its enum only; every other value to its schema.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from v4sdk.errors import PromptError
from v4sdk.prompts.completion import Phase
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.options import check_response_format, choose_tools, schema_of
from v4sdk.tokenizer import Tokenizer


class AnswerGrammar:
    """The grammar of one completion.

    Ask `allowed` before every token is drawn and tell `accept` which one was drawn, from the first token of the
    completion on.

    Args:
        start: where the completion begins, see `completion_start`; a thinking one is free up to `</think>`.
        vocab_size: width of the model's logits; ids the tokenizer does not know are never allowed.

    Raises:
        PromptError: if llguidance is missing, or it cannot follow the schema or expression.
    """

    def __init__(
        self,
        dialect: Dialect,
        tokenizer: Tokenizer,
        *,
        response_format: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        start: Phase = "content",
        vocab_size: int | None = None,
    ) -> None:
        guidance = _guidance()
        functions, _ = choose_tools(tools, tool_choice, thinking=start == "reasoning")
        check_response_format(response_format)
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._eos = tokenizer.eos_id
        self._end_think = tokenizer.control_id(dialect.end_think)
        self._reasons = start == "reasoning"
        self._free = np.ones(self._vocab_size, dtype=np.bool_)
        self._free[tokenizer.vocab_size :] = False
        # an answer is owed, so reasoning may neither end the completion nor slip into a call
        self._free[self._eos] = False
        if functions:
            self._free[tokenizer.control_id(dialect.dsml)] = False
        writer = _GrammarWriter(guidance, dialect, tokenizer)
        text = writer.write(functions, response_format, opened=start == "calls")
        vocabulary = _vocabulary(guidance, tokenizer)
        grammar = guidance.LLMatcher.grammar_from_lark(text)
        problem = str(guidance.LLMatcher.validate_grammar(grammar, vocabulary))
        if problem and not guidance.LLMatcher.is_validate_warning(problem):
            what = "response_format" if response_format is not None else "tools"
            raise PromptError(f"`{what}` cannot be enforced: {problem.splitlines()[0].rstrip('.')}")
        self._matcher = guidance.LLMatcher(vocabulary, grammar)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that only EOS may follow."""
        return not self._reasons and bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Return which ids may come next.

        Shapes:
            [vocab_size] bool
        """
        if self._reasons:
            return self._free
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        if self._matcher.is_stopped():
            self._check()
            mask[self._eos] = True
            return mask
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        mask[: known.size] = known
        return mask

    def accept(self, index: int) -> None:
        """Take the id that was drawn.

        Raises:
            PromptError: if the grammar does not allow it.
        """
        if self._reasons:
            self._reasons = index != self._end_think
            return
        if self._matcher.is_stopped() and index == self._eos:
            return
        if not self._matcher.consume_token(index):
            raise PromptError(f"token {index} is outside the grammar of the answer")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PromptError(f"the grammar of the answer gave up: {self._matcher.get_error()}")


class _GrammarWriter:
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
        ways = []
        if _may_be_text(schema):
            ways.append(f"{_quoted(self._head(key, True))} {_text_value(schema)}")
        if not _is_text(schema):
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
        matcher = self._guidance.LLMatcher
        problem = matcher.validate_grammar(matcher.grammar_from_lark(f"start: %json {text}"))
        if problem and not matcher.is_validate_warning(problem):
            if function.get("strict") is True:
                first = str(problem).splitlines()[0].rstrip(".")
                raise PromptError(f"strict tool `{function['name']}` cannot be enforced: {first}")
            # the schema is advice here: valid JSON is still better than nothing
            return "%json {}"
        return f"%json {text}"


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


def _guidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise PromptError(
            "`response_format` and call grammars need the extra `grammar`, which is not installed",
            hint="pip install 'v4sdk[grammar]'",
        ) from None


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


# building one takes about a second for the full vocabulary
_vocabularies: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


def _vocabulary(guidance: Any, tokenizer: Tokenizer) -> Any:
    found = _vocabularies.get(tokenizer)
    if found is None:
        found = guidance.LLTokenizer(_Vocabulary(tokenizer))
        _vocabularies[tokenizer] = found
    return found
