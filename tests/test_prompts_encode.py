"""Rendering: the shipped encoder's four cases, the hosted API's goldens, deepseek-recipe, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from v4sdk.errors import PromptError
from v4sdk.prompts import Dialect, completion_start, encode_chat, plain, wording
from v4sdk.prompts.dialect import custom_dialect
from v4sdk.prompts.encode import Normalise
from v4sdk.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "encoding"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, THINK, END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
OWN = custom_dialect(
    {
        "name": "own",
        "tools_template": "Tools, called by <｜DSML｜tool_calls>:\n{schemas}\nEnd.",
        "json_schema_template": "Schema: {schema}",
        "json_object_text": "Answer in JSON.",
        "efforts": {"low": "", "high": "Think long.\n"},
        "default_effort": "low",
    }
)
NORMALS: tuple[Normalise, ...] = ("reference", "hosted")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    },
}


def user(text: object) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


def call(identity: str, arguments: object, name: str = "f") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def rows(name: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def need_recipe() -> None:
    pytest.importorskip("deepseek_recipe")


# the shipped encoder


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_april_case_is_rendered_byte_for_byte(case: int, shared: Path) -> None:
    need_recipe()
    folder = shared / "data" / "encoding" / "v4-april"
    given_case = json.loads((folder / f"test_input_{case}.json").read_text(encoding="utf-8"))
    messages, tools = given_case, None
    if isinstance(given_case, dict):
        messages, tools = given_case["messages"], given_case["tools"]
    with (folder / f"test_output_{case}.txt").open(encoding="utf-8", newline="") as file:
        expected = file.read()
    spans = encode_chat(messages, Dialect.named("v4-april"), thinking=case != 4, tools=tools)
    assert plain(spans) == expected


def text(messages: Sequence[Mapping[str, Any]], dialect: Dialect = OWN, **options: Any) -> str:
    return plain(encode_chat(messages, dialect, **options)).removeprefix(BOS)


def test_chat_mode_closes_reasoning_at_once() -> None:
    assert text([user("q")], thinking=False) == f"{USER}q{ASSISTANT}{END}"
    assert text([user("q")]) == f"{USER}q{ASSISTANT}{THINK}"
    assert text([user("q")], add_generation_prompt=False) == f"{USER}q"


def test_historical_reasoning_is_dropped_unless_tools_are_declared() -> None:
    talk = [user("q"), answer("a", "r"), user("p")]
    assert text(talk) == f"{USER}q{ASSISTANT}{END}a{EOS}{USER}p{ASSISTANT}{THINK}"
    kept = f"{USER}q{ASSISTANT}{THINK}r{END}a{EOS}{USER}p{ASSISTANT}{THINK}"
    assert text(talk, drop_thinking=False) == kept
    assert text(talk, tools=[TOOL]).endswith(kept)


def test_tool_results_take_the_order_of_their_calls() -> None:
    talk = [
        user("q"),
        answer(None, tool_calls=[call("1", "{}"), call("2", "{}")]),
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        user("go on"),
    ]
    expected = (
        f"{USER}<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\ngo on{ASSISTANT}{THINK}"
    )
    for normalise in NORMALS:
        assert text(talk, tools=[TOOL], normalise=normalise).endswith(expected)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"a": "x\\n\\"y\\""}', [("a", "true", 'x\n"y"')]),
        ({"a": "x", "n": [1, {"k": "ü"}]}, [("a", "true", "x"), ("n", "false", '[1, {"k": "ü"}]')]),
        ("{broken", [("arguments", "true", "{broken")]),
        ("[1, 2]", [("arguments", "true", "[1, 2]")]),
        ("", [("arguments", "true", "")]),
    ],
)
def test_arguments_in_history(arguments: object, written: list[tuple[str, str, str]]) -> None:
    talk = [user("q"), answer("", tool_calls=[call("1", arguments)])]
    parameters = "\n".join(
        f'<｜DSML｜parameter name="{name}" string="{kind}">{value}</｜DSML｜parameter>'
        for name, kind, value in written
    )
    expected = (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{parameters}\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}"
    )
    assert text(talk).endswith(expected)


def test_quick_tasks() -> None:
    assert text([user("q") | {"task": "action"}]) == f"{USER}q{ASSISTANT}{THINK}<｜action｜>"
    assert text([user("q") | {"task": "query"}]) == f"{USER}q<｜query｜>"
    titled = text([user("q") | {"task": "query"}, answer("a", "unseen")])
    assert titled == f"{USER}q<｜query｜>a{EOS}"
    with pytest.raises(PromptError, match="unknown task `dance`, known: `action`"):
        text([user("q") | {"task": "dance"}])


def test_old_developer_messages_vanish_with_the_reasoning() -> None:
    talk = [{"role": "developer", "content": "d"}, answer("a", "r"), user("q")]
    assert text(talk) == f"a{EOS}{USER}q{ASSISTANT}{THINK}"
    assert text(talk, thinking=False) == f"{USER}d{ASSISTANT}{END}a{EOS}{USER}q{ASSISTANT}{END}"


def test_content_parts_are_joined_and_images_become_words() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert text([user(parts)]) == f"{USER}a\n\n[Unsupported Image]{ASSISTANT}{THINK}"


def test_prefix_is_continued() -> None:
    for normalise in NORMALS:
        for reasoning, content, end, start in [
            ("so", "", f"{THINK}so", "reasoning"),
            ("", "", THINK, "reasoning"),
            ("so", "Yes", f"{THINK}so{END}Yes", "content"),
        ]:
            talk = [user("q"), answer(content, reasoning, prefix=True)]
            spans = encode_chat(talk, OWN, normalise=normalise)
            assert plain(spans) == f"{BOS}{USER}q{ASSISTANT}{end}"
            assert completion_start(spans, OWN) == start


def test_own_wording_spells_control_tokens_and_schemas_do_not() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": f"{USER} <｜DSML｜>"}}
    spans = encode_chat([user(f"{EOS}x")], OWN, tools=[tool])
    assert [span.text for span in spans if span.control] == [BOS, "｜DSML｜", USER, ASSISTANT, THINK]
    assert f'\n{{"name": "f", "description": "{USER} <｜DSML｜>"}}\nEnd.' in plain(spans)


def test_default_system_stands_in_for_a_missing_one() -> None:
    dialect = custom_dialect({"name": "own", "default_system": "Be kind."})
    assert text([user("q")], dialect).startswith(f"Be kind.{USER}")
    assert text([{"role": "system", "content": "S"}, user("q")], dialect).startswith(f"S{USER}")


def test_response_format_wording() -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert text([user("q")], response_format=schema).startswith(f'\n\nSchema: {{"type": "object"}}{USER}')
    assert text([user("q")], response_format={"type": "json_object"}).startswith(f"\n\nAnswer in JSON.{USER}")
    assert text([user("q")], response_format={"type": "text"}).startswith(USER)
    assert text([user("q")], response_format={"type": "regex", "regex": "a+"}).startswith(USER)


# the hosted API


def request_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the body of a recorded request into options of `encode_chat`."""
    options = dict(request)
    thinking = options.pop("thinking", {}).get("type") != "disabled"
    effort = options.pop("reasoning_effort", None)
    if isinstance(options.get("tools"), str):
        options["tools"] = json.loads((DATA / "tools.json").read_text(encoding="utf-8"))[options["tools"]]
    thinking = thinking and effort != "none"
    return {"thinking": thinking, "effort": None if effort == "none" else effort, **options}


def fill(prompt: str, dialect: str) -> str:
    """Put the wording of the installed package into the holes of a recorded prompt."""
    found = wording.from_recipe(dialect)
    assert found is not None, "deepseek-recipe is missing: pip install '.[test]'"
    assert found.tools is not None
    assert found.json_schema is not None
    assert found.efforts is not None
    holes = {"{TOOLS}": found.tools[0], "{/TOOLS}": found.tools[1], "{JSON}": found.json_object or ""}
    holes |= {"{FORMAT}": found.json_schema[0]}
    holes |= {f"{{EFFORT:{name}}}": words for name, words in found.efforts.items()}
    for hole, words in holes.items():
        prompt = prompt.replace(hole, words)
    return prompt


@pytest.mark.parametrize("row", rows("chat_prompts"), ids=lambda row: f"{row['dialect']}-{row['name']}")
def test_hosted_golden(row: dict[str, Any], official: Tokenizer) -> None:
    expected = row["prompt"]
    if "{" in expected:
        need_recipe()
        expected = fill(expected, row["dialect"])
    dialect = Dialect.named(row["dialect"])
    spans = encode_chat(dialect=dialect, normalise="hosted", **request_options(row["request"]))
    assert plain(spans) == expected
    ranges, at = [], 0
    for span in spans:
        if span.control:
            ranges.append([at, at + len(span.text)])
        at += len(span.text)
    assert ranges == row["control"]
    assert completion_start(spans, dialect) == row["start"]
    if "ids_sha256" in row:
        ids = official.encode_spans(spans)
        assert ids == row.get("ids", ids)
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == row["ids_sha256"]


# what the recorded service refuses and rendering does not, with the reason
NOT_OURS = {
    "missing_messages": "an argument of the function, not a value",
    "n2": "sampling",
    "temp": "sampling",
    "top_p": "sampling",
    "top_p0": "sampling",
    "max_tokens0": "sampling",
    "max_tokens_big": "sampling",
    "stops17": "sampling",
    "top_logprobs21": "sampling",
    "top_logprobs_without_logprobs": "sampling",
    "stream_options_no_stream": "transport",
    "strict_optional": "the subset of JSON schema that the service enforces is the grammar's business",
    "strict_allOf": "the subset of JSON schema that the service enforces is the grammar's business",
    "strict_format": "the subset of JSON schema that the service enforces is the grammar's business",
}


REFUSALS = {row["name"]: row for row in rows("chat_errors")}


@pytest.mark.parametrize("name", sorted(set(REFUSALS) - set(NOT_OURS)))
def test_hosted_refusals(name: str) -> None:
    row = REFUSALS[name]
    # the service accepts a forced call without tools and then forces nothing; here that contradiction is named
    assert row["accepted"] == (row["name"] == "tool_choice_no_tools")
    with pytest.raises(PromptError):
        encode_chat(dialect=Dialect.named("v4-0731"), normalise="hosted", **request_options(row["request"]))


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from([USER, "\n", "{}"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Valid hosted conversations: any order of turns, every call answered."""
    talk: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["system", "user", "assistant", "calls", "latest_reminder"]))
        if kind == "calls":
            names = [f"c{number}-{index}" for index in range(draw(st.integers(1, 3)))]
            arguments = draw(st.dictionaries(words, values, max_size=3))
            calls = [call(name, json.dumps(arguments)) for name in names]
            talk.append(answer(draw(words), draw(words), tool_calls=calls))
            results = draw(st.permutations(names))
            talk += [
                {"role": "tool", "tool_call_id": name, "content": name + draw(words)} for name in results
            ]
        elif kind == "assistant":
            talk.append(answer(draw(words), draw(words)))
        else:
            talk.append({"role": kind, "content": draw(words)})
    return talk


@settings(deadline=None, max_examples=120)
@given(talk=conversations(), thinking=st.booleans(), declares=st.booleans(), later=st.booleans())
def test_hosted_order_agrees_with_deepseek_recipe(
    talk: list[dict[str, Any]], thinking: bool, declares: bool, later: bool
) -> None:
    recipe = pytest.importorskip("deepseek_recipe")
    # of several reminders in a row the package keeps the first one in V4.1; here no text is lost
    assume(not later or not any(a["role"] == b["role"] == "latest_reminder" for a, b in pairwise(talk)))
    # and where nothing but empty system messages was said it leaves the effort out
    assume(not later or any(turn["role"] != "system" or turn["content"] for turn in talk))
    body = {
        "model": "DeepSeek-V4.1-Flash" if later else "DeepSeek-V4-Pro",
        "messages": talk,
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "reasoning_effort": "max",
        **({"tools": [TOOL]} if declares else {}),
    }
    converted = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    encoding = recipe.DeepseekV41Encoding() if later else recipe.DeepseekV4Encoding()
    expected = encoding.render_conversation(converted.conversation)
    dialect = Dialect.named("v4.1" if later else "v4-0731")
    spans = encode_chat(
        talk,
        dialect,
        thinking=thinking,
        effort="max",
        tools=[TOOL] if declares else None,
        normalise="hosted",
    )
    assert plain(spans) == expected.prompt
    assert sum(span.control for span in spans) == len(expected.special_ranges)


def test_strict_schema_order_and_what_is_kept() -> None:
    schema = {"required": ["b"], "properties": {"b": {"minLength": 1, "type": "string"}}, "type": "object"}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    shown = text([user("q")], tools=[tool], normalise="hosted")
    # the service also drops `minLength`; a constraint that the caller states is kept here
    assert (
        '"parameters": {"type": "object", "properties": {"b": {"type": "string", "minLength": 1}}, '
        '"additionalProperties": false, "required": ["b"]}}' in shown
    )


# dialects and wording

APRIL_FILE = """
import os
os.system("touch " + __file__ + ".ran")
dsml_token: str = "｜DSML｜"
thinking_start_token = "<think>"
thinking_end_token = "</think>"
tool_calls_block_name: str = "tool_calls"
response_format_template: str = ("Form:" " {schema}")
TOOLS_TEMPLATE = '''Call by <{dsml_token}tool_calls>, {{braces}}, {thinking_end_token}
{tool_schemas}
Done.'''
REASONING_EFFORT_MAX = ("Think " "hard.\\n")
"""
LATER_FILE = APRIL_FILE.replace(
    'REASONING_EFFORT_MAX = ("Think " "hard.\\n")',
    'REASONING_EFFORT_PROMPTS: dict = {"low": "", "high": "H.", "max": "M."}\nDEFAULT_REASONING_EFFORT = "low"',
)


def write_encoding(folder: Path, source: str, name: str = "encoding_dsv4.py") -> Path:
    (folder / "encoding").mkdir()
    (folder / "encoding" / name).write_text(source, encoding="utf-8")
    return folder


def test_april_encoding_file_is_read_and_never_run(tmp_path: Path) -> None:
    dialect = Dialect.from_folder(write_encoding(tmp_path, APRIL_FILE))
    assert dialect is not None
    assert (dialect.name, dialect.source) == ("v4-april", "encoding/encoding_dsv4.py")
    assert sorted(path.name for path in (tmp_path / "encoding").iterdir()) == ["encoding_dsv4.py"]
    shown = text([user("q")], dialect, tools=[TOOL], effort="max")
    assert shown.startswith("Think hard.\n\n\nCall by <｜DSML｜tool_calls>, {braces}, </think>\n{")
    spans = encode_chat([user("q")], dialect, tools=[TOOL])
    assert [span.text for span in spans if span.control][1:3] == ["｜DSML｜", END]
    form = {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}
    assert text([user("q")], dialect, response_format=form).startswith('\n\nForm: {"a": 1}')
    assert text([user("q")], dialect, effort="high") == text([user("q")], dialect)


def test_later_encoding_file_has_its_own_efforts(tmp_path: Path) -> None:
    dialect = Dialect.from_folder(write_encoding(tmp_path, LATER_FILE))
    assert dialect is not None
    assert dialect.name == "v4-0731"
    assert text([user("q")], dialect) == text([user("q")], dialect, effort="low")
    assert text([user("q")], dialect, effort="high").startswith("H.")
    # the service means `high` when no effort is named
    assert text([user("q")], dialect, normalise="hosted").startswith("H.")
    assert text([user("q")], dialect, normalise="hosted", effort="ultra").startswith("M.")


def test_v41_encoding_file_is_recognised(tmp_path: Path) -> None:
    dialect = Dialect.from_folder(write_encoding(tmp_path, 'SYSTEM = "<｜System｜>"', "encoding.py"))
    assert dialect is not None
    assert (dialect.name, dialect.calls_word) == ("v4.1", " calls")
    with pytest.raises(PromptError, match="hosted order only"):
        encode_chat([user("q")], dialect)


@pytest.mark.parametrize(
    "source", ["", "def broken(:", "x = 1", "REASONING_EFFORT_MAX = open('x')", "\0", "#" * (2 << 20)]
)
def test_unhelpful_encoding_file_tells_no_dialect(tmp_path: Path, source: str) -> None:
    assert Dialect.from_folder(write_encoding(tmp_path, source)) is None


def test_folder_without_any_statement_has_no_dialect(tmp_path: Path) -> None:
    assert Dialect.from_folder(tmp_path) is None


def test_settings_name_a_dialect_and_the_file_adds_its_wording(tmp_path: Path) -> None:
    (tmp_path / "v4sdk.json").write_text('{"dialect": "v4-april"}', encoding="utf-8")
    bare = Dialect.from_folder(tmp_path)
    assert bare is not None
    assert bare.tools is None
    worded = Dialect.from_folder(write_encoding(tmp_path, APRIL_FILE))
    assert worded is not None
    assert worded.tools is not None
    (tmp_path / "v4sdk.json").write_text('{"dialect": "v4-0731"}', encoding="utf-8")
    other = Dialect.from_folder(tmp_path)
    assert other is not None
    assert (other.name, other.tools) == ("v4-0731", None)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("v9", "unknown prompt dialect `v9`"),
        (7, "expected a name or an object"),
        ({}, r"`dialect.name` .* is missing"),
        ({"name": "x", "colour": "red"}, r"unknown keys \['colour'\]"),
        ({"name": "x", "efforts": {"low": 1}}, "must map effort names"),
        ({"name": "x", "calls_word": 1}, "`dialect.calls_word`"),
        ({"name": "x", "default_effort": "max"}, "`dialect.default_effort` `max`"),
        ({"name": "x", "tools_template": "no hole"}, "has 0 holes"),
        ({"name": "x", "json_schema_template": "{schema} {schema}"}, "has 2 holes"),
    ],
)
def test_malformed_own_dialect_is_refused(tmp_path: Path, stated: object, message: str) -> None:
    (tmp_path / "v4sdk.json").write_text(json.dumps({"dialect": stated}), encoding="utf-8")
    with pytest.raises(PromptError, match=message):
        Dialect.from_folder(tmp_path)


def test_unreadable_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "v4sdk.json").write_text("{", encoding="utf-8")
    with pytest.raises(PromptError, match=r"`v4sdk.json` cannot be read"):
        Dialect.from_folder(tmp_path)
    (tmp_path / "v4sdk.json").write_text("[]", encoding="utf-8")
    with pytest.raises(PromptError, match="holds list"):
        Dialect.from_folder(tmp_path)


def test_missing_wording_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "from_recipe", lambda dialect: None)
    dialect = Dialect.named("v4-0731")
    assert text([user("q")], dialect) == f"{USER}q{ASSISTANT}{THINK}"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [TOOL]}, "tool block wording of dialect `v4-0731`"),
        ({"effort": "max"}, "text of reasoning effort `max`"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response format wording",
        ),
        (
            {"response_format": {"type": "json_object"}, "effort": "low", "normalise": "hosted"},
            "`json_object` wording",
        ),
    ]
    for options, what in cases:
        with pytest.raises(PromptError, match=what) as caught:
            text([user("json")], dialect, **options)
        assert caught.value.hint is not None
        assert "encoding/" in caught.value.hint
        assert "deepseek-recipe" in caught.value.hint
    with pytest.raises(PromptError, match="not at hand") as caught:
        text([user("q")], custom_dialect({"name": "bare"}), tools=[TOOL])
    assert caught.value.hint == "add the template to `dialect` in `v4sdk.json`"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("hi", {}, "`messages` is str"),
        ([], {}, "`messages` is empty"),
        (["hi"], {}, r"`messages\[0\]` is str"),
        (
            [{"role": "robot", "content": "x"}],
            {},
            r"`messages\[0\].role` is 'robot', expected one of `system`",
        ),
        ([{"role": "user"}], {}, r"`messages\[0\].content` is missing"),
        ([user(3)], {}, "is int, expected a string or a list"),
        ([user([{"type": "video"}])], {}, "has type 'video', expected `text`"),
        ([{"role": "developer", "content": ""}], {}, "is empty"),
        ([user("q"), answer("a", prefix=True), user("p")], {}, r"`messages\[1\].prefix` is set"),
        ([user("q"), answer("a", 3)], {}, "`messages\\[1\\].reasoning_content` is int"),  # type: ignore[arg-type]
        ([answer("a", tool_calls=[{}])], {}, "has no function name"),
        ([answer("a", tool_calls="x")], {}, "tool_calls` is str"),
        ([answer("a", tool_calls=[call("1", 3)])], {}, "expected JSON text or an object"),
        ([user("q")], {"tools": "f"}, "`tools` is str"),
        ([user("q")], {"tools": ["f"]}, r"`tools\[0\]` is str"),
        ([user("q")], {"tools": [{"type": "retrieval"}]}, r"`tools\[0\].type` is `retrieval`"),
        ([user("q")], {"tools": [{"type": "function"}]}, r"`tools\[0\].function` is missing"),
        ([user("q")], {"tools": [{"function": {"name": "a b"}}]}, "is 'a b', expected letters"),
        (
            [user("q")],
            {"tools": [{"function": {"name": "f", "description": 3}}]},
            "description` is not a string",
        ),
        ([user("q")], {"tools": [{"function": {"name": "f", "parameters": []}}]}, "expected a JSON schema"),
        (
            [user("q")],
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
            "expected `object`",
        ),
        ([user("q")], {"tools": [{"function": {"name": "f", "x": {1, 2}}}]}, "cannot be written as JSON"),
        ([user("q")], {"tools": [TOOL, TOOL]}, r"declares \['f'\] more than once"),
        ([user("q")], {"tool_choice": "maybe"}, "`tool_choice` is 'maybe'"),
        ([user("q")], {"tool_choice": {"type": "function"}}, "without a function name"),
        ([user("q")], {"tools": [TOOL], "tool_choice": "required"}, "thinking mode does not support"),
        ([user("q")], {"tool_choice": "required", "thinking": False}, "no tools are declared"),
        (
            [user("q")],
            {"effort": "huge"},
            "unknown reasoning effort `huge` for dialect `own`, known: `low`, `high`",
        ),
        ([user("q")], {"response_format": "json"}, "`response_format` is str"),
        ([user("q")], {"response_format": {"type": "xml"}}, "`response_format.type` is 'xml'"),
        ([user("q")], {"response_format": {"type": "json_schema"}}, "schema` is missing"),
        ([user("q")], {"response_format": {"type": "regex"}}, "`response_format.regex` is missing"),
        ([user("q")], {"normalise": "other"}, "`normalise` is 'other'"),
    ],
)
def test_invalid_request_is_refused(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        encode_chat(messages, OWN, **options)
    assert not caught.value.message.endswith(".")


def test_forced_call_opens_the_block_and_none_leaves_tools_out() -> None:
    for normalise in NORMALS:
        spans = encode_chat(
            [user("q")], OWN, thinking=False, tools=[TOOL], tool_choice="required", normalise=normalise
        )
        assert plain(spans).endswith(f"{END}\n\n<｜DSML｜tool_calls>\n")
        assert completion_start(spans, OWN) == "calls"
        left_out = text([user("q")], tools=[TOOL], tool_choice="none", normalise=normalise)
        assert left_out == f"{USER}q{ASSISTANT}{THINK}"


@settings(deadline=None, max_examples=100)
@given(talk=conversations(), thinking=st.booleans())
def test_message_text_is_never_control(talk: list[dict[str, Any]], thinking: bool) -> None:
    spans = encode_chat(talk, OWN, thinking=thinking)
    control = [span.text for span in spans if span.control]
    assert control.count(USER) <= sum(turn["role"] in ("user", "tool") for turn in talk)
    assert control.count(BOS) == 1
    for before, after in pairwise(spans):
        assert before.control or after.control, "neighbouring text must be one span"
