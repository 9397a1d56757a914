"""Parsing completions: recorded ones, round trips, any chunking, and answers held to a grammar."""

from __future__ import annotations

import builtins
import json
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4sdk.errors import PromptError
from v4sdk.prompts import (
    Completion,
    CompletionParser,
    Dialect,
    Event,
    Span,
    completion_start,
    encode_chat,
    plain,
)
from v4sdk.prompts.dialect import custom_dialect
from v4sdk.prompts.grammar import AnswerGrammar
from v4sdk.prompts.span import SpanWriter
from v4sdk.prompts.stops import StopFilter
from v4sdk.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "encoding"
V4 = Dialect.named("v4-0731")
TOOLS: list[dict[str, Any]] = json.loads((DATA / "tools.json").read_text(encoding="utf-8"))["set1"]
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="search">\n'
    '<｜DSML｜parameter name="q" string="true">x</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
QUICK = settings(deadline=None, max_examples=80)


def rows(name: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ids_of(tokenizer: Tokenizer, completion: str, dialect: Dialect = V4) -> list[int]:
    """The ids of a completion in which every spelled control token was really drawn."""
    out = SpanWriter(dialect.control_tokens)
    out.trusted(completion)
    return tokenizer.encode_spans(out.spans())


def parse(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    cuts: Sequence[int] = (),
    finish: str = "stop",
    dialect: Dialect = V4,
    **options: Any,
) -> tuple[Completion, list[Event]]:
    """Parse `ids` in pieces that end at `cuts`."""
    parser = CompletionParser(dialect, tokenizer, **({"thinking": True} | options))
    events: list[Event] = []
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(ids)}), len(ids)]
    for a, b in pairwise(edges):
        events += parser.feed(ids[a:b])
    events += parser.finish(finish)
    return parser.result(), events


def check_events(completion: Completion, events: Sequence[Event]) -> None:
    """The pieces add up to the whole."""
    joined = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("content", "reasoning")}
    assert joined["content"] == completion.content
    assert joined["reasoning"] == (completion.reasoning or "")
    assert tuple(e.tool_call for e in events if e.kind == "tool_call") == completion.tool_calls


# what the recorded package does and we do otherwise: our expectation and the cause
BETTER: dict[str, tuple[dict[str, Any], str]] = {
    "truncated_in_value": (
        {"content": "{COMPLETION}", "tool_calls": []},
        "a call that was cut off is no call: its text is kept and the error says so",
    ),
    "prose_mentions_tag": (
        {"content": "Use the <｜DSML｜invoke tag like so."},
        "prose that mentions a tag loses nothing",
    ),
    "nonjson_value": (
        {"content": "{COMPLETION}", "tool_calls": [], "finish_reason": "stop"},
        "arguments that are not JSON are not given out",
    ),
    "dup_param": (
        {"content": "{COMPLETION}", "tool_calls": [], "finish_reason": "stop"},
        "a parameter given twice has no one value",
    ),
    "unknown_tool": (
        {"content": "{COMPLETION}", "tool_calls": [], "finish_reason": "stop"},
        "a tool nobody declared cannot be called",
    ),
    "value_with_tag_text": (
        {"tool_calls": [["search", '{"q": "</｜DSML｜ a < b </tool_result>"}']]},
        "text that looks like markup is part of the value",
    ),
    "json_fenced": (
        {"content": 'Here:\n```json\n{"a":1}\n```\nbye'},
        "a response format is enforced while the answer is written, not cut out of it afterwards",
    ),
    "double_think_close": ({"content": "A</think>B"}, "a control token in the wrong place stays visible"),
    "think_reopened": ({"content": "A<think>B</think>C"}, "a control token in the wrong place stays visible"),
    "chat_emits_think": (
        {"content": "A", "reasoning_content": "R"},
        "reasoning that nobody asked for is still reasoning",
    ),
}
FAILED_CALLS = {"truncated_in_value", "nonjson_value", "dup_param", "unknown_tool"}


@pytest.mark.parametrize("row", rows("completions"), ids=lambda row: str(row["name"]))
def test_recorded_completion(row: dict[str, Any], official: Tokenizer) -> None:
    request = row["request"]
    sets = json.loads((DATA / "tools.json").read_text(encoding="utf-8"))
    tools = None if request.get("tool_choice") == "none" else sets.get(request.get("tools"))
    thinking = request.get("thinking", {}).get("type") != "disabled"
    options = {"thinking": thinking, "tools": tools, "stop": request.get("stop", ())}
    ids = ids_of(official, row["completion"])
    expected = row["expected"] | BETTER.get(row["name"], ({}, ""))[0]
    if expected["content"] == "{COMPLETION}":
        expected["content"] = row["completion"].partition("</think>")[2].lstrip("\n")
    one_by_one = range(len(ids))
    shuffled = random.Random(7)
    for cuts in ([], one_by_one, *(shuffled.sample(one_by_one, k=len(ids) // 3) for _ in range(5))):
        found, events = parse(official, ids, cuts, row["finish"], **options)
        check_events(found, events)
        assert {
            "content": found.content,
            "reasoning_content": found.reasoning,
            "tool_calls": [[call.name, call.arguments] for call in found.tool_calls],
            "finish_reason": found.finish_reason,
        } == expected
        assert (found.error is not None) == (row["name"] in FAILED_CALLS)


# any chunking, and nothing lost

FRAGMENTS = [
    "word ",
    "\n",
    "\n\n",
    "<",
    "</",
    ">",
    "é🙂",
    "<｜DSML｜",
    "</｜DSML｜",
    "<｜DSML｜tool_calls>",
    "<｜DSML｜toolcalls>\n",
    "</｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="search">',
    '<｜DSML｜invoke name="zzz">\n',
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="q" string="true">',
    '<｜DSML｜parameter name="q" string="false">',
    "</｜DSML｜parameter>",
    "<think>",
    "</think>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "STOP",
    "ST",
    CALL,
    CALL.replace(">x<", "><"),
    '{"a": [1]}',
]
fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=10)


@settings(deadline=None, max_examples=250)
@given(
    pieces=fragments,
    drawn=st.lists(st.booleans(), min_size=10, max_size=10),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    thinking=st.booleans(),
    tools=st.booleans(),
    stop=st.sampled_from([(), ("STOP",), ("\n\n", "ST"), ("<",)]),
    finish=st.sampled_from(["stop", "length"]),
)
def test_chunks_never_change_the_result(
    pieces: list[str],
    drawn: list[bool],
    cuts: list[int],
    thinking: bool,
    tools: bool,
    stop: tuple[str, ...],
    finish: str,
    official: Tokenizer,
) -> None:
    ids: list[int] = []
    for piece, real in zip(pieces, drawn, strict=False):
        # the same characters, as control tokens or as text that only looks like them
        ids += ids_of(official, piece) if real else official.encode(piece)
    options: dict[str, Any] = {"thinking": thinking, "tools": TOOLS if tools else None, "stop": stop}
    whole, _ = parse(official, ids, (), finish, **options)
    cut, events = parse(official, ids, cuts, finish, **options)
    single, _ = parse(official, ids, range(len(ids)), finish, **options)
    assert cut == whole == single
    check_events(cut, events)
    declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in whole.tool_calls:
        assert tools
        arguments = json.loads(call.arguments)
        assert set(declared[call.name]["required"]) <= set(arguments)
    if not stop and not whole.tool_calls:
        written = re.sub(r"\n|</?think>|<｜end▁of▁sentence｜>", "", official.decode(ids))
        read = (whole.reasoning or "") + whole.content + whole.trailing
        assert re.sub(r"\n|</?think>|<｜end▁of▁sentence｜>", "", read) == written


names = st.sampled_from(["search", "get_weather"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(FRAGMENTS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
FREE = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("search", "get_weather")
]


@QUICK
@given(
    content=texts,
    reasoning=texts,
    calls=st.lists(
        st.tuples(names, st.dictionaries(st.from_regex(r"\A[^\"<>\n]{1,6}\Z"), values, max_size=3)),
        max_size=3,
    ),
    thinking=st.booleans(),
)
def test_what_was_rendered_is_read_back(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool, official: Tokenizer
) -> None:
    content, reasoning = content.strip("\n"), reasoning.strip("\n")
    history = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    talk: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    told: dict[str, Any] = {"role": "assistant", "content": content}
    told |= {"reasoning_content": reasoning, "tool_calls": history}
    dialect = custom_dialect({"name": "own", "tools_template": "{schemas}"})
    prompt = encode_chat(talk, dialect, thinking=thinking, tools=FREE)
    whole: list[dict[str, Any]] = [*talk, told]
    full = encode_chat(whole, dialect, thinking=thinking, tools=FREE)
    # the end of the prompt and the begin of the completion may be one text span
    ids = official.encode_spans(full)[len(official.encode_spans(prompt)) :]
    parser = CompletionParser.for_prompt(prompt, dialect, official, tools=FREE)
    parser.feed(ids)
    parser.finish()
    found = parser.result()
    assert found.error is None
    assert found.content == content
    assert found.reasoning == (reasoning if thinking else None)
    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == [
        (name, arguments) for name, arguments in calls
    ]
    assert parser.stopped


@pytest.mark.parametrize(
    ("markup", "error"),
    [
        ('<｜DSML｜invoke name="search">\n</｜DSML｜invoke>', "lacks the required parameters ['q']"),
        ('<｜DSML｜invoke name="search" >\n</｜DSML｜invoke>', "the invoke tag is malformed"),
        ('<｜DSML｜invoke name="search">\nq = x\n</｜DSML｜invoke>', "something that is not a parameter"),
        (
            '<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="q">x</｜DSML｜parameter>\n</｜DSML｜invoke>',
            "something that is not a parameter",
        ),
        (
            '<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="q" string="true">x\n</｜DSML｜invoke>',
            "parameter `q` of `search` is not closed",
        ),
        (
            '<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="q" string="false">NaN</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>",
            "is not JSON",
        ),
        (
            '<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="q" string="true">x\n'
            '<｜DSML｜parameter name="n" string="true">y</｜DSML｜parameter>\n</｜DSML｜invoke>',
            "contains call markup",
        ),
        ('<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="q"', "cut off before its closing tag"),
        ("nothing of the kind", "a call block holds no call"),
    ],
)
def test_refused_call_leaves_its_text_and_an_error(markup: str, error: str, official: Tokenizer) -> None:
    block = f"<｜DSML｜tool_calls>\n{markup}\n</｜DSML｜tool_calls>"
    found, events = parse(
        official, ids_of(official, f"R</think>Text\n\n{block}<｜end▁of▁sentence｜>"), tools=TOOLS
    )
    check_events(found, events)
    assert error in (found.error or "")
    assert found.tool_calls == ()
    assert found.finish_reason == "stop"
    assert found.content.replace("\n", "") == f"Text{block}".replace("\n", "")


def test_good_call_beside_a_refused_one_is_kept(official: Tokenizer) -> None:
    bad = '<｜DSML｜invoke name="zzz">\n</｜DSML｜invoke>\n'
    block = CALL.replace("</｜DSML｜tool_calls>", f"{bad}</｜DSML｜tool_calls>")
    found, _ = parse(official, ids_of(official, f"</think>{block}"), tools=TOOLS)
    assert [call.name for call in found.tool_calls] == ["search"]
    assert "`zzz` is not among the declared tools" in (found.error or "")
    assert 'invoke name="zzz"' in found.content
    assert 'invoke name="search"' not in found.content


def test_answer_goes_on_after_a_refused_block(official: Tokenizer) -> None:
    bad = CALL.replace("search", "zzz")
    found, _ = parse(official, ids_of(official, f"</think>{bad}\n\n{CALL}"), tools=TOOLS)
    assert [call.name for call in found.tool_calls] == ["search"]
    assert found.content == bad


def test_finished_block_stops_the_answer(official: Tokenizer) -> None:
    parser = CompletionParser(V4, official, thinking=True, tools=TOOLS)
    parser.feed(ids_of(official, f"R</think>{CALL}"))
    assert parser.stopped
    parser.feed(ids_of(official, " tail<｜end▁of▁sentence｜>"))
    parser.finish()
    assert parser.result().trailing == " tail"
    assert parser.result().finish_reason == "tool_calls"


def test_call_is_given_out_when_its_invoke_closes(official: Tokenizer) -> None:
    parser = CompletionParser(V4, official, thinking=False, tools=TOOLS)
    head, tail = CALL[: CALL.index("</｜DSML｜invoke>")], CALL[CALL.index("</｜DSML｜invoke>") :]
    assert parser.feed(ids_of(official, head)) == []
    events = parser.feed(ids_of(official, tail))
    assert [event.kind for event in events] == ["tool_call"]
    assert events[0].tool_call is not None
    assert events[0].tool_call.id == "call_0"


def test_look_alike_markup_is_text(official: Tokenizer) -> None:
    found, _ = parse(official, official.encode(f"R</think>A {CALL}"), tools=TOOLS)
    assert found.reasoning == f"R</think>A {CALL}"
    assert found.tool_calls == ()
    found, _ = parse(official, official.encode(CALL), tools=TOOLS, thinking=False)
    assert (found.content, found.error) == (CALL, None)


def test_end_inside_reasoning_is_an_empty_answer(official: Tokenizer) -> None:
    parser = CompletionParser(V4, official, thinking=True)
    parser.feed(ids_of(official, "R<｜end▁of▁sentence｜>"))
    assert parser.stopped
    parser.finish()
    assert parser.result() == Completion("", "R", (), "stop")


def test_mention_of_a_tag_does_not_end_reasoning(official: Tokenizer) -> None:
    found, _ = parse(official, ids_of(official, "I use <｜DSML｜tags</think>A"), tools=TOOLS)
    assert (found.reasoning, found.content) == ("I use <｜DSML｜tags", "A")


def test_line_breaks_count_where_the_prompt_already_began(official: Tokenizer) -> None:
    talk: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
    talk.append({"role": "assistant", "content": "Yes", "prefix": True})
    own = custom_dialect({"name": "own"})
    parser = CompletionParser.for_prompt(encode_chat(talk, own), own, official)
    parser.feed(official.encode("\n\nmore"))
    parser.finish()
    assert parser.result() == Completion("\n\nmore", "", (), "stop")
    found, _ = parse(official, official.encode("\n\nmore"), thinking=False)
    assert found.content == "more"


def test_forced_call(official: Tokenizer) -> None:
    own = custom_dialect({"name": "own", "tools_template": "{schemas}"})
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
    prompt = encode_chat([{"role": "user", "content": "q"}], own, thinking=False, **options)
    inner = CALL.partition("\n")[2]
    for completion, calls, error in [
        (inner, 1, None),
        (CALL, 1, None),
        ("I would rather not", 0, "no call where one was required"),
        ("", 0, "no call where one was required"),
    ]:
        parser = CompletionParser.for_prompt(prompt, own, official, **options)
        parser.feed(ids_of(official, completion))
        parser.finish()
        found = parser.result()
        assert len(found.tool_calls) == calls
        assert (error or "") in (found.error or "")
        assert (found.error is None) == (error is None)
        assert found.content == ("" if calls else completion)


def test_start_inside_a_block_needs_tools(official: Tokenizer) -> None:
    with pytest.raises(PromptError, match="needs `tools`"):
        CompletionParser(V4, official, thinking=False, start="calls")


@pytest.mark.parametrize(("stop", "message"), [("abc", "'abc'"), (["a", ""], r"\['a', ''\]")])
def test_bad_stop_strings_are_refused(stop: Any, message: str, official: Tokenizer) -> None:
    with pytest.raises(PromptError, match=message):
        CompletionParser(V4, official, thinking=False, stop=stop)


@QUICK
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_stop_string_that_is_complete_first_wins(text: str, stops: list[str], cuts: list[int]) -> None:
    stopping = StopFilter(stops)
    edges = [0, *sorted(cuts), len(text)]
    out = "".join(stopping.feed(text[a:b]) for a, b in pairwise(edges))
    out += stopping.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert out == (text[: min(ends)[1]] if ends else text)
    assert (stopping.found is not None) == bool(ends)


@settings(deadline=None, max_examples=60)
@given(
    reasoning=st.text("ab \n", max_size=6),
    content=st.text("ab \n", max_size=8),
    calls=st.lists(
        st.tuples(names, st.dictionaries(st.sampled_from(["a", "b", "c"]), values, max_size=3)), max_size=2
    ),
)
def test_well_formed_completions_agree_with_deepseek_recipe(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], official: Tokenizer
) -> None:
    recipe = pytest.importorskip("deepseek_recipe")
    history = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    told = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": history}
    question = {"role": "user", "content": "q"}
    prompt = plain(encode_chat([question], V4, effort="low"))
    completion = plain(encode_chat([question, told], V4, effort="low")[:-1]).removeprefix(prompt)
    for looks in ("DSML", "think>", "｜"):
        # the package reads text and cannot tell look-alikes from control tokens
        if looks in json.dumps(calls, ensure_ascii=False):
            return
    body = {"model": "DeepSeek-V4-Pro", "messages": [{"role": "user", "content": "q"}], "tools": FREE}
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "m")
    stream = recipe.StreamProcessor(generator, request.parsing_options)
    response = recipe.ChatCompletionResponse("id", "m", 0, 0, 0)
    chunks = stream.push(recipe.InferenceChunk.ready())
    chunks += stream.push(recipe.InferenceChunk.text(completion, 1))
    chunks += stream.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    for chunk in chunks:
        response.accumulate(chunk)
    choice = json.loads(response.to_json())["choices"][0]
    found, _ = parse(official, ids_of(official, completion), tools=FREE)
    message = choice["message"]
    assert found.content == (message["content"] or "")
    assert found.reasoning == message["reasoning_content"]
    assert [(call.name, call.arguments) for call in found.tool_calls] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
    ]
    assert found.finish_reason == choice["finish_reason"]


# grammar


def walk(grammar: AnswerGrammar, ids: Sequence[int]) -> int:
    """Return how many of `ids` the grammar allows in a row."""
    for number, index in enumerate(ids):
        if not grammar.allowed()[index]:
            return number
        grammar.accept(index)
    return len(ids)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


def test_json_schema_is_enforced_on_the_answer(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    eos = official.eos_id
    good = [*official.encode('{"name": "é🙂", "n": 3}'), eos]
    assert walk(AnswerGrammar(V4, official, response_format=form), good) == len(good)
    for bad in ('{"name": 3', '{"n": "x"', "Sure: {", '{"name": "x", "n": 1, "y"'):
        assert walk(AnswerGrammar(V4, official, response_format=form), ids_of(official, bad)) < len(
            ids_of(official, bad)
        )
    early = AnswerGrammar(V4, official, response_format=form)
    assert not early.allowed()[eos]
    with pytest.raises(PromptError, match="outside the grammar"):
        early.accept(eos)


def test_reasoning_is_free_but_owes_an_answer(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    grammar = AnswerGrammar(
        V4,
        official,
        response_format={"type": "json_object"},
        start="reasoning",
        vocab_size=official.vocab_size + 32,
    )
    assert grammar.allowed().shape == (official.vocab_size + 32,)
    assert not grammar.allowed()[official.eos_id]
    assert not grammar.allowed()[official.vocab_size :].any()
    thought = [*ids_of(official, "Let me think.</think>"), *official.encode('{"a": [1]}')]
    assert walk(grammar, thought) == len(thought)
    assert grammar.finished
    assert list(np.flatnonzero(grammar.allowed())) == [official.eos_id]
    grammar.accept(official.eos_id)


def test_regex_is_enforced(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "regex", "regex": "a/b+"}
    for answer, length in [("a/bb", None), ("ab", 1)]:
        ids = official.encode(answer)
        assert walk(AnswerGrammar(V4, official, response_format=form), ids) <= len(ids)
        if length is None:
            assert (
                walk(AnswerGrammar(V4, official, response_format=form), [*ids, official.eos_id])
                == len(ids) + 1
            )


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"$ref": "#/$defs/days"},
                "tag": {"type": ["string", "null"]},
            },
            "required": ["city", "days"],
            "$defs": {"days": {"type": "integer", "minimum": 1}},
        },
    },
}
ANYTHING = {"type": "function", "function": {"name": "anything", "parameters": {"type": "object"}}}
NOTHING = {"type": "function", "function": {"name": "nothing"}}
DECLARED: list[Mapping[str, Any]] = [WEATHER, ANYTHING, NOTHING]


def block(name: str, *parameters: tuple[str, str, str]) -> str:
    lines = [
        f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n' for k, s, v in parameters
    ]
    return f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n</｜DSML｜tool_calls>'


CITY, DAYS = ("city", "true", "a </b> < c\n"), ("days", "false", "12")


@pytest.mark.parametrize(
    ("completion", "allowed"),
    [
        ("Just <b>text</b>\n\n", True),
        ("\n\n" + block("weather", CITY, DAYS), True),
        ("Text.\n\n" + block("weather", CITY, ("unit", "true", "f"), DAYS, ("tag", "true", "x")), True),
        ("\n\n" + block("weather", CITY, DAYS, ("tag", "false", "null")), True),
        ("\n\n" + block("anything", ("k", "true", "v"), ("l", "false", "[1]")), True),
        ("\n\n" + block("nothing"), True),
        ("\n\n" + block("weather", DAYS), False),
        ("\n\n" + block("weather", CITY), False),
        ("\n\n" + block("weather", CITY, ("days", "false", "0")), False),
        ("\n\n" + block("weather", CITY, ("days", "true", "12")), False),
        ("\n\n" + block("weather", CITY, ("unit", "true", "k"), DAYS), False),
        ("\n\n" + block("zzz"), False),
        ("\n\n<｜DSML｜toolcalls>", False),
        ("\n\n" + block("nothing") + " tail", False),
    ],
)
def test_call_grammar(completion: str, allowed: bool, official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    ids = [*ids_of(official, completion), official.eos_id]
    assert (walk(AnswerGrammar(V4, official, tools=DECLARED), ids) == len(ids)) is allowed
    if allowed:
        found, _ = parse(official, ids, tools=DECLARED, thinking=False)
        assert found.error is None
        assert len(found.tool_calls) == completion.count("｜DSML｜invoke name")


def test_forced_call_grammar(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    inner = block("nothing").partition("\n")[2]
    options: dict[str, Any] = {"tools": DECLARED, "tool_choice": "required", "start": "calls"}
    assert walk(AnswerGrammar(V4, official, **options), ids_of(official, inner)) == len(
        ids_of(official, inner)
    )
    assert walk(AnswerGrammar(V4, official, **options), official.encode("No")) == 0


def test_calls_are_allowed_beside_a_form(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    for completion in ('{"a": 1}', "\n\n" + block("nothing")):
        grammar = AnswerGrammar(V4, official, tools=DECLARED, response_format={"type": "json_object"})
        ids = [*ids_of(official, completion), official.eos_id]
        assert walk(grammar, ids) == len(ids)


def test_impossible_schema_is_refused(official: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}
    with pytest.raises(PromptError, match="`response_format` cannot be enforced"):
        AnswerGrammar(V4, official, response_format=form)
    broken = {"type": "object", "properties": {"a": {"type": "objct"}}}
    loose = {"type": "function", "function": {"name": "f", "parameters": broken}}
    AnswerGrammar(V4, official, tools=[loose])
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": broken}}
    with pytest.raises(PromptError, match="strict tool `f` cannot be enforced"):
        AnswerGrammar(V4, official, tools=[strict])


def test_missing_extra_is_named(official: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(PromptError, match="the extra `grammar`") as caught:
        AnswerGrammar(V4, official, response_format={"type": "json_object"})
    assert caught.value.hint == "pip install 'v4sdk[grammar]'"


def test_start_of_a_bare_prompt_is_content() -> None:
    assert completion_start([Span("text")], V4) == "content"
