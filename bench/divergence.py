"""How far one numerics option is from another on a model that was trained, teacher-forced over held-out dialogues.

What counts is the text the model writes. A dialogue's prompt is made of random words, which no model could have learnt to
predict: what it says there is noise, and its distance is told beside the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.prompts import encode_chat
from v4sdk_bench.tasks import TASKS, held_out

MEAN_KL_LIMIT = 2e-3


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) in nats.

    Attributes:
        mean, largest: over positions whose next token the model writes; same_top: share of them with the same best
            token; positions: how many they are. mean_everywhere: over prompts too.
    """

    mean: float
    largest: float
    same_top: float
    positions: int
    mean_everywhere: float


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
        kl, same, written = [], [], []
        for ids in prompts if prompts is not None else dialogues(a, count):
            p, q = a.logits(ids).log_softmax(-1), b.logits(ids).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            written.append(_written(a, ids))
    every, own = torch.cat(kl).double(), torch.cat(written)
    answers, agree = every[own], torch.cat(same)[own].double()
    return Divergence(
        float(answers.mean()), float(answers.max()), float(agree.mean()), len(answers), float(every.mean())
    )


def _written(session: Session, ids: list[int]) -> Tensor:
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
