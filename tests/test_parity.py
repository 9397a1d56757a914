"""The command that prints the parity table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from v4sdk_bench.parity import divergence
from v4sdk_bench.parity import table as parity


def test_states_of_a_line() -> None:
    assert parity.Line("a", 1.0, 2.0).state == "ok"
    assert parity.Line("a", 3.0, 2.0).state == "FAIL"
    assert parity.Line("a", float("nan"), 2.0).state == "FAIL"
    assert parity.Line("a", 1.0, 2.0, at_least=True).state == "FAIL"
    assert parity.Line("a", None, 2.0).state == "not run"
    assert parity.Line("a", 1.0, None).state == "info"


def test_the_command_prints_the_machine_and_every_line_and_writes_the_record(
    tmp_path: Path, golden: Path
) -> None:
    record = tmp_path / "parity.json"
    command = [
        sys.executable,
        "-m",
        "v4sdk_bench.parity.table",
        "--golden",
        str(golden),
        "--only",
        "quant",
        "--json",
        str(record),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "machine: " in done.stdout
    assert "torch: " in done.stdout
    lines = json.loads(record.read_text())["lines"]
    assert len(lines) == 5 * 3 + 4
    assert {line["state"] for line in lines} == {"ok"}
    assert {line["evidence"] for line in lines} == {"reference"}
    assert f"{len(lines)} lines, 0 over their limit" in done.stdout


def test_a_line_over_its_limit_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"quant": lambda: iter([parity.Line("planted", 1.0, 0.5)])}
    monkeypatch.setattr(parity, "sections", lambda folder, model: wrong)
    goldens = Path(__file__).parent / "golden"
    monkeypatch.setattr(sys, "argv", ["parity", "--golden", str(goldens)])
    assert parity.main() == 1
    assert "FAIL" in capsys.readouterr().out


def test_numerics_are_compared_over_every_position(chat_folder: Path) -> None:
    prompts = [[5, 9, 3, 7, 200, 41] * 5, [1, 2, 3]]
    same = divergence.compare(str(chat_folder), "exact", "exact", prompts=prompts)
    assert (same.mean, same.largest, same.same_top, same.positions) == (0.0, 0.0, 1.0, 33)
    other = divergence.compare(str(chat_folder), "fast", "exact", prompts=prompts)
    assert 0 < other.mean < 0.1
    assert other.mean <= other.largest
