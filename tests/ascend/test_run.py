"""`v4sdk run --backend ascend` from end to end, as every chip, with the vendor's functions computed on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from ascend.conftest import SOCS, StandIn

from v4sdk.conversion import convert
from v4sdk.loading import bundled_folder

launcher = importlib.import_module("v4sdk_ascend.testing.run")
policy = importlib.import_module("v4sdk_ascend.policy")

QUESTIONS = {
    "What is 347 + 285?": "632",
    "Give Mia tea. Give Bob jam. What do I give Bob?": "jam",
    "Sort: tea, jam, golf": "golf",
}
EMULATED = {"V4SDK_ASCEND_EMULATE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as the chips with integer products want it."""
    target = tmp_path_factory.mktemp("converted") / "nano"
    convert(bundled_folder(), target, policy.LAYOUTS["ascend-w8a8"])
    return target


def needed(family: str, converted: Path) -> Path | None:
    """The folder that a family runs; None where it takes the released one."""
    return None if family == "950" else converted


def test_a_run_answers_on_every_chip(stand_in: StandIn, family: str, converted: Path) -> None:
    folder = needed(family, converted)
    model = ("--model", str(folder)) if folder else ()
    command = ("-m", "v4sdk", "run", "--backend", "ascend", *model, "What is 347 + 285?")
    ended = stand_in.python(SOCS[family], *command, **EMULATED)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "632\n"
    kept = "native KV" if family == "950" else "bf16 KV"
    assert f"fast numerics, {kept}, ascend" in ended.stderr


def test_answers_are_those_of_the_cpu_on_the_values_that_the_chip_has(
    stand_in: StandIn, family: str, converted: Path
) -> None:
    found = stand_in.facts(
        SOCS[family], "answers.py", str(needed(family, converted) or "-"), *QUESTIONS, **EMULATED
    )
    print(
        f"{family}: KL to the CPU {found['kl']:.1e}, to the released values {found['kl_released']:.1e}, "
        f"of which converting {found['kl_converting']:.1e}"
    )
    assert found["evidence"] == "emulated"
    assert found["npu"] == found["cpu"]
    assert all(word in said for word, said in zip(QUESTIONS.values(), found["npu"], strict=True))
    assert found["kl"] <= 2e-3
    assert found["kl_released"] <= 1e-2


def test_the_same_tokens_as_the_cpu_on_950(stand_in: StandIn) -> None:
    command = (
        "-m",
        "v4sdk",
        "bench",
        "compare",
        "--a",
        "cpu:reference",
        "--b",
        "ascend:reference",
        "--tokens-only",
    )
    ended = stand_in.python(SOCS["950"], *command, "--json", **EMULATED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout)
    print(f"950, same tokens: {json.dumps(told)[:400]}")


def test_a_decode_step_stays_on_the_device(stand_in: StandIn, family: str, converted: Path) -> None:
    # what a graph cannot capture: an op that the vendor's wheel leaves to the host, a value read or a constant sent
    found = stand_in.facts(SOCS[family], "decode_ops.py", str(needed(family, converted) or "-"), **EMULATED)
    print(f"{family}: {found['ops']} ops of torch in {found['calls']} calls of a decode step")
    assert found["ops"] > 20
    assert found["on_host"] == []
    assert found["to_host"] == {}
    assert found["from_host"] == 0


def test_a_chip_without_fp8_names_the_command_that_converts(stand_in: StandIn) -> None:
    ended = stand_in.python(SOCS["910C"], "-m", "v4sdk", "run", "--backend", "ascend", "hello", **EMULATED)
    assert ended.returncode == 1
    error, hint = [line for line in ended.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert error == "error: the checkpoint has fp4 and fp8 matrices, and 910C has no products of them"
    assert hint == f"hint: v4sdk convert {bundled_folder()} TARGET --for ascend-w8a8, then --model TARGET"


def test_rows_in_fp8_are_refused_where_the_chip_has_none(stand_in: StandIn, converted: Path) -> None:
    ended = stand_in.python(
        SOCS["910B"], "-m", "v4sdk", "run", "--backend", "ascend", "--model", str(converted), "--kv-format", "native", "hello",
        **EMULATED,
    )  # fmt: skip
    assert ended.returncode == 1
    assert (
        "KV format `native` cannot be kept by backend `ascend` here, expected bf16 or float32" in ended.stderr
    )


def test_the_launcher_runs_a_command_as_a_chip(stand_in: StandIn) -> None:
    told = "import os; print(os.environ['V4SDK_ASCEND_STUB_SOC'], os.environ['V4SDK_ASCEND_EMULATE'])"
    launch = ("-m", "v4sdk_ascend.testing.run", "--soc", SOCS["950"], "--", sys.executable, "-c", told)
    # the launcher's own variables come last, so that it can be started from anywhere
    ended = stand_in.python(SOCS["910B"], *launch)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{SOCS['950']} 1\n"


def test_the_launcher_knows_its_chips(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--soc", "Ascend310", "--", "true"]) == 1
    assert "SoC `Ascend310` is unknown, expected one of Ascend910B1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"), [("nosuchcmd", "No such file or directory"), (".", "Permission denied")]
)
def test_a_command_that_cannot_be_run_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    monkeypatch.setattr(launcher, "variables", lambda soc, base: dict(os.environ))
    assert launcher.main(["--", command]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: `{command}` cannot be run: {said}"
    assert hint.startswith("hint: after -- comes a command")


def test_a_folder_that_cannot_keep_wheels_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    into = tmp_path / "file" / "wheels"
    monkeypatch.setenv("V4SDK_ASCEND_WHEELS", str(into))
    monkeypatch.setattr(launcher.wheels, "cannot_load", lambda table: None)
    assert launcher.main(["--", "true"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: wheels cannot be kept in {into}: Not a directory"
    assert hint == "hint: V4SDK_ASCEND_WHEELS names another folder"
