"""Held-out dialogues of the bundled model as token ids, and which of their tokens are the model's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.prompts import encode_chat
from v4sdk_bench.nano.tasks import TASKS, held_out


def dialogues(session: Session, count: int) -> list[list[int]]:
    """Token ids of `count` held-out dialogues of every task, answers included."""
    return [
        session.tokenizer.encode_spans(
            encode_chat(
                list(d.messages),
                session.dialect,
                thinking=session.default_thinking,
                tools=list(d.tools) or None,
                add_generation_prompt=False,
            )
        )
        for task in TASKS
        for d in held_out(task, count)
    ]


def questions(session: Session, count: int) -> Iterator[list[int]]:
    """Token ids of held-out questions up to where the model begins to write, one task after the other, `count` of each."""
    drawn = [held_out(task, count) for task in TASKS]
    for of_every_task in zip(*drawn, strict=True):
        for d in of_every_task:
            messages, _ = d.steps()[0]
            spans = encode_chat(
                messages, session.dialect, thinking=session.default_thinking, tools=list(d.tools) or None
            )
            yield session.tokenizer.encode_spans(spans)


def written(session: Session, ids: list[int]) -> Tensor:
    """Positions whose next token belongs to an assistant's turn, the token that sets its mode left out; all if none does."""
    assistant, end = session.tokenizer.control_id(session.dialect.assistant), session.tokenizer.eos_id
    mine, since = [], len(ids)
    for at, token in enumerate(ids):
        mine.append(at > since + 1)
        if token == assistant:
            since = at
        elif token == end:
            since = len(ids)
    shifted = torch.tensor([*mine[1:], False])
    return shifted if shifted.any() else torch.ones(len(ids), dtype=torch.bool)
