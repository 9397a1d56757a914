"""The bundled model: its tasks, tokenizer and training, and that the shipped weights do what is said of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from v4sdk import Session
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, write_checkpoint
from v4sdk.kv_cache import KVCache
from v4sdk.numerics import EXACT
from v4sdk.ops.op import REFERENCES
from v4sdk.prompts import Dialect, encode_chat
from v4sdk.tokenizer import Tokenizer
from v4sdk_bench.nano.dialogue import Dialogue, split_of
from v4sdk_bench.nano.evaluate import questions, score, without_indexer
from v4sdk_bench.nano.generators import TOOLS, ask_many, ask_more
from v4sdk_bench.nano.tasks import TASKS, generate, held_out, is_right, overlap
from v4sdk_bench.nano.words import CITIES, NAMES, THINGS

ROOT = Path(__file__).parents[1]
NANO = ROOT / "v4sdk" / "nano"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer's modules, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "train_nano"))
    import train

    yield train
    for name in ("train", "batches", "parameters", "training_ops"):
        sys.modules.pop(name, None)


def options(train: Any, run: Path, **changed: Any) -> argparse.Namespace:
    argv, sys.argv = sys.argv, ["train", "--folder", str(NANO), "--run", str(run)]
    try:
        parsed = train.parse()
    finally:
        sys.argv = argv
    return argparse.Namespace(**{**vars(parsed), "batch": 256, "minutes": 1e9, **changed})


@pytest.fixture
def few_tests(training: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(training, "held_out", lambda task, count, seed: held_out(task, 1, seed))
    return training


@pytest.mark.parametrize("task", TASKS)
def test_held_out_operands_are_never_drawn_for_training(task: str) -> None:
    assert overlap(task, 500, 50) == 0
    assert {split_of(task, d.operands) for d in held_out(task, 20)} == {"held_out"}


@pytest.mark.parametrize("task", TASKS)
def test_dialogues_follow_from_the_seed(task: str) -> None:
    one, two = (generate(task, Random("seed"), "train") for _ in range(2))
    assert one == two
    assert one != generate(task, Random("other seed"), "train")


def test_further_questions_leave_held_out_facts_alone() -> None:
    rng = Random(3)
    for more in (lambda d: ask_more(d, rng, 12), lambda d: ask_many(d, rng, 24)):
        for _ in range(30):
            dialogue = more(generate("look_up", rng, "train", 0.3))
            said = " ".join(m["content"] for m in dialogue.messages if m["role"] == "assistant")
            for name, verb, thing in dialogue.facts:
                if split_of("look_up", (name, verb, thing)) == "held_out":
                    assert f"{name} {thing}" not in said
                    assert f"{name} {verb} {thing}" not in said


def test_worked_sums_end_in_the_answer() -> None:
    for dialogue in held_out("add_sub", 200):
        columns = dialogue.messages[1]["reasoning_content"].split(" ")
        digits = "".join(column[column.index("=") + 1] for column in reversed(columns))
        carry = columns[-1][-1] if dialogue.operands[1] == "+" else "0"
        assert int(carry + digits) == int(dialogue.messages[1]["content"])


def test_scoring_is_exact() -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    same = {"id": "x", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    other = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    assert is_right({"role": "assistant", "content": "632"}, "632")
    assert not is_right({"role": "assistant", "content": "632"}, "6322")
    expected = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert is_right(expected, "", [same])
    assert not is_right(expected, "", [other])
    assert not is_right(expected, "")


def test_task_words_and_digits_are_single_tokens() -> None:
    tokenizer = Tokenizer.from_folder(NANO)
    for word in (*NAMES, *THINGS, *CITIES):
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(f" {word}")) == 1
    assert len(tokenizer.encode("1234567890")) == 10
    assert len(tokenizer.encode(" Give Mia tea.")) == 4


def test_any_bytes_survive_the_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(NANO)
    for text in (
        "".join(map(chr, range(1, 0x300))),
        "日本語 🎉 \u202e",
        "<｜User｜></think>｜DSML｜",
        "\x00\r\n\t  ",
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.control_ids)


def test_tool_block_is_small() -> None:
    tokenizer, dialect = Tokenizer.from_folder(NANO), Dialect.from_folder(NANO)
    assert dialect is not None
    user = [{"role": "user", "content": "x"}]
    bare = len(tokenizer.encode_spans(encode_chat(user, dialect)))
    longest = sorted(TOOLS.values(), key=lambda t: len(json.dumps(t)))[-2:]
    assert len(tokenizer.encode_spans(encode_chat(user, dialect, tools=longest))) - bare <= 250


def test_configuration_has_every_layer_kind_and_fits_the_tokenizer() -> None:
    config = ModelConfig.from_folder(NANO)
    assert {layer.kind for layer in config.layers} == {"swa", "csa", "hca"}
    assert {layer.hash_routing for layer in config.layers} == {True, False}
    assert config.vocab_size == Tokenizer.from_folder(NANO).vocab_size
    assert config.max_position_embeddings == 1_048_576


@pytest.mark.parametrize("rounded", [False, True])
def test_training_computes_what_the_references_compute(few_tests: Any, tmp_path: Path, rounded: bool) -> None:
    # with many heads no two entries score exactly 0, so the picks do not hang on the order of ties
    raw = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    for name in ("tokenizer.json", "v4sdk.json"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"index_n_heads": 32}), encoding="utf-8")
    trainer = few_tests.Trainer(options(few_tests, tmp_path, folder=tmp_path))
    rng = Random(5)
    tasks = (("look_up", 0.3), ("add_sub", 1.0), ("look_up", 1.0), ("tool_call", 1.0))
    examples = [trainer.renderer.example(generate(task, rng, "train", level)) for task, level in tasks]
    packed = few_tests.pack(examples, list(few_tests.MIX))
    numerics = few_tests.ROUNDED if rounded else EXACT
    with torch.no_grad():
        got, *_ = trainer.run(packed, True, numerics)
        model = trainer.model
        model.ops, model.numerics = REFERENCES, numerics
        cache = KVCache(trainer.config, "float32")
        batch = cache.batch(
            [cache.allocate() for _ in examples], [e.ids for e in examples], [0] * len(examples)
        )
        want = model.logits(model.forward(batch, cache)[packed.target_rows])
    # roundings may flip where the order of a sum differs
    assert (got - want).norm() <= (1e-2 if rounded else 1e-5) * want.norm()


def test_dense_training_sees_more_than_the_picks(few_tests: Any, tmp_path: Path) -> None:
    trainer = few_tests.Trainer(options(few_tests, tmp_path))
    example = trainer.renderer.example(generate("look_up", Random(1), "train"))
    packed = few_tests.pack([example], list(few_tests.MIX))
    with torch.no_grad():
        dense, losses, recall, _ = trainer.run(packed, False, EXACT)
        sparse, *_ = trainer.run(packed, True, EXACT)
    assert (dense - sparse).norm() > 1e-3 * dense.norm()
    assert len(losses) == len(recall) == 2
    assert all(loss >= 0 for loss in losses)


def test_the_indexer_learns_without_bending_the_network(few_tests: Any, tmp_path: Path) -> None:
    trainer = few_tests.Trainer(options(few_tests, tmp_path))
    packed = trainer.mixer.step(0, 0.9)
    _, losses, _, _ = trainer.run(packed, True, EXACT)
    torch.stack(losses).sum().backward()
    for name, parameter in trainer.parameters.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("indexer" in name), name


def test_a_resumed_run_goes_on_bit_for_bit(few_tests: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = few_tests.Trainer(options(few_tests, tmp_path))
        for _ in range(2):
            whole.train_step()
        whole.save(tmp_path / "checkpoint.pt")
        rest = few_tests.Trainer(options(few_tests, tmp_path))
        rest.resume(tmp_path / "checkpoint.pt")
        for trainer in (whole, rest):
            trainer.train_step()
    finally:
        torch.set_num_threads(threads)
    assert whole.steps == rest.steps == 3
    for one, two in zip(whole.parameters.parameters(), rest.parameters.parameters(), strict=True):
        assert torch.equal(one, two)


def test_training_rounds_to_what_the_writer_stores(few_tests: Any, tmp_path: Path) -> None:
    trainer = few_tests.Trainer(options(few_tests, tmp_path))
    named = {name: value.detach() for name, value in trainer.parameters.named().items()}
    write_checkpoint(tmp_path / "out", trainer.config, named)
    with Checkpoint(tmp_path / "out") as stored:
        read = FloatTensors(trainer.config, stored)
        for name, rounded in trainer.parameters.rounded().items():
            assert torch.equal(rounded.detach().to(torch.bfloat16), read[name].to(torch.bfloat16)), name


@pytest.fixture(scope="module")
def session() -> Any:
    with Session.load() as opened:
        yield opened


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_model_answers_held_out_questions(session: Any, task: str) -> None:
    # `age` is known to fail and has its own test
    dialogues = [d for d in held_out(task, 20, seed=7) if d.operands[0] != "age"][:10]
    share, mistakes = answer(session, dialogues)
    assert share >= 0.8, mistakes


# the training mix held too few tool answers that name a person; strict, so weights trained on more of them end this mark
@pytest.mark.xfail(
    reason="v4-nano names the wrong person after `age`, until it is trained again", strict=True
)
def test_the_shipped_model_answers_from_the_age_tool(session: Any) -> None:
    dialogues = [d for d in held_out("tool_call", 60, seed=7) if d.operands[0] == "age"]
    share, mistakes = answer(session, dialogues)
    assert share >= 0.8, mistakes


def answer(session: Any, dialogues: list[Dialogue]) -> tuple[float, list[str]]:
    asked = list(questions(dialogues))
    fields = ("tools", "response_format")
    results = session.chat_many(
        [(q.request["messages"], {k: q.request[k] for k in fields if k in q.request}) for q in asked]
    )
    answers = [
        {
            "content": r.content,
            "tool_calls": [{"name": c.name, "arguments": c.arguments} for c in r.tool_calls],
        }
        for r in results
    ]
    return score(asked, answers)


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.name != "tool_call"])
def test_the_examples_of_the_bundled_model_are_answered(session: Any, task: Any) -> None:
    right = {
        "add_sub": "632",
        "look_up": "Give Bob jam.",
        "sort_reverse": "golf, jam, tea",
        "copy": "tea gold",
        "json_answer": '{"name": "Mia", "age": 23}',
    }
    assert session.chat([{"role": "user", "content": task.example}]).content == right[task.name]


def test_look_up_needs_the_indexer() -> None:
    asked = list(questions(held_out("look_up", 12, seed=7)))
    share, _ = score(asked, without_indexer(asked, None))
    assert share <= 0.5
