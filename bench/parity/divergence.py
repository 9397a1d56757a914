"""How far one numerics option is from another on a model that was trained, teacher-forced over held-out dialogues.

What counts is the text the model writes. A dialogue's prompt is made of random words, which no model could have learnt to
predict: what it says there is noise, and its distance is told beside the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v4sdk import Session
from v4sdk_bench.nano.dialogues import dialogues, written
from v4sdk_bench.parity.agreement import Text, score
from v4sdk_bench.parity.agreement import compare as compare_scored
from v4sdk_bench.parity.metrics import BF16_MEAN_KL

MEAN_KL_LIMIT = BF16_MEAN_KL


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


def compare(
    model: str | None, other: str = "fast", reference: str = "reference", count: int = 4,
    prompts: Sequence[list[int]] | None = None,
) -> Divergence:  # fmt: skip
    """Score the same tokens in two numerics options, each with its default row format."""
    with (
        Session.load(model, backend="cpu", numerics=reference) as a,
        Session.load(model, backend="cpu", numerics=other) as b,
    ):
        read = prompts if prompts is not None else dialogues(a, count)
        text = Text.every(read, "dialogues", [written(a, ids) for ids in read])
        found = compare_scored(score(a.loaded, text), score(b.loaded, text), text, a.config)
    own = found.counted
    return Divergence(own.kl_mean, own.kl_max, own.top1, own.positions, found.everywhere.kl_mean)
