"""The budget's command line: what means nothing is refused in one line, before anything is compiled."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it is a test dependency on Linux")

budget = importlib.import_module("v4sdk_cuda.budget")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line that is said of these words."""

    def compiled(*args: Any) -> Any:
        raise AssertionError("compiled before the words were understood")

    monkeypatch.setattr(budget, "compile_all", compiled)
    monkeypatch.setattr(sys, "argv", ["budget", *words])
    # the command takes it out of the environment, which other tests of this process share
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as caught:
        budget.main()
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--arch", "foo"), "argument --arch: `foo`: expected some of 80, 89, 90, 100, 103, 120"),
        (("--arch", "80,,90"), "argument --arch: ``: expected some of 80"),
        (("--arch", "75"), "argument --arch: `75`: expected some of 80"),
        (("--op", "nothing"), "argument --op: `nothing`: expected some of linear"),
        (("--jobs", "0"), "argument --jobs: `0`: expected a whole number from 1 on"),
        (("--jobs", "-1"), "argument --jobs: `-1`: expected a whole number from 1 on"),
        (("--jobs", "two"), "argument --jobs: `two`: expected a whole number from 1 on"),
        (("--check", "/missing"), "/missing cannot be read: No such file or directory, expected a budget; hint: python -m"),
        (("--check", "/"), "/ cannot be read: Is a directory, expected a budget; hint: python -m"),
        (("--write", "/missing/file"), "`/missing/file` is in `/missing`, which does not exist"),
        (("--json", "/"), "`/` is a folder, expected a file to write"),
    ],
)  # fmt: skip
def test_words_that_mean_nothing_are_named_with_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert said in refused(monkeypatch, capsys, *words)


@pytest.mark.parametrize("option", ["--check", "--write"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("[]", "is not a budget, expected `triton`"),
        ("{}", "is not a budget"),
        ('{"ops": {}}', "is not a budget"),
        ('{"triton": "3.9.0", "ops": {"linear": {"k": {"BM=16": {"ninety": [1, 2]}}}}}', "is not a budget"),
        ('{"triton": "3.9.0", "ops": {"linear": {"k": {"BM=16": {"90": [1, "2"]}}}}}', "is not a budget"),
        ('{"triton": "3.9.0", "ops": {"linear": {"k": {"BM=16": {"90": 1}}}}}', "is not a budget"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_file_that_is_no_budget_is_named_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, content: str | bytes,
    said: str,
) -> None:  # fmt: skip
    file = tmp_path / "budget.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    line = refused(monkeypatch, capsys, option, str(file))
    assert f"{file} {said}" in line
    assert f"hint: remove it; python -m v4sdk_cuda.budget --write {file} makes it" in line


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"triton": "3.9.0", "ops": {"linear": {"k": {"BM=16": {"90": [100, 10_000]}}}}}
    budget.write(tmp_path / "budget.json", content)
    assert budget.read(tmp_path / "budget.json") == content
    assert json.loads((tmp_path / "budget.json").read_text(encoding="utf-8")) == content


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_the_committed_files_are_budgets(version: str) -> None:
    assert budget.read(Path(__file__).parent / "cuda" / f"budget-triton-{version}.json")["ops"]
