"""Hold an answer to a response format or to the call grammar: one token mask per step, by llguidance.

Reasoning is left free. A `string="true"` parameter is held to its enum only; every other value to its schema.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from v4sdk.errors import PromptError
from v4sdk.prompts.completion import Phase
from v4sdk.prompts.dialect import Dialect
from v4sdk.prompts.lark import GrammarWriter, problem_of
from v4sdk.prompts.options import check_response_format, choose_tools
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
        writer = GrammarWriter(guidance, dialect, tokenizer)
        text = writer.write(functions, response_format, opened=start == "calls")
        vocabulary = _vocabulary(guidance, tokenizer)
        grammar = guidance.LLMatcher.grammar_from_lark(text)
        problem = problem_of(guidance, grammar, vocabulary)
        if problem is not None:
            what = "response_format" if response_format is not None else "tools"
            raise PromptError(f"`{what}` cannot be enforced: {problem}")
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
