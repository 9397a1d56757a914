"""Six synthetic tasks with known answers: deterministic, split into train and held-out by their operands, scored exactly.

A dialogue is a message list as `v4sdk.prompts.encode_chat` takes it, assistant turns included. Its operands (the numbers,
the words, the asked fact: never the wording around them) decide the split, so that a held-out question is new whatever
the phrasing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from v4sdk_bench.nano import generators
from v4sdk_bench.nano.dialogue import Dialogue, Message, Split, split_of


@dataclass(frozen=True)
class Task:
    """A task: its name, what it asks in words, and its generator `make(rng, difficulty)`, difficulty in 0..1."""

    name: str
    about: str
    make: Callable[[Random, float], Dialogue]
    example: str


def generate(task: str, rng: Random, split: Split, difficulty: float = 1.0) -> Dialogue:
    """Draw dialogues of a task until one belongs to `split`."""
    while True:
        dialogue = TASKS[task].make(rng, difficulty)
        if split_of(task, dialogue.operands) == split:
            return dialogue


def held_out(task: str, count: int, seed: int = 0) -> list[Dialogue]:
    """`count` different held-out dialogues at full difficulty; the same for the same seed."""
    rng = Random(f"held-out/{task}/{seed}")
    found: dict[tuple[str, ...], Dialogue] = {}
    while len(found) < count:
        dialogue = generate(task, rng, "held_out")
        found.setdefault(dialogue.operands, dialogue)
    return list(found.values())


def overlap(task: str, train_count: int, held_out_count: int, seed: int = 0) -> int:
    """How many held-out operand tuples also occur among `train_count` drawn training dialogues; 0 is expected."""
    rng = Random(f"train/{task}/{seed}")
    seen = {generate(task, rng, "train").operands for _ in range(train_count)}
    return sum(d.operands in seen for d in held_out(task, held_out_count, seed))


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "add_sub",
            "add or subtract numbers of up to three digits (results from 0 up)",
            generators.add_sub,
            "What is 347 + 285?",
        ),
        Task(
            "look_up",
            "look up a fact given earlier",
            generators.look_up,
            "Give Mia tea. Give Bob jam. Give Ann milk. What do I give Bob?",
        ),
        Task(
            "sort_reverse",
            "sort or reverse three to five words",
            generators.sort_reverse,
            "Sort: tea, jam, golf",
        ),
        Task(
            "tool_call",
            "call a declared tool and use its result",
            generators.tool_call,
            "What is the weather in Rome?",
        ),
        Task("copy", "copy a quoted string", generators.copy, 'Repeat "tea gold".'),
        Task("json_answer", "answer in JSON", generators.json_answer, "Give JSON with name Mia, age 23."),
    )
}


def is_right(expected: Message, content: str, tool_calls: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Exact match of one assistant turn: the content as text, JSON answers included; calls by name and arguments."""
    want = [_call(c) for c in expected.get("tool_calls", ())]
    return content.strip() == expected["content"] and [_call(c) for c in tool_calls] == want


def _call(call: Mapping[str, Any]) -> tuple[str, Any]:
    inner = call.get("function", call)
    arguments = inner["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return inner["name"], arguments
    return inner["name"], arguments
