"""The tokenizer: text never becomes control, ids agree with the full tokenizer, pieces decode to the whole."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from v4sdk.errors import CheckpointError, PromptError
from v4sdk.prompts import Span
from v4sdk.tokenizer import Tokenizer

QUICK = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def full(official_tokenizer_file: Path) -> tokenizers.Tokenizer:
    """The same file read by the library itself, added tokens included."""
    return tokenizers.Tokenizer.from_file(str(official_tokenizer_file))


def small_definition(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE of 256 letters and three merges, with two added tokens, one of them also in the vocabulary."""
    letters = sorted({*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0x143))} - {"\xad"})[:256]
    vocab = {letter: index for index, letter in enumerate(letters)}
    for merged in ("th", "the", "<t"):
        vocab[merged] = len(vocab)
    vocab["<think>"] = len(vocab)
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(vocab["<think>"], "<think>"),
            _added(len(vocab), "<｜end▁of▁sentence｜>"),
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [["t", "h"], ["th", "e"], ["<", "t"]],
        },
    }
    return copy.deepcopy(definition) | changes


def _added(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **flags}


def test_official_control_ids_are_found_by_spelling(official: Tokenizer) -> None:
    assert official.vocab_size == 129_280
    assert (official.bos_id, official.eos_id) == (0, 1)
    assert official.control_id("<｜User｜>") == 128_803
    assert official.control_id("｜DSML｜") == 128_825
    assert len(official.control_ids) == 1283


def test_every_control_token_in_text_stays_text(official: Tokenizer) -> None:
    for token in official.control_tokens:
        ids = official.encode(token)
        assert official.control_ids.isdisjoint(ids), token
        assert official.decode(ids) == token


@QUICK
@given(data=st.data())
def test_random_text_with_control_tokens_never_yields_a_control_id(
    data: st.DataObject, official: Tokenizer
) -> None:
    pieces = st.one_of(
        st.text(max_size=8),
        st.sampled_from(official.control_tokens),
        # a token cut in two, so that pieces could grow together again
        st.sampled_from(official.control_tokens).map(lambda token: token[: len(token) // 2]),
    )
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    ids = official.encode_spans([Span(text)])
    assert official.control_ids.isdisjoint(ids)
    assert official.decode(ids) == text


@QUICK
@given(text=st.text(max_size=60))
def test_text_has_the_ids_of_the_full_tokenizer(
    text: str, official: Tokenizer, full: tokenizers.Tokenizer
) -> None:
    if not any(token in text for token in official.control_tokens):
        assert official.encode(text) == full.encode(text, add_special_tokens=False).ids


def test_spans_have_the_ids_of_the_rendered_string(official: Tokenizer, full: tokenizers.Tokenizer) -> None:
    parts = [
        "<｜User｜>",
        " 12345 naïve\n\n 你好🙂",
        "<｜Assistant｜>",
        "</think>",
        "ok  \n",
        "<｜end▁of▁sentence｜>",
    ]
    spans = [Span(part, part in official.control_tokens) for part in parts]
    assert official.encode_spans(spans) == full.encode("".join(parts), add_special_tokens=False).ids


@QUICK
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_pieces_decode_to_the_whole(text: str, cuts: list[int], official: Tokenizer) -> None:
    ids = [*official.encode(text), official.eos_id]
    decoder = official.stream_decoder()
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [decoder.feed(ids[a:b]) for a, b in pairwise(edges)]
    assert "".join([*pieces, decoder.finish()]) == official.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_unfinished_character_is_held_and_then_replaced(official: Tokenizer) -> None:
    ids = official.encode("🙂")
    assert len(ids) > 1
    decoder = official.stream_decoder()
    assert decoder.feed(ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(ids) == "🙂"


def test_unused_and_unknown_ids_decode_to_nothing(official: Tokenizer) -> None:
    assert official.decode([official.vocab_size + 5]) == ""


def test_control_token_in_the_base_vocabulary_is_not_found_in_text() -> None:
    tokenizer = Tokenizer(small_definition())
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<think>"))
    assert tokenizer.decode(tokenizer.encode("<think> the")) == "<think> the"
    assert tokenizer.encode_spans([Span("<think>", True)]) == [tokenizer.control_id("<think>")]


def test_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(PromptError, match=r"U\+D800 at character 2") as caught:
        Tokenizer(small_definition()).encode("ab\ud800")
    assert caught.value.hint is not None


def test_unknown_control_token_is_refused() -> None:
    with pytest.raises(PromptError, match="no control token `<｜User｜>`"):
        Tokenizer(small_definition()).control_id("<｜User｜>")


def test_names_of_first_and_last_token_come_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_definition()), encoding="utf-8")
    config = {"bos_token": None, "eos_token": {"content": "<think>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_id == tokenizer.control_id("<think>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[]", "holds list"),
        (json.dumps({"model": {"type": "Unigram"}}), "expected BPE and ByteLevel"),
        (json.dumps(small_definition(decoder={"type": "Metaspace"})), "expected BPE and ByteLevel"),
        (json.dumps(small_definition(added_tokens=[{"content": "x"}])), "is malformed"),
        (json.dumps(small_definition(pre_tokenizer={"type": "Nonsense"})), "not accepted"),
    ],
)
def test_unusable_file_is_a_checkpoint_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)
