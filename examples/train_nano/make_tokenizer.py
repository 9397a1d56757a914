"""Make the tokenizer and the prompt wording of the bundled model: byte-level BPE, 1,280 tokens, V4 control tokens.

    python examples/train_nano/make_tokenizer.py --out v4sdk/nano

The result is deterministic. Digits are one token each, and every word of the tasks is one token with and without a space
before it, so that a stated fact is four tokens long.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from v4sdk.prompts import encode_chat
from v4sdk.prompts.dialect import TASKS as TASK_TOKENS
from v4sdk.prompts.dialect import custom_dialect
from v4sdk.tokenizer import BOS, EOS
from v4sdk_bench.nano.tasks import TASKS, generate
from v4sdk_bench.nano.words import CITIES, HABITS, KEYWORDS, NAMES, PHRASES, THINGS, WEATHER

VOCAB_SIZE = 1280
CONTROL = (
    BOS, EOS, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>",
    *TASK_TOKENS.values(),
)  # fmt: skip
# words that came to the tasks when the model was already in training
LATE = (" Give", " give", "Send", " Send", " send")
# one digit, a word with the space before it, a run of signs, white space
_PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

DIALECT = {
    "name": "v4-nano",
    "tools_template": "Tools:\n{schemas}",
    "json_schema_template": "JSON schema: {schema}",
    "json_object_text": "Answer in JSON.",
    "efforts": {},
}
GENERATION = {
    "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False, "max_new_tokens": 256,
}  # fmt: skip


def settings() -> dict[str, object]:
    """What `v4sdk.json` says: wording, the mode in which the model was evaluated, and what it can do."""
    tasks = [{"name": t.name, "about": t.about, "example": t.example} for t in TASKS.values()]
    return {"dialect": DIALECT, "default_mode": "thinking", "trained_context": 1024, "demo": {"tasks": tasks}}


def texts(count: int) -> Iterator[str]:
    """Dialogues of every task, without their control tokens, and every word often enough to become a token."""
    rng = Random("tokenizer")
    dialect = custom_dialect(DIALECT)
    for i in range(count):
        d = generate(list(TASKS)[i % len(TASKS)], rng, "train", difficulty=rng.random())
        spans = encode_chat(d.messages, dialect, tools=d.tools, response_format=d.response_format)
        yield from (span.text for span in spans if not span.control)
    for word in (*NAMES, *THINGS, *CITIES):
        yield from (f"{word}\n{word}", f" {word} {word}") * count
    forms = [form for verb in HABITS for form in verb]
    for word in (*WEATHER, *forms, *PHRASES, *KEYWORDS):
        yield from (f" {word} {word}" if word.islower() else f"{word}\n{word}",) * count
    for word in KEYWORDS:
        yield from (f"_{word}_{word}",) * count


def train(count: int) -> tokenizers.Tokenizer:
    """Train on generated text; every byte has a token of its own, so any input can be encoded."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(count), trainer)
    return tokenizer


def add_words(definition: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Make each text one token, in the places of the last merges that nothing builds on.

    Ids of all other tokens stay, so a model that is being trained can go on.
    """
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    spare = ["".join(m) for m in merges]
    for word in words:
        while len(pieces := tokenizers.Tokenizer.from_str(json.dumps(definition)).encode(word).tokens) > 1:
            used = {part for merge in merges for part in merge}
            old = next(token for token in reversed(spare) if token not in used)
            spare.remove(old)
            merges[:] = [m for m in merges if "".join(m) != old] + [pieces[:2]]
            vocab["".join(pieces[:2])] = vocab.pop(old)
    return definition


def main() -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and v4sdk.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dialogues", type=int, default=6000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    definition = add_words(json.loads(train(args.dialogues).to_str()), LATE)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.save(str(args.out / "tokenizer.json"))
    named = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": "<｜▁pad▁｜>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"tokenizer_config.json": named, "generation_config.json": GENERATION, "v4sdk.json": settings()}
    for name, content in files.items():
        (args.out / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
    words = [*NAMES, *THINGS, *CITIES]
    split = [w for w in words for form in (w, f" {w}") if len(tokenizer.encode(form).ids) > 1]
    print(f"{tokenizer.get_vocab_size()} tokens; words of more than one token: {split or 'none'}")


if __name__ == "__main__":
    main()
