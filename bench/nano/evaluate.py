"""Score a model on the six tasks: `python -m v4sdk_bench.nano.evaluate`.

Every question is a held-out one and goes through `v4sdk run --prompts` with default settings, from a fresh state. An
answer counts when it is exactly right; a tool call counts when both the call and the answer from its result are. For
look-up the report also says how far away the asked facts lie, and what is lost when every CSA layer attends to its most
recent entries in place of the indexer's picks.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4sdk_bench.machine import machine
from v4sdk_bench.nano.dialogue import Dialogue
from v4sdk_bench.nano.tasks import TASKS, held_out, is_right, overlap
from v4sdk_bench.stage import BenchError

TRAIN_DRAWS = 20_000
GATE = 0.8
# right of `ASKED` held-out questions, as the README tells them (`bench/results/v4-nano.json`)
ASKED = 250
RIGHT = {
    "add_sub": 250,
    "look_up": 250,
    "sort_reverse": 248,
    "tool_call": 237,
    "copy": 236,
    "json_answer": 250,
}
# one-sided probability of three standard deviations: a score this unlikely is not chance
_THREE_SIGMA = 0.00135


@dataclass(frozen=True)
class Question:
    """One request and what it should bring; `dialogue` numbers the dialogue it belongs to."""

    task: str
    dialogue: int
    request: dict[str, Any]
    expected: Mapping[str, Any]


def questions(dialogues: Sequence[Dialogue]) -> Iterator[Question]:
    """The requests of dialogues: the last user turn, and for tools the turn after the result."""
    for number, dialogue in enumerate(dialogues):
        for messages, expected in dialogue.steps():
            request: dict[str, Any] = {"messages": messages}
            if dialogue.tools:
                request["tools"] = list(dialogue.tools)
            if dialogue.response_format:
                request["response_format"] = dict(dialogue.response_format)
            yield Question(dialogue.task, number, request, expected)


def run_file(
    asked: Sequence[Question], model: str | None, backend: str | None = None, quiet: bool = False
) -> list[dict[str, Any]]:
    """Answer by the command line, with nothing but the file, the model and perhaps the backend named.

    Raises:
        BenchError: if the command does not answer every request, with the last thing it said if `quiet`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.jsonl"
        path.write_text("".join(json.dumps(q.request) + "\n" for q in asked), encoding="utf-8")
        command = [sys.executable, "-m", "v4sdk", "run", "--prompts", str(path)]
        command += ["--model", model] if model else []
        command += ["--backend", backend] if backend else []
        said = subprocess.PIPE if quiet else None
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(asked):
        last = (done.stderr or "").strip().splitlines()[-1:]
        raise BenchError(
            f"`v4sdk run` gave {len(answers)} answers to {len(asked)} requests, exit code {done.returncode}"
            + "".join(f": {line}" for line in last),
            hint='try v4sdk run "What is 347 + 285?"',
        )
    return sorted(answers, key=lambda a: int(a["index"]))


def score(asked: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> tuple[float, list[str]]:
    """Share of dialogues with every answer right, and up to three mistakes in words."""
    right: dict[int, bool] = {}
    mistakes: list[str] = []
    for question, answer in zip(asked, answers, strict=True):
        ok = is_right(question.expected, answer.get("content") or "", answer.get("tool_calls") or ())
        right[question.dialogue] = right.get(question.dialogue, True) and ok
        if not ok and len(mistakes) < 3:
            got = answer.get("content") or json.dumps(answer.get("tool_calls") or answer.get("error"))
            mistakes.append(f"expected {_words(question.expected)!r}, got {got!r}")
    return sum(right.values()) / len(right), mistakes


def by_tool(
    dialogues: Sequence[Dialogue], asked: Sequence[Question], answers: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Right of asked, for each tool: different operands are many for some tools and few for others."""
    pairs = list(zip(asked, answers, strict=True))
    found = {}
    for tool in sorted({d.operands[0] for d in dialogues}):
        numbers = {i for i, d in enumerate(dialogues) if d.operands[0] == tool}
        mine = [(q, a) for q, a in pairs if q.dialogue in numbers]
        share, _ = score([q for q, _ in mine], [a for _, a in mine])
        found[tool] = f"{round(share * len(numbers))} of {len(numbers)}"
    return found


def sampled(task: str, count: int) -> list[Dialogue]:
    """`count` of the questions the README's score was taken from, evenly spread; all of them if there are no more."""
    every: list[Dialogue] = held_out(task, ASKED)
    return [every[i * ASKED // count] for i in range(count)] if count < ASKED else every


def least_right(task: str, count: int) -> int:
    """Right answers of `count` that a model of the README's score falls below with a probability under three sigma.

    The score itself was counted, so its estimate is (right + 1) / (asked + 2), which is never certain.
    """
    p = (RIGHT[task] + 1) / (ASKED + 2)
    below, least = 0.0, 0
    while least < count:
        below += math.comb(count, least) * p**least * (1 - p) ** (count - least)
        if below > _THREE_SIGMA:
            break
        least += 1
    return least


def accuracy(
    count: int, tasks: Sequence[str] = tuple(RIGHT), backend: str | None = None
) -> Iterator[tuple[str, int, int, list[str]]]:
    """Ask the bundled model in one process: by task the right answers, how many were asked, and up to three mistakes."""
    drawn = {task: list(questions(sampled(task, count))) for task in tasks}
    answers = iter(run_file([q for asked in drawn.values() for q in asked], None, backend, quiet=True))
    for task, asked in drawn.items():
        share, mistakes = score(asked, [next(answers) for _ in asked])
        number = min(count, ASKED)
        yield task, round(share * number), number, mistakes


def _words(message: Mapping[str, Any]) -> str:
    return str(message["content"] or json.dumps([call["function"] for call in message.get("tool_calls", ())]))


def geometry(dialogues: Sequence[Dialogue], model: str | None) -> dict[str, Any]:
    """Where the asked facts of look-ups lie: tokens from the end of the fact to the end of the prompt, and entries."""
    from v4sdk import Session
    from v4sdk.prompts import encode_chat

    with Session.load(model) as session:
        config, distances, entries = session.config, [], []
        for dialogue in dialogues:
            messages = dialogue.steps()[0][0]
            ids = session.tokenizer.encode_spans(
                encode_chat(messages, session.dialect, thinking=session.default_thinking)
            )
            name, verb, thing = dialogue.operands
            text = str(messages[0]["content"])
            after = text[text.index(f"{verb} {name} {thing}.") + len(f"{verb} {name} {thing}.") :]
            distances.append(len(session.tokenizer.encode(after)))
            entries.append(len(ids) // 4)
        return {
            "sliding_window": config.sliding_window, "index_topk": config.index_topk, "nearest_fact_tokens": min(distances),
            "farthest_fact_tokens": max(distances), "fewest_entries": min(entries), "most_entries": max(entries),
        }  # fmt: skip


def without_indexer(asked: Sequence[Question], model: str | None) -> list[dict[str, Any]]:
    """Answer in this process, every CSA layer attending to its most recent visible entries in place of its picks."""
    import torch
    from torch import Tensor

    from v4sdk import Session
    from v4sdk import ops as o
    from v4sdk.backend import Kernel, kernel
    from v4sdk.numerics import Numerics
    from v4sdk.ops.batch import Batch
    from v4sdk_bench.parity.sides import References

    def most_recent(
        q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
    ) -> Tensor:
        visible = (batch.positions.long()[:, None] + 1) // ratio
        picks = (visible - topk).clamp_min(0) + torch.arange(topk, device=visible.device)
        return torch.where(picks < visible, picks, -1).to(torch.int32)

    # checkers see the other packages of this folder untyped
    class WithoutIndexer(References):  # type: ignore[misc]
        def kernels(self) -> Sequence[Kernel[Any, Any]]:
            return (kernel(o.index_topk, most_recent),)

    with Session.load(model, backend=WithoutIndexer()) as session:
        results = session.chat_many([(q.request["messages"], {}) for q in asked])
        return [{"content": r.content} for r in results]


def evaluate(model: str | None, count: int, tasks: Sequence[str], ablate: bool) -> dict[str, Any]:
    """All scores, as a JSON-ready object; progress on stderr."""
    report: dict[str, Any] = {"count": count, "scores": {}, "overlap": {}, "mistakes": {}}
    for task in tasks:
        dialogues = held_out(task, count)
        asked = list(questions(dialogues))
        report["overlap"][task] = overlap(task, TRAIN_DRAWS, count)
        answers = run_file(asked, model)
        report["scores"][task], report["mistakes"][task] = score(asked, answers)
        print(f"{task}: {report['scores'][task]:.1%} of {count}", file=sys.stderr, flush=True)
        if task == "tool_call":
            report["tool_call"] = by_tool(dialogues, asked, answers)
        if task == "look_up":
            report["look_up"] = geometry(dialogues, model)
            if ablate:
                report["look_up"]["with_most_recent_entries"] = score(asked, without_indexer(asked, model))[0]
    return report


def main() -> None:
    """Print a table; exit 1 unless look-up and two more tasks reach the gate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder; the bundled model if absent")
    parser.add_argument("--count", type=int, default=200, help="held-out dialogues per task")
    parser.add_argument(
        "--task", action="append", choices=list(TASKS), help="only this task; may be repeated"
    )
    parser.add_argument("--no-ablation", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the report there")
    args = parser.parse_args()
    tasks = args.task or list(TASKS)
    try:
        report = evaluate(args.model, args.count, tasks, not args.no_ablation)
    except BenchError as exc:
        raise SystemExit(exc.message) from None
    print(f"| task | held-out exact match (n = {args.count}) | operands among {TRAIN_DRAWS} training draws |")
    print("| --- | ---: | ---: |")
    for task in tasks:
        print(f"| {task} | {report['scores'][task]:.1%} | {report['overlap'][task]} |")
    for task in ("look_up", "tool_call"):
        for key, value in report.get(task, {}).items():
            print(f"{task} {key}: {value}")
    for task, mistakes in report["mistakes"].items():
        for mistake in mistakes:
            print(f"{task}: {mistake}")
    if args.json:
        args.json.write_text(json.dumps({"about": machine(), **report}, indent=2) + "\n", encoding="utf-8")
    passed = [task for task, value in report["scores"].items() if value >= GATE]
    if not args.task and ("look_up" not in passed or len(passed) < 3):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
