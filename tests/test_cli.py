"""The command line as a user meets it: what goes to which stream, which exit status, and every mistake in one line."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from v4sdk import plugins
from v4sdk.backend import DoctorRow
from v4sdk.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def v4sdk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run(*args: str | Path, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["v4sdk", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def tiny(v4sdk: Run, chat_folder: Path) -> Run:
    """`v4sdk run` on a tiny random model."""

    def run(*args: str | Path, stdin: bytes = b"", tokens: int = 8) -> Done:
        return v4sdk("run", "--model", chat_folder, "-n", str(tokens), *args, stdin=stdin)

    return run


def start(*args: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "v4sdk", *map(str, args)], env=env, **options)


def assert_one_error(done: Done, said: str, hinted: str | None = None) -> None:
    assert done.status == 1, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.err
    assert done.out == ""
    # every error names a way out
    assert re.search(rf"^hint: .*{re.escape(hinted or '')}", done.err, re.MULTILINE), done.err


def test_help_names_the_commands(v4sdk: Run) -> None:
    done = v4sdk("--help")
    assert done.status == 0
    for name in ("run", "backends", "info", "doctor", "conformance"):
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)


def test_version(v4sdk: Run) -> None:
    import v4sdk as package

    assert v4sdk("--version").out == f"v4sdk {package.__version__}\n"


def test_content_goes_to_stdout_and_the_rest_to_stderr(tiny: Run) -> None:
    done = tiny("one two", "--no-thinking", "--seed", "1")
    assert done.status == 0
    assert done.out.endswith("\n")
    assert "tokens in" in done.err
    assert "fast numerics, native KV, cpu" in done.err
    assert "tokens in" not in done.out


def test_reasoning_goes_to_stderr(tiny: Run) -> None:
    events = tiny("one two", "--thinking", "--json").lines
    reasoning = "".join(e["text"] for e in events if e["event"] == "reasoning")
    assert reasoning
    done = tiny("one two", "--thinking")
    assert reasoning in done.err
    assert reasoning not in done.out


def test_argument_file_and_standard_input_are_the_same_prompt(tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("äpfel", encoding="utf-8")
    said = tiny("äpfel", "--raw").out
    assert said == tiny("--file", tmp_path / "prompt.txt", "--raw").out
    assert said == tiny("--raw", stdin="äpfel".encode()).out
    assert said == tiny("-", "--raw", stdin="äpfel".encode()).out
    assert said == tiny("-f", "-", "--raw", stdin="äpfel".encode()).out


def test_events_are_json_lines_that_join_to_the_answer(tiny: Run) -> None:
    events = tiny("abc", "--raw", "--json").lines
    assert events[0]["event"] == "start"
    assert {"model", "backend", "numerics", "kv_format"} <= set(events[0])
    assert events[-1]["event"] == "finish"
    assert events[-1]["finish_reason"] in ("length", "stop")
    assert sum(len(e.get("ids", ())) for e in events) == events[-1]["usage"]["completion_tokens"] <= 8
    text = "".join(e["text"] for e in events if e["event"] == "content")
    assert text.rstrip("\n") == tiny("abc", "--raw").out.rstrip("\n")


def test_the_system_message_is_part_of_the_prompt(tiny: Run) -> None:
    with_system, without = (
        tiny("abc", "--json", *extra).lines[-1]["usage"]["prompt_tokens"]
        for extra in (("--system", "Be brief."), ())
    )
    assert with_system > without


def test_a_seed_fixes_the_answer(tiny: Run) -> None:
    hot = ("abc", "--raw", "--temperature", "1.5")
    assert tiny(*hot, "--seed", "3").out == tiny(*hot, "--seed", "3").out
    assert len({tiny(*hot, "--seed", str(seed)).out for seed in range(4)}) > 1


def test_requests_are_answered_in_order_each_from_a_fresh_state(tiny: Run, tmp_path: Path) -> None:
    requests = [
        {"id": "a", "prompt": "abc"},
        {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3},
        {"prompt": "abc", "raw": True},
        {"prompt": "abc"},
        {"messages": [{"role": "nobody", "content": "x"}]},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, requests)) + "\n\n")
    done = tiny("--prompts", path)
    assert done.status == 1
    rows = done.lines
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["id"] == "a"
    assert rows[0]["content"] == rows[3]["content"]
    assert rows[0]["reasoning"] == rows[3]["reasoning"]
    assert rows[1]["usage"]["completion_tokens"] == 3
    assert {"content", "reasoning", "tool_calls", "finish_reason", "usage"} <= set(rows[2])
    assert "messages[0].role" in rows[4]["error"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list, expected an object"),
        ('{"prompt": "a", "promt": "b"}', "line 2 has unknown field `promt`"),
        ('{"system": "a"}', "line 2 has to hold either `prompt` or `messages`"),
        ('{"prompt": 3}', "line 2 has `prompt` of type int"),
        ('{"messages": [], "raw": true}', "line 2 is raw and has messages"),
    ],
)
def test_a_bad_request_line_is_named_before_anything_runs(
    tiny: Run, tmp_path: Path, line: str, said: str
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    assert_one_error(tiny("--prompts", path), said)


def test_an_empty_file_of_requests_is_refused(tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    assert_one_error(
        tiny("--prompts", tmp_path / "none.jsonl"), "holds no request", "one JSON object per line"
    )


def test_a_saved_answer_goes_on_as_if_never_interrupted(tiny: Run, tmp_path: Path) -> None:
    whole = tiny("abc", "--raw", "--json", tokens=12).lines
    first = tiny("abc", "--raw", "--json", "--save", tmp_path / "state", tokens=5).lines
    rest = tiny("--resume", tmp_path / "state", "--json", tokens=7).lines

    def ids(events: list[dict[str, Any]]) -> list[int]:
        return [i for event in events for i in event.get("ids", ())]

    assert ids(first) + ids(rest) == ids(whole)


def test_a_chat_prompt_reuses_what_a_saved_state_has_in_common(tiny: Run, tmp_path: Path) -> None:
    tiny("the quick brown fox", "--save", tmp_path / "state")
    # a state goes back to its snapshots, one of which stands at the end of the prompt
    done = tiny("the quick brown fox", "--resume", tmp_path / "state", "--json")
    fresh = tiny("the quick brown fox", "--json")
    assert done.lines[-1]["usage"]["cached_tokens"] > 0
    assert [e.get("text") for e in done.lines] == [e.get("text") for e in fresh.lines]


@pytest.mark.parametrize(
    ("args", "said", "hinted"),
    [
        (["--temperature", "-1"], "`temperature` is -1.0", None),
        (["--temperature", "nan"], "`temperature` is nan", None),
        (["--top-p", "0"], "`top_p` is 0.0", None),
        (["--top-k", "-3"], "`top_k` is -3", None),
        (["--min-p", "inf"], "`min_p` is inf", None),
        (["-n", "0"], "`max_tokens` is 0", None),
        (["--numerics", "fats"], "numerics `fats` is unknown", None),
        (["--kv-format", "int3"], "KV format `int3` is unknown", None),
        (["--numerics", "exact", "--kv-format", "native"], "KV format `native` cannot hold", "--kv-format float32"),
        (["--backend", "cpuu"], "backend `cpuu` is unknown", "did you mean `cpu`?"),
        (["--backend", "bench"], "plugin `bench` offers no backend", "choose one of"),
        (["--model", "./nowhere"], "folder `./nowhere` does not exist", "owner/name"),
        (["--dialect", "v9"], "`v9`", None),
        (["--resume", "/nowhere/state"], "/nowhere/state", None),
        (["--effort", "frantic"], "frantic", None),
    ],
)  # fmt: skip
def test_a_bad_option_is_one_error(tiny: Run, args: list[str], said: str, hinted: str | None) -> None:
    assert_one_error(tiny("abc", *args), said, hinted)


def test_strict_refuses_what_has_no_kernel(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # as where nothing was compiled
    monkeypatch.setattr(type(plugins.select("cpu")), "kernels", lambda self: ())
    assert_one_error(tiny("abc", "--strict"), "has no kernel for", "leave out --strict")


@pytest.mark.parametrize(
    "args",
    [
        ["--no-such-option"],
        ["abc", "--file", "x"],
        ["--file", "x", "--prompts", "y"],
        ["abc", "--top-k", "many"],
        ["abc", "--raw", "--system", "x"],
        ["--prompts", "x", "--save", "y"],
    ],
)
def test_a_usage_error_exits_2(tiny: Run, args: list[str]) -> None:
    done = tiny(*args)
    assert done.status == 2
    assert "Usage:" in done.err
    assert done.out == ""


def test_an_unknown_command_exits_2(v4sdk: Run) -> None:
    assert v4sdk("runn").status == 2


def test_a_state_that_cannot_be_written_is_refused_before_the_answer(tiny: Run, tmp_path: Path) -> None:
    missing = tiny("abc", "--save", tmp_path / "none" / "state")
    assert_one_error(missing, "none` does not exist", "a folder that exists")
    assert_one_error(tiny("abc", "--save", tmp_path), "it is a folder", "a folder that exists")
    assert "memory:" not in missing.err


def test_a_prompt_beyond_the_trained_length_is_noticed_once(chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("abc " * 1100)
    # another process: here, pytest's own log handlers would hide what logging prints by itself
    command = start(
        "run", "--model", chat_folder, "-n", "1", "-f", tmp_path / "long", stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )  # fmt: skip
    _, err = command.communicate(timeout=120)
    assert err.count(b"this model was trained for") == 1


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(tiny: Run) -> None:
    assert_one_error(tiny("a b c " * 3000, "--raw"), "does not fit into the context of 4,096 tokens")


def test_an_empty_prompt_is_refused(tiny: Run) -> None:
    assert_one_error(tiny("", "--raw"), "the prompt is empty")


def test_an_empty_prompt_file_is_refused(tiny: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert_one_error(tiny("-f", str(empty)), "is empty, expected text")


def test_an_empty_standard_input_is_refused(tiny: Run) -> None:
    assert_one_error(tiny(), "standard input is empty", 'v4sdk run "..."')


def test_without_a_model_one_line_says_which_one_answers(
    v4sdk: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v4sdk.loading.bundled_folder", lambda: chat_folder)
    done = v4sdk("run", "abc", "-n", "2")
    said = [line for line in done.err.splitlines() if "demonstration model" in line]
    assert len(said) == 1
    assert "add or subtract" in said[0]
    assert "--model" in said[0]
    assert "demonstration" not in v4sdk("run", "abc", "-n", "2", "--model", chat_folder).err


def test_invalid_utf8_is_refused_with_its_offset_or_replaced(tiny: Run, tmp_path: Path) -> None:
    assert_one_error(
        tiny("--raw", stdin=b"abc\xff\xfe"),
        "standard input is not valid UTF-8: byte 0xff at offset 3",
        "--replace-invalid",
    )
    (tmp_path / "bad.txt").write_bytes(b"\xc3(")
    assert_one_error(tiny("-f", tmp_path / "bad.txt"), "byte 0xc3 at offset 0")
    argument = os.fsdecode(b"ab\xe9")
    assert_one_error(tiny(argument), "the prompt argument is not valid UTF-8: byte 0xe9 at offset 2")
    assert tiny("--raw", "--replace-invalid", stdin=b"abc\xff").status == 0


def test_a_missing_file_is_one_error(tiny: Run) -> None:
    assert_one_error(tiny("--file", "/nowhere/prompt.txt"), "`/nowhere/prompt.txt` cannot be read")


def test_backends_lists_states_and_reasons(v4sdk: Run) -> None:
    done = v4sdk("backends", "--json", "--ops")
    found = json.loads(done.out)
    assert {row["name"]: row["state"] for row in found["backends"]}["cpu"] == "available"
    assert all(row["reason"] for row in found["backends"] if row["state"] != "available")
    assert set(found["ops"]["cpu"].values()) <= {"kernel", "parts", "reference"}
    table = v4sdk("backends").out
    assert "cpu" in table
    assert "available" in table


def test_doctor_says_what_is_missing(v4sdk: Run) -> None:
    assert v4sdk("doctor").status == 0
    assert v4sdk("doctor", "--backend", "cpu").status == 0
    assert_one_error(v4sdk("doctor", "--backend", "cpuu"), "backend `cpuu` is unknown", "did you mean")


def test_a_device_test_is_of_a_backend_that_has_one(v4sdk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert v4sdk("doctor", "--device-test").status == 2
    assert_one_error(
        v4sdk("doctor", "--backend", "cpu", "--device-test"), "has no device test", "conformance"
    )
    rows = [DoctorRow("rms_norm", "right", ok=True), DoctorRow("linear", "3 of 9 differ", ok=False)]
    monkeypatch.setattr(type(plugins.select("cpu")), "device_test", lambda self: rows)
    done = v4sdk("doctor", "--backend", "cpu", "--device-test")
    assert done.status == 1
    assert "3 of 9 differ" in done.out
    assert "failed" in done.out
    rows.pop()
    assert v4sdk("doctor", "--backend", "cpu", "--device-test").status == 0


def test_conformance_writes_a_receipt(v4sdk: Run, tmp_path: Path, chat_folder: Path) -> None:
    receipt = tmp_path / "receipt.json"
    done = v4sdk(
        "conformance", "--backend", "cpu", "--op", "rms_norm", "--json", receipt, "--model", chat_folder
    )
    assert done.status == 0
    assert json.loads(receipt.read_text())["ok"]
    assert_one_error(v4sdk("conformance", "--op", "norm"), "op `norm` is unknown")


def test_conformance_names_the_closest_op(v4sdk: Run) -> None:
    assert_one_error(v4sdk("conformance", "--op", "rms_nrm"), "op `rms_nrm`", "did you mean `rms_norm`?")


def test_info_describes_a_folder_and_refuses_what_is_none(v4sdk: Run, chat_folder: Path) -> None:
    assert "parameters" in v4sdk("info", chat_folder).out
    assert json.loads(v4sdk("info", chat_folder, "--json").out)["layers"] == 3
    assert_one_error(v4sdk("info", "./nowhere"), "nowhere")


def test_a_reader_that_leaves_ends_the_program_quietly(chat_folder: Path) -> None:
    command = start(
        "run", "abc", "--raw", "--model", chat_folder, "-n", "400", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.read(1)
    command.stdout.close()
    err = command.stderr.read().decode()
    command.stderr.close()
    assert command.wait(60) == 1
    assert "Traceback" not in err
    assert "Error" not in err


def test_an_interrupt_ends_the_answer_and_still_saves(chat_folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = start(
        "run", "abc", "--raw", "--model", chat_folder, "-n", "4000", "--save", state,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert command.stdout is not None
    command.stdout.read(3)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert b"Traceback" not in err
    assert b"tokens in" in err
    assert out.endswith(b"\n")
    assert state.exists()


def test_a_conversation_on_a_terminal(chat_folder: Path) -> None:
    leader, follower = pty.openpty()
    command = start(
        "run", "--model", chat_folder, "-n", "4", stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = _talk(leader, [b"hello\n", b"more\n", b"/rest\n", b"/save\n", b"/reset\n", b"/exit\n"])
    assert command.wait(60) == 0
    os.close(leader)
    assert shown.count("fast numerics") == 2
    assert "cached" in shown
    assert "command `/rest` is unknown" in shown
    assert "`/save` names no file" in shown
    assert "Traceback" not in shown


def _talk(leader: int, lines: list[bytes]) -> str:
    """Send each line when the prompt stands there, and give back everything shown."""
    shown, answered, until = b"", 0, time.monotonic() + 120
    while time.monotonic() < until:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                shown += os.read(leader, 4096)
            except OSError:
                break
        if lines and len(re.findall(rb"(?:^|[\r\n])> ", shown)) > answered:
            answered += 1
            os.write(leader, lines.pop(0))
    return shown.decode(errors="replace")
