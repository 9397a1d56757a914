"""How far one numerics option is from another on a model that was trained, teacher-forced over held-out dialogues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4sdk import Session
from v4sdk.prompts import encode_chat
from v4sdk_bench.tasks import TASKS, held_out

MEAN_KL_LIMIT = 2e-3


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) in nats over every position.

    Attributes:
        mean, largest: of the positions; same_top: share of positions with the same best token; positions: how many.
    """

    mean: float
    largest: float
    same_top: float
    positions: int


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


def compare(
    model: str | None, other: str = "fast", reference: str = "reference", count: int = 4,
    prompts: Sequence[list[int]] | None = None,
) -> Divergence:  # fmt: skip
    """Score the same tokens in two numerics options, each with its default row format."""
    with (
        Session.load(model, backend="cpu", numerics=reference) as a,
        Session.load(model, backend="cpu", numerics=other) as b,
    ):
        kl, same = [], []
        for ids in prompts if prompts is not None else dialogues(a, count):
            p, q = a.logits(ids).log_softmax(-1), b.logits(ids).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    every = torch.cat(kl).double()
    return Divergence(
        float(every.mean()), float(every.max()), float(torch.cat(same).double().mean()), len(every)
    )
