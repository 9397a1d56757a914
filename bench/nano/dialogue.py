"""What a synthetic dialogue is, and the split of all dialogues into train and held-out by what they are about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 8  # one in this many operand tuples is held out
Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """One conversation with its right answers.

    Attributes:
        task: name in `TASKS`.
        operands: what the question is about; decides the split.
        messages: from the first user turn to the last assistant turn.
        tools: declared functions. response_format: as the API takes it.
        facts: look-up only: all of them. asked_at: how many stand after the asked one.
    """

    task: str
    operands: tuple[str, ...]
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    facts: tuple[tuple[str, str, str], ...] = ()
    asked_at: int | None = None

    def steps(self) -> list[tuple[list[Message], Message]]:
        """What evaluation asks: (messages so far, expected assistant turn), for every turn after the last user turn."""
        last = max(i for i, m in enumerate(self.messages) if m["role"] == "user")
        found = []
        for i, message in enumerate(self.messages):
            if i > last and message["role"] == "assistant":
                found.append((list(self.messages[:i]), message))
        return found


def split_of(task: str, operands: Sequence[str]) -> Split:
    """Which split a tuple of operands belongs to, by a hash that does not depend on process or platform."""
    key = json.dumps([task, *operands], ensure_ascii=False).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % HELD_OUT_SHARE
    return "held_out" if bucket == 0 else "train"


def say(user: str, answer: str, reasoning: str = "") -> tuple[Message, ...]:
    """One question and its answer."""
    assistant: Message = {"role": "assistant", "content": answer}
    if reasoning:
        assistant["reasoning_content"] = reasoning
    return ({"role": "user", "content": user}, assistant)
