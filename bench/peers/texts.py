"""What engines read while they are compared: text the model knows where it was trained, random tokens where it was not.

On random tokens a trained model is close to undecided, and every rounding turns some choice of an expert.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.backend import Backend
from v4sdk_bench.nano.dialogues import dialogues, written


@dataclass(frozen=True)
class ParityText:
    """Prompts to be read whole, and the last of them once more with its end fed token by token.

    Attributes:
        counts: by prompt, positions the verdict is about [T]. split: where the feeding begins. what: in words.
    """

    prompts: tuple[tuple[int, ...], ...]
    counts: tuple[Tensor, ...]
    split: int
    what: str

    @property
    def fed(self) -> tuple[int, ...]:
        """Tokens of the last prompt that are fed one by one."""
        return self.prompts[-1][self.split :]

    @property
    def counted(self) -> Tensor:
        """Positions that count, over all prompts."""
        return torch.cat(self.counts)

    @property
    def positions(self) -> Tensor:
        """Of every row of all prompts."""
        return torch.cat([torch.arange(len(ids)) for ids in self.prompts])


def random_text(ids: Sequence[int], prompt: int, fed: int) -> ParityText:
    """One prompt of random tokens; all of it counts."""
    read = tuple(ids[: prompt + fed])
    return ParityText(
        (read,), (torch.ones(len(read), dtype=torch.bool),), prompt, f"{len(read)} random tokens"
    )


def bundled_text(backend: Backend, count: int) -> ParityText:
    """Held-out dialogues of the bundled model, `count` of each task; what the model writes in them counts."""
    with Session.load(None, backend=backend, numerics="exact") as session:
        # the longest last: its answer is what is fed
        read = sorted(dialogues(session, count), key=len)
        counts = [written(session, ids) for ids in read]
    split = int(counts[-1].nonzero()[0])
    what = f"{len(read)} held-out dialogues, {int(torch.cat(counts).sum())} tokens the model writes"
    return ParityText(tuple(tuple(ids) for ids in read), tuple(counts), split, what)


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Tokens for timing."""
    return random.Random(seed).choices(range(vocab_size), k=count)


def is_bundled(folder: Path) -> bool:
    """Whether this is the model that comes with v4sdk."""
    from v4sdk.loading import bundled_folder

    return folder.resolve() == bundled_folder().resolve()
