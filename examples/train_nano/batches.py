"""Packed training batches: dialogues of all tasks, rendered in the bundled dialect, with the tokens to learn marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from v4sdk.prompts import Dialect, encode_chat
from v4sdk.tokenizer import Tokenizer
from v4sdk_bench.nano.dialogue import Dialogue
from v4sdk_bench.nano.generators import ask_many, ask_more
from v4sdk_bench.nano.tasks import generate

# share of training tokens per task
MIX: Mapping[str, float] = {
    "add_sub": 0.20, "look_up": 0.30, "sort_reverse": 0.18, "tool_call": 0.18, "copy": 0.07, "json_answer": 0.07,
}  # fmt: skip
_CHAT_SHARE = 0.15


@dataclass(frozen=True)
class Example:
    """One dialogue as ids; `learn[i]` marks ids that the model itself has to write."""

    task: str
    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class Packed:
    """Examples of one step. `target_rows` [n] predict `targets` [n]; `task_of` [n] indexes `tasks`; `example_of` [n]."""

    examples: list[Example]
    target_rows: Tensor
    targets: Tensor
    task_of: Tensor
    example_of: Tensor


class Renderer:
    """Dialogues to ids, with the dialect and tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        dialect = Dialect.from_folder(folder)
        if dialect is None:
            raise SystemExit(f"{folder} has no dialect; run make_tokenizer.py first")
        self.dialect, self.tokenizer = dialect, Tokenizer.from_folder(folder)
        self._assistant = self.tokenizer.control_id(dialect.assistant)
        self._eos = self.tokenizer.eos_id

    def example(self, dialogue: Dialogue, thinking: bool = True) -> Example:
        """Render a dialogue; everything after an assistant header is to be learnt, its first token (the mode) is given."""
        spans = encode_chat(
            dialogue.messages, self.dialect, thinking=thinking, tools=list(dialogue.tools),
            response_format=dialogue.response_format, add_generation_prompt=False,
        )  # fmt: skip
        ids = self.tokenizer.encode_spans(spans)
        learn, since = [], -1
        for i, token in enumerate(ids):
            learn.append(since >= 0 and i > since + 1)
            if token == self._assistant:
                since = i
            elif token == self._eos:
                since = -1
        return Example(dialogue.task, ids, learn)

    def draw(self, task: str, rng: Random, progress: float) -> Example:
        """One training example; look-ups grow with progress and carry several questions."""
        difficulty = 1.0
        if task == "look_up":
            # few facts teach the mechanism, many facts the distance; tokens, not dialogues, are what long ones cost
            long = 0.02 + 0.5 * max(0.0, min(1.0, (progress - 0.55) / 0.1))
            middle = long + (0.1 if progress < 0.55 else 0.3)
            point = rng.random()
            difficulty = 0.3 if point < middle else 0.1 if point < 0.5 + middle / 2 else 0.04
            if point < long:
                # above 1 the harder form of facts takes part, too
                difficulty = 1.0 if rng.random() < 0.7 else 1.5
        elif task == "tool_call" and rng.random() < 0.6:
            difficulty = 1.5
        dialogue = generate(task, rng, "train", difficulty)
        if task == "look_up" and rng.random() < 0.45:
            dialogue = ask_many(dialogue, rng, 24)
        elif task == "look_up" and rng.random() < 0.85:
            dialogue = ask_more(
                dialogue, rng, rng.randint(2, 12) if rng.random() < 0.95 else rng.randint(20, 40)
            )
        return self.example(dialogue, thinking=rng.random() >= _CHAT_SHARE)


class Mixer:
    """Draws examples so that every task keeps its share of tokens; a step depends on its number only."""

    def __init__(
        self, renderer: Renderer, tokens: int, seed: int = 0, mix: Mapping[str, float] = MIX
    ) -> None:
        self.renderer, self.tokens, self.seed, self.mix = renderer, tokens, seed, dict(mix)

    def step(self, number: int, progress: float) -> Packed:
        """The batch of one step: about `tokens` tokens."""
        rng = Random(f"batch/{self.seed}/{number}")
        used = dict.fromkeys(self.mix, rng.random() * 0.01)
        examples: list[Example] = []
        total = 0
        while total < self.tokens:
            # the task that is furthest behind its share, with some chance
            task = min(self.mix, key=lambda t: (used[t] + rng.random() * self.tokens * 0.03) / self.mix[t])
            example = self.renderer.draw(task, rng, progress)
            if total and total + len(example.ids) > self.tokens * 1.1:
                break
            examples.append(example)
            used[task] += len(example.ids)
            total += len(example.ids)
        return pack(examples, list(self.mix))


def pack(examples: Sequence[Example], tasks: Sequence[str]) -> Packed:
    """Concatenate examples; the row before a token predicts it."""
    rows, targets, task_of, example_of = [], [], [], []
    offset = 0
    for number, example in enumerate(examples):
        for i, wanted in enumerate(example.learn):
            if wanted:
                rows.append(offset + i - 1)
                targets.append(example.ids[i])
                task_of.append(tasks.index(example.task))
                example_of.append(number)
        offset += len(example.ids)
    return Packed(
        list(examples), *(torch.tensor(x, dtype=torch.long) for x in (rows, targets, task_of, example_of))
    )
