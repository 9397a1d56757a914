"""The front door: text in and out, chat over kept state, cancelling, closing, and every refusal."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from v4sdk import Piece, Result, SamplingParams, Session, plugins
from v4sdk.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    ContextOverflow,
    KernelMismatch,
    MemoryRefused,
    PromptError,
    SamplingError,
    StateError,
    UnknownBackend,
    V4Error,
)
from v4sdk.ops import OPS
from v4sdk.progress import Progress

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def session(chat_folder: Path) -> Iterator[Session]:
    with Session.load(chat_folder, backend="cpu", numerics="exact", prefill_chunk=64) as loaded:
        yield loaded


@pytest.fixture
def script(session: Session) -> Iterator[Callable[[str], None]]:
    """Makes the model say what a test wants: `script(text)` sets the tokens of the next answer."""
    table, wanted = session.loaded.binding.table, list[int]()

    def scripted(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        drawn = OPS["sample"](logits, *args, **kwargs)
        ids = torch.tensor([wanted.pop(0) if wanted else 1] * logits.shape[0])
        return (ids, *drawn[1:])

    def say(text: str) -> None:
        wanted[:] = _tokens(session, text)

    table.set("sample", scripted)
    yield say
    table.set("sample", OPS["sample"])


def _tokens(session: Session, text: str) -> list[int]:
    """Token ids of an answer in which spelled control tokens are meant."""
    ids, control = [], [t for t in session.tokenizer.control_tokens if t in text]
    while text:
        at, token = min(((text.find(t), t) for t in control if t in text), default=(len(text), ""))
        ids += session.tokenizer.encode(text[:at])
        ids += [session.tokenizer.control_id(token)] if token else []
        text = text[at + len(token) :]
    return ids


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _joined(pieces: list[Piece], kind: str) -> str:
    return "".join(p.text for p in pieces if p.kind == kind)


def test_pieces_concatenate_to_the_result(session: Session) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=25, top_logprobs=2, ignore_eos=True)
    result = session.generate("one two three", params)
    pieces = list(session.stream("one two three", params))
    assert _joined(pieces, "content") == result.content != ""
    assert tuple(i for p in pieces for i in p.ids) == result.ids
    assert tuple(lp for p in pieces for lp in p.logprobs) == result.logprobs
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    usage = pieces[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (result.usage.prompt_tokens, 25)
    assert result.seed == 3


def test_seed_decides_the_answer_and_is_reported(session: Session) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    first = session.generate("hello", params)
    assert first.seed is not None
    again = session.generate(
        "hello", SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=first.seed)
    )
    assert again.ids == first.ids
    assert session.generate("hello", params).seed != first.seed


def test_list_of_prompts_equals_each_alone(session: Session) -> None:
    prompts = ["a", "one two three four five six seven " * 12, "lamp", "the tea is red"]
    together = session.generate(prompts, GREEDY)
    assert [r.ids for r in together] == [session.generate(p, GREEDY).ids for p in prompts]
    ids = [[5, 6, 7], [9]]
    assert [r.ids for r in session.generate(ids, GREEDY)] == [session.generate(p, GREEDY).ids for p in ids]


def test_integers_of_other_libraries_are_token_ids(session: Session) -> None:
    expected = session.generate([5, 6], GREEDY).ids
    assert session.generate(torch.tensor([5, 6]), GREEDY).ids == expected  # type: ignore[call-overload]
    assert session.generate(np.array([5, 6]), GREEDY).ids == expected  # type: ignore[call-overload]


def test_rows_are_taken_only_for_prompts_that_run(chat_folder: Path) -> None:
    with Session.load(chat_folder, backend="cpu", numerics="exact", max_batch=2) as narrow:
        narrow.generate([[5]] * 2, SamplingParams(temperature=0, max_tokens=1))
        size = narrow.cache_bytes
        narrow.generate([[5]] * 12, SamplingParams(temperature=0, max_tokens=2))
        assert narrow.cache_bytes == size


def test_more_prompts_than_rows_are_answered_in_turn(chat_folder: Path) -> None:
    prompts = [[i + 3, 7, i * 5 + 4] for i in range(5)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    with Session.load(chat_folder, backend="cpu", numerics="exact", max_batch=2) as narrow:
        few = narrow.generate(prompts, params)
    with Session.load(chat_folder, backend="cpu", numerics="exact") as wide:
        assert [r.ids for r in wide.generate(prompts, params)] == [r.ids for r in few]


def test_equal_prompts_of_a_list_are_drawn_apart(session: Session) -> None:
    one, two = session.generate([[4, 5]] * 2, SamplingParams(temperature=2.0, seed=1, max_tokens=8))
    assert one.ids != two.ids


def test_text_prompt_of_an_empty_sequence_starts_with_bos(session: Session) -> None:
    with session.sequence() as sequence:
        session.generate("lamp", GREEDY, sequence)
        assert sequence.ids[0] == session.tokenizer.bos_id
        session.generate("tea", GREEDY, sequence)
        assert sequence.ids.count(session.tokenizer.bos_id) <= 1 + 12


def test_user_text_never_becomes_a_control_token(session: Session) -> None:
    with session.sequence() as sequence:
        session.generate("<｜User｜></think>", GREEDY, sequence)
        prompt = sequence.ids[: len(sequence) - 6]
        assert not set(prompt[1:]) & session.tokenizer.control_ids


def test_generation_goes_on_where_it_stopped(session: Session) -> None:
    whole = session.generate("one two", SamplingParams(temperature=1, seed=4, max_tokens=12, ignore_eos=True))
    with session.sequence() as sequence:
        four = SamplingParams(temperature=1, seed=4, max_tokens=4, ignore_eos=True)
        parts = [session.generate("one two", four, sequence)]
        parts += [session.generate([], four, sequence) for _ in range(2)]
        assert tuple(i for part in parts for i in part.ids) == whole.ids
        assert sequence.rewind(len(sequence) - 6) == 0 or sequence.num_cached == len(sequence)
        rest = session.generate(
            [], SamplingParams(temperature=1, seed=4, max_tokens=6, ignore_eos=True), sequence
        )
        assert rest.ids == whole.ids[6:]


def test_stop_string_across_pieces_is_removed(session: Session, script: Callable[[str], None]) -> None:
    text = "red tea and lamp oil"
    cut = len(session.tokenizer.encode(text))
    assert cut > 5
    script(text)
    result = session.generate("x", SamplingParams(temperature=0, max_tokens=30, stop=["a and l", "zzz"]))
    assert (result.content, result.stop, result.finish_reason) == ("red te", "a and l", "stop")
    script(text)
    pieces = list(session.stream("x", SamplingParams(temperature=0, max_tokens=30, stop="a and l")))
    assert _joined(pieces, "content") == "red te"
    assert tuple(i for p in pieces for i in p.ids) == result.ids
    script(text)
    # a beginning that comes to nothing is given out in the end
    assert session.generate("x", SamplingParams(temperature=0, max_tokens=cut, stop="oil!")).content == text


def test_end_token_is_not_text(session: Session, script: Callable[[str], None]) -> None:
    script("tea<｜end▁of▁sentence｜>lamp")
    result = session.generate("x", SamplingParams(temperature=0, max_tokens=30))
    assert (result.content, result.finish_reason, result.ids[-1]) == ("tea", "stop", 1)
    script("tea<｜end▁of▁sentence｜>lamp")
    result = session.generate("x", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert (result.content.startswith("tea"), result.finish_reason) == (True, "length")
    stop = session.tokenizer.encode("lamp")[0]
    script("tea lamp")
    with_stop = SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[_tokens(session, "tea lamp")[-1]])
    assert session.generate("x", with_stop).finish_reason == "stop"
    assert stop >= 0


def test_chat_splits_reasoning_and_content(session: Session, script: Callable[[str], None]) -> None:
    script("add them</think>7<｜end▁of▁sentence｜>")
    result = session.chat([_user("What is 3 + 4?")], thinking=True)
    assert (result.reasoning, result.content, result.finish_reason) == ("add them", "7", "stop")
    assert result.usage.reasoning_tokens == len(session.tokenizer.encode("add them")) + 1
    script("add them</think>7<｜end▁of▁sentence｜>")
    pieces = list(session.chat([_user("What is 3 + 4?")], thinking=True, stream=True))
    assert (_joined(pieces, "reasoning"), _joined(pieces, "content")) == ("add them", "7")
    script("7<｜end▁of▁sentence｜>")
    assert session.chat([_user("What is 3 + 4?")], thinking=False).reasoning is None


def test_chat_thinks_as_the_folder_says(session: Session, script: Callable[[str], None]) -> None:
    script("hm</think>7")
    assert session.default_thinking
    assert session.chat([_user("3 + 4")]).reasoning == "hm"


def test_chat_calls_a_tool(session: Session, script: Callable[[str], None]) -> None:
    call = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>"
    )
    script("I look." + call)
    result = session.chat([_user("Weather?")], tools=TOOLS, thinking=False)
    assert (result.content, result.finish_reason, result.error) == ("I look.", "tool_calls", None)
    assert [(c.name, json.loads(c.arguments)) for c in result.tool_calls] == [("weather", {"city": "Rome"})]
    script(call)
    pieces = list(session.chat([_user("Weather?")], tools=TOOLS, thinking=False, stream=True))
    assert [p.tool_call.name for p in pieces if p.tool_call] == ["weather"]
    assert pieces[-1].finish_reason == "tool_calls"


def test_response_format_holds_a_random_model_to_it(session: Session) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
    }  # fmt: skip
    result = session.chat(
        [_user("answer")], thinking=False, params=SamplingParams(temperature=1, seed=0, max_tokens=300),
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )  # fmt: skip
    assert result.finish_reason == "stop"
    assert json.loads(result.content).keys() == {"ok"}


def test_chat_over_a_kept_sequence_equals_fresh(session: Session) -> None:
    messages = [{"role": "system", "content": "Be brief."}, _user("What is 3 + 4?")]
    with session.sequence() as sequence:
        for thinking, turn in itertools.product((True, False), range(3)):
            kept = session.chat(messages, thinking=thinking, params=GREEDY, sequence=sequence)
            fresh = session.chat(messages, thinking=thinking, params=GREEDY)
            assert (kept.ids, kept.content, kept.reasoning) == (fresh.ids, fresh.content, fresh.reasoning)
            assert fresh.usage.cached_tokens == 0
            assert kept.usage.prompt_tokens == fresh.usage.prompt_tokens
            if turn or not thinking:
                # the last turn's prompt but for its last token, which says whether it thinks
                assert kept.usage.cached_tokens > 5
                # random text is not always spelled by the tokens it was drawn as
                assert kept.usage.recomputed_tokens == 0 or not thinking
            answer = {"role": "assistant", "content": kept.content, "reasoning_content": kept.reasoning}
            messages = [*messages, answer, _user(f"and {turn}?")]


def test_asking_again_draws_anew_and_going_on_does_not(session: Session) -> None:
    drawn = SamplingParams(temperature=1, max_tokens=5, ignore_eos=True)
    with session.sequence() as sequence:
        first = session.chat([_user("tea?")], params=drawn, sequence=sequence)
        again = session.chat([_user("tea?")], params=drawn, sequence=sequence)
        assert first.seed != again.seed
        assert session.generate([], drawn, sequence).seed == again.seed


def test_chat_of_another_conversation_on_the_same_sequence(session: Session) -> None:
    with session.sequence() as sequence:
        session.chat([_user("What is 3 + 4?")], params=GREEDY, sequence=sequence)
        other = [_user("Sort: tea, jam")]
        assert (
            session.chat(other, params=GREEDY, sequence=sequence).ids
            == session.chat(other, params=GREEDY).ids
        )
        # and asked again: everything but the last token is there
        again = session.chat(other, params=GREEDY, sequence=sequence)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1


def test_chat_many_equals_one_by_one(session: Session) -> None:
    asked: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        ([_user("3 + 4")], {"thinking": True}),
        (
            [
                _user("Repeat tea"),
            ],
            {"thinking": False, "tools": TOOLS},
        ),
    ]
    together = session.chat_many(asked, GREEDY)
    alone = [session.chat(m, params=GREEDY, **options) for m, options in asked]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert [r.reasoning for r in together] == [r.reasoning for r in alone]


def test_logits(session: Session) -> None:
    ids = list(range(10, 90))
    whole = session.logits(ids)
    assert (tuple(whole.shape), whole.dtype) == ((80, session.config.vocab_size), torch.float32)
    picked = session.logits(ids, [-1, 3, 3])
    assert not picked.is_inference()
    torch.testing.assert_close(picked, whole[[79, 3, 3]], atol=1e-4, rtol=0)
    top = session.generate(ids, SamplingParams(temperature=0, max_tokens=1, top_logprobs=3)).logprobs[0]
    expected = torch.log_softmax(whole[-1], -1).sort(descending=True)
    assert [i for i, _ in top.top] == expected.indices[:3].tolist()
    with pytest.raises(MemoryRefused, match=f"{80 * 4 * 1280:,} bytes"):
        session.logits(ids, limit_bytes=1000)
    with pytest.raises(StateError, match="position 80"):
        session.logits(ids, [80])
    with pytest.raises(StateError, match=r"position 1\.5"):
        session.logits(ids, [1.5])  # type: ignore[list-item]
    assert session.logits(ids, []).shape == (0, session.config.vocab_size)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], None, StateError, "empty"),
        ("", None, StateError, "empty"),
        ([3, 1280], None, PromptError, "token 1 of the prompt is 1280"),
        ([-1], None, PromptError, "expected an integer from 0 to 1279"),
        ([3, 4.0], None, PromptError, "token 1 of the prompt is 4.0"),
        ([True], None, PromptError, "is True"),
        ([3] * 5000, None, ContextOverflow, "5,000 tokens with an answer does not fit"),
        ([3] * 4096, None, ContextOverflow, "4,096"),
        ([3] * 10, SamplingParams(max_tokens=4087), ContextOverflow, "`max_tokens` 4,087"),
        ([3], SamplingParams(logit_bias={1280: 1.0}), SamplingError, "`logit_bias` names token 1280"),
        ([3], {"temperature": 0}, SamplingError, "`params` is dict"),
        ([3], SamplingParams(stop_token_ids=[9999]), SamplingError, "`stop_token_ids` names token 9999"),
    ],
)
def test_bad_request_is_refused(
    session: Session, prompt: Any, params: SamplingParams | None, error: type[V4Error], words: str
) -> None:
    with session.sequence() as sequence:
        for held in (None, sequence):
            with pytest.raises(error, match=words.replace("(", r"\(")):
                session.generate(prompt, params, held)
        assert len(sequence) == 0


def test_bad_chat_options_are_refused(session: Session) -> None:
    with pytest.raises(PromptError, match="`tool_choise` is unknown") as caught:
        session.chat([_user("x")], tool_choise="auto")  # type: ignore[call-overload]
    assert caught.value.hint == "did you mean `tool_choice`?"
    with pytest.raises(PromptError):
        session.chat([], params=GREEDY)
    with session.sequence() as sequence, pytest.raises(StateError, match="one prompt at a time"):
        session.generate(["a", "b"], GREEDY, sequence)  # type: ignore[list-item]


def test_default_output_limit_gives_way_to_the_context(chat_folder: Path) -> None:
    with Session.load(chat_folder, backend="cpu", numerics="exact", context_limit=20) as small:
        result = small.generate([3] * 15, SamplingParams(temperature=0, ignore_eos=True))
        assert (len(result.ids), result.finish_reason) == (5, "length")
        with pytest.raises(ContextOverflow, match="context of 20 tokens"):
            small.generate([3] * 20)
    with pytest.raises(ConfigError, match="`context_limit` is 5000"):
        Session.load(chat_folder, backend="cpu", context_limit=5000)
    with pytest.raises(ConfigError, match="`prefill_chunk` is 0"):
        Session.load(chat_folder, backend="cpu", prefill_chunk=0)


def test_folder_without_tokenizer_takes_ids(golden: Path) -> None:
    with Session.load(golden / "tiny-fp32", backend="cpu", numerics="exact") as ids_only:
        assert len(ids_only.generate([5, 6], GREEDY).ids) == 6
        with pytest.raises(CheckpointError, match=r"no `tokenizer\.json`"):
            ids_only.generate("text", GREEDY)
        with pytest.raises(CheckpointError, match=r"no `tokenizer\.json`"):
            ids_only.generate([5], SamplingParams(stop="x"))


def test_folder_without_dialect_refuses_chat_and_names_both_options(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(chat_folder, folder)
    (folder / "v4sdk.json").unlink()
    with Session.load(folder, backend="cpu", numerics="exact") as bare:
        with pytest.raises(PromptError) as caught:
            bare.chat([_user("x")])
        assert "--dialect" in str(caught.value.hint)
        assert "--raw" in str(caught.value.hint)
        assert bare.generate("x", GREEDY).ids
    with Session.load(folder, backend="cpu", numerics="exact", dialect="v4-april") as told:
        assert told.chat([_user("x")], params=GREEDY).ids


def test_options_are_checked_while_loading(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownBackend, match="`cpuu`"):
        Session.load(chat_folder, backend="cpuu")
    with pytest.raises(ConfigError, match="numerics `exakt`"):
        Session.load(chat_folder, numerics="exakt")
    with pytest.raises(ConfigError, match="KV format `native` cannot hold"):
        Session.load(chat_folder, numerics="exact", kv_format="native")
    with pytest.raises(CheckpointError, match="does not exist"):
        Session.load(tmp_path / "nothing")
    with monkeypatch.context() as bare:
        # as where nothing was compiled
        bare.setattr(type(plugins.select("cpu")), "kernels", lambda self: ())
        with pytest.raises(KernelMismatch, match="has no kernel for"):
            Session.load(chat_folder, backend="cpu", strict=True)
    (tmp_path / "v4sdk.json").write_text('{"default_mode": "loud"}')
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(chat_folder / name, tmp_path / name)
    with pytest.raises(ConfigError, match="`default_mode`"):
        Session.load(tmp_path, backend="cpu", numerics="exact")
    (tmp_path / "v4sdk.json").unlink()
    for text, words in (
        ('{"eos_token_id": "x"}', "`eos_token_id` is 'x'"),
        ('{"temperature": 5}', "`temperature` is 5"),
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=f"generation_config.json`: {words}"):
            Session.load(tmp_path, backend="cpu", numerics="exact")


def test_ops_without_a_kernel_are_logged_once(chat_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "v4sdk"), Session.load(chat_folder, backend="cpu") as loaded:
        loaded.generate([5, 6], GREEDY)
        bare = loaded.loaded.binding.without_kernel
    said = [r.message for r in caplog.records if "without a kernel" in r.message]
    assert len(said) == (1 if bare else 0)
    assert all(f"{b.op} (" in said[0] for b in bare)


def test_prompt_beyond_the_trained_length_gives_one_notice(chat_folder: Path) -> None:
    seen: list[Progress] = []
    with Session.load(chat_folder, backend="cpu", numerics="exact", on_progress=seen.append) as session:
        trained = session.loaded.settings.trained_context
        assert trained is not None
        for _ in range(2):
            session.generate([3] * (trained + 1), SamplingParams(temperature=0, max_tokens=1))
    assert [p.kind for p in seen].count("notice") == 1
    assert f"{trained:,}" in next(p.text for p in seen if p.kind == "notice")
    assert [(p.done, p.total) for p in seen if p.kind == "prefill"][:2] == [
        (1024, trained + 1),
        (trained + 1, trained + 1),
    ]
    assert [(p.done, p.total) for p in seen if p.kind == "load"] == [(1, 3), (2, 3), (3, 3)]


def test_cancel_during_prefill_rolls_back_to_the_last_chunk(session: Session) -> None:
    ids = [(i * 31) % 1200 + 20 for i in range(300)]
    with session.sequence() as sequence:
        chunks = []

        def on_progress(report: Progress) -> None:
            chunks.append(report.done)
            if len(chunks) == 2:
                stopper = threading.Thread(target=session.cancel)
                stopper.start()
                stopper.join()

        session.on_progress = on_progress
        with pytest.raises(Cancelled):
            session.generate(ids, GREEDY, sequence)
        session.on_progress = lambda report: None
        assert (sequence.num_cached, sequence.ids) == (128, tuple(ids[:128]))
        assert session.generate(ids[128:], GREEDY, sequence).ids == session.generate(ids, GREEDY).ids


def test_interrupt_during_prefill_leaves_what_was_read(session: Session) -> None:
    ids = [(i * 31) % 1200 + 20 for i in range(200)]
    with session.sequence() as sequence:

        def interrupt(report: Progress) -> None:
            raise KeyboardInterrupt

        session.on_progress = interrupt
        try:
            with pytest.raises(KeyboardInterrupt):
                session.generate(ids, GREEDY, sequence)
        finally:
            session.on_progress = lambda report: None
        assert (sequence.num_cached, sequence.ids) == (64, tuple(ids[:64]))
        assert session.generate(ids[64:], GREEDY, sequence).ids == session.generate(ids, GREEDY).ids


def test_cancel_during_decode_ends_the_answer(session: Session) -> None:
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    with session.sequence() as sequence:
        pieces = []
        for piece in session.stream([5, 6, 7], params, sequence):
            pieces.append(piece)
            if len(pieces) == 2:
                stopper = threading.Thread(target=session.cancel)
                stopper.start()
                stopper.join()
        assert pieces[-1].finish_reason == "cancelled"
        answered = tuple(i for p in pieces for i in p.ids)
        assert sequence.ids == (5, 6, 7, *answered)
        more = session.generate([], GREEDY, sequence)
        whole = session.generate(
            [5, 6, 7], SamplingParams(temperature=0, max_tokens=len(answered) + 6, ignore_eos=True)
        )
        assert answered + more.ids == whole.ids


def test_cancel_while_a_later_prompt_is_read_keeps_what_was_answered(chat_folder: Path) -> None:
    reports = list[Progress]()
    with Session.load(chat_folder, backend="cpu", numerics="exact", max_batch=1) as narrow:

        def on_progress(report: Progress) -> None:
            reports.extend([report] if report.kind == "prefill" else [])
            if len(reports) == 2:
                narrow.cancel()

        narrow.on_progress = on_progress
        long = [(i * 31) % 1200 + 20 for i in range(1500)]
        results = narrow.generate([[5, 6], long, [7]], GREEDY)
        assert [r.finish_reason for r in results] == ["length", "cancelled", "cancelled"]
        assert [len(r.ids) for r in results] == [6, 0, 0]
        narrow.on_progress = lambda report: None
        assert narrow.generate([5, 6], GREEDY).ids == results[0].ids


def test_closing_from_a_callback_is_refused(session: Session) -> None:
    session.on_progress = lambda report: session.close()
    try:
        with pytest.raises(StateError, match="own callback"):
            session.generate([5] * 80, GREEDY)
    finally:
        session.on_progress = lambda report: None
    assert session.generate([5], GREEDY).finish_reason == "length"


def test_cancel_when_nothing_runs_changes_nothing(session: Session) -> None:
    session.cancel()
    assert session.generate([5], GREEDY).finish_reason == "length"


def test_broken_decode_step_leaves_a_sequence_that_goes_on(session: Session) -> None:
    table = session.loaded.binding.table
    calls = itertools.count()

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3 * 3 + 1:
            raise KeyboardInterrupt
        return OPS["sparse_attn"](*args, **kwargs)

    with session.sequence() as sequence:
        table.set("sparse_attn", breaks)
        try:
            with pytest.raises(KeyboardInterrupt):
                session.generate([5, 6, 7], GREEDY, sequence)
        finally:
            table.set("sparse_attn", OPS["sparse_attn"])
        done = sequence.ids[3:]
        assert 0 < len(done) < 6
        more = session.generate(
            [], SamplingParams(temperature=0, max_tokens=6 - len(done), ignore_eos=True), sequence
        )
        assert done + more.ids == session.generate([5, 6, 7], GREEDY).ids


def test_two_streams_take_turns(session: Session) -> None:
    one, two = session.stream([5, 6], GREEDY), session.stream([7], GREEDY)
    first, second = zip(*itertools.zip_longest(one, two), strict=True)
    assert tuple(i for p in first if p for i in p.ids) == session.generate([5, 6], GREEDY).ids
    assert tuple(i for p in second if p for i in p.ids) == session.generate([7], GREEDY).ids


def test_threads_take_turns(session: Session) -> None:
    expected = [session.generate([i + 5, 9], GREEDY).ids for i in range(4)]
    found: dict[int, Result] = {}

    def ask(i: int) -> None:
        found[i] = session.generate([i + 5, 9], GREEDY)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i].ids for i in range(4)] == expected


def test_sequence_in_use_or_foreign_is_refused(session: Session, chat_folder: Path) -> None:
    with session.sequence() as sequence:
        stream = session.stream([5, 6], GREEDY, sequence)
        for action in (
            sequence.fork,
            lambda: sequence.rewind(0),
            lambda: session.generate([1], GREEDY, sequence),
        ):
            with pytest.raises(StateError, match="already generating"):
                action()
        next(stream)
        stream.close()
        assert list(stream) == []
        assert len(sequence) >= 3
        with pytest.raises(StateError, match="rewind to 99"):
            sequence.rewind(99)
        del stream
        # a stream nobody reads, dropped: the sequence is free again
        session.stream([5], GREEDY, sequence)
        gc.collect()
        assert len(sequence.fork()) == len(sequence)
        with (
            Session.load(chat_folder, backend="cpu", numerics="exact") as other,
            pytest.raises(StateError, match="another"),
        ):
            other.generate([1], GREEDY, sequence)
    with pytest.raises(StateError, match="is closed"):
        session.generate([1], GREEDY, sequence)


def test_finished_stream_that_is_dropped_late_frees_nobody_elses_sequence(session: Session) -> None:
    with session.sequence() as sequence:
        first = session.stream([5, 6], GREEDY, sequence)
        while next(first).finish_reason is None:
            pass
        second = session.stream([7], GREEDY, sequence)
        next(second)
        first.close()
        with pytest.raises(StateError, match="already generating"):
            session.generate([8], GREEDY, sequence)
        second.close()


def test_stream_may_be_closed_after_its_session(chat_folder: Path) -> None:
    with Session.load(chat_folder, backend="cpu", numerics="exact") as brief:
        stream = brief.stream([5, 6], GREEDY)
        next(stream)
    stream.close()
    assert list(stream) == []


def test_forgotten_sequences_give_their_memory_back(session: Session) -> None:
    session.generate([5], GREEDY, session.sequence())
    gc.collect()
    size = session.cache_bytes
    for _ in range(5):
        session.generate([5], GREEDY, session.sequence())
        session.stream([6], GREEDY)
        gc.collect()
    assert session.cache_bytes == size


def _maps() -> str:
    return Path("/proc/self/maps").read_text()


def _open_files() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:
            continue
    return {f for f in found if f.startswith("/")}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the proc file system")
def test_close_leaves_no_map_no_thread_and_no_file(chat_folder: Path, tmp_path: Path) -> None:
    # other tests hold the fixture's files
    chat_folder = shutil.copytree(chat_folder, tmp_path / "model")
    with Session.load(chat_folder, backend="cpu", numerics="exact") as first:
        first.generate([5], GREEDY)
    threads, files = threading.active_count(), _open_files()
    session = Session.load(chat_folder, backend="cpu", numerics="exact")
    sequence, stream = session.sequence(), session.stream([5, 6], GREEDY)
    session.generate([5], GREEDY, sequence)
    next(stream)
    assert str(chat_folder) in _maps()
    session.close()
    session.close()
    assert str(chat_folder) not in _maps()
    assert threading.active_count() == threads
    assert _open_files() <= files
    uses: list[Callable[[], object]] = [
        lambda: session.generate([5], GREEDY), session.sequence, lambda: next(stream), sequence.fork,
        lambda: session.config, lambda: session.logits([5]), lambda: session.resume(chat_folder),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(StateError, match="the session is closed"):
            use()
    sequence.close()


def test_a_backend_may_keep_rows_in_other_formats(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = plugins.select("cpu")
    monkeypatch.setattr(type(backend), "kv_formats", ("bf16", "float32"))
    with Session.load(chat_folder, backend=backend) as session:
        assert session.kv_format == "bf16"
    with Session.load(chat_folder, backend=backend, numerics="exact") as session:
        assert session.kv_format == "float32"
    with pytest.raises(ConfigError, match="cannot be kept by backend `cpu` here, expected bf16 or float32"):
        Session.load(chat_folder, backend=backend, kv_format="native")
