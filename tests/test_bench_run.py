"""`v4sdk bench run`: stages, interruption, resumption, and every way a run can go wrong half-way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from v4sdk import plugins
from v4sdk.errors import BackendUnavailable, V4Error
from v4sdk_bench import cli, run
from v4sdk_bench.record import NotSaved, Record, Row
from v4sdk_bench.stage import Bench, BenchError, Stage

Work = Callable[[Bench], Iterator[Row]]


def rows(*keys: str) -> Work:
    def work(bench: Bench) -> Iterator[Row]:
        for key in keys:
            yield Row(key, key, "info")

    return work


def raising(error: BaseException, *before: str) -> Work:
    def work(bench: Bench) -> Iterator[Row]:
        yield from rows(*before)(bench)
        raise error

    return work


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the stages of the suite `parity`."""

    def put(**works: Work) -> None:
        stages = tuple(Stage(f"parity/{name}", work, 10, 10) for name, work in works.items())
        real = run.importlib.import_module
        monkeypatch.setattr(
            run.importlib, "import_module",
            lambda name: SimpleNamespace(STAGES=stages) if name == "v4sdk_bench.suites.parity" else real(name),
        )  # fmt: skip

    return put


def start(output: Path, restart: bool = False, **options: object) -> Record:
    chosen = run.Options(suites=("parity",), backend="cpu", **options)  # type: ignore[arg-type]
    return run.run(chosen, output, "v4sdk bench run", lambda event: None, restart)


def keys(output: Path) -> list[str]:
    return [row.key for row in Record.load(output).rows]


def test_stages_run_in_order_into_one_file(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(a=rows("parity/1", "parity/2"), b=rows("parity/3"))
    made = start(tmp_path / "r.json")
    assert keys(tmp_path / "r.json") == ["parity/1", "parity/2", "parity/3"]
    assert made.status == "complete"
    assert made.finished
    assert all(row.date for row in made.rows)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    output, calls = tmp_path / "r.json", []

    def first(bench: Bench) -> Iterator[Row]:
        calls.append("first")
        yield from rows("parity/1")(bench)

    plant(a=first, b=raising(KeyboardInterrupt(), "parity/2"), c=rows("parity/3"))
    with pytest.raises(KeyboardInterrupt):
        start(output)
    assert keys(output) == ["parity/1", "parity/2"]
    assert Record.load(output).status == "interrupted"

    plant(a=first, b=rows("parity/2"), c=rows("parity/3"))
    start(output)
    assert keys(output) == ["parity/1", "parity/2", "parity/3"]
    assert calls == ["first"], "a finished stage ran again"


def test_a_complete_file_is_not_overwritten(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(a=rows("parity/1"))
    start(tmp_path / "r.json")
    with pytest.raises(BenchError, match="is a complete record"):
        start(tmp_path / "r.json")
    plant(a=rows("parity/2"))
    start(tmp_path / "r.json", restart=True)
    assert keys(tmp_path / "r.json") == ["parity/2"]


def test_other_options_do_not_go_on_with_a_file(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(a=raising(KeyboardInterrupt(), "parity/1"))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "r.json")
    with pytest.raises(BenchError, match="its options differ: seed was 0, is 7"):
        start(tmp_path / "r.json", seed=7)


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(a=rows("parity/1"))
    precious = tmp_path / "r.json"
    precious.write_text('{"my": "data"}')
    with pytest.raises(V4Error, match="is not a record") as caught:
        start(precious)
    assert "--output" in str(caught.value.hint)
    assert precious.read_text() == '{"my": "data"}'


@pytest.mark.parametrize(
    "error", [BenchError("no disk", hint="buy one"), RuntimeError("device lost"), KeyError("x")]
)
def test_a_stage_that_breaks_is_named_and_the_others_run(
    tmp_path: Path, plant: Callable[..., None], error: Exception
) -> None:
    plant(a=raising(error, "parity/1"), b=rows("parity/2"))
    made = start(tmp_path / "r.json")
    assert keys(tmp_path / "r.json") == ["parity/1", "parity/2"]
    assert made.stages["parity/a"]["state"] == "broken"
    assert str(error.args[0]) in made.stages["parity/a"]["note"]


def test_a_stage_that_broke_is_run_again_by_the_same_command(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(a=rows("parity/1"), b=raising(RuntimeError("no room")))
    assert start(tmp_path / "r.json").status == "complete"
    plant(a=raising(AssertionError("a finished stage ran again")), b=rows("parity/2"))
    made = start(tmp_path / "r.json")
    assert keys(tmp_path / "r.json") == ["parity/1", "parity/2"]
    assert {stage["state"] for stage in made.stages.values()} == {"done"}


def test_a_row_that_breaks_the_schema_breaks_its_stage_only(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    def work(bench: Bench) -> Iterator[Row]:
        yield Row("parity/1", "wrong and still with a time", "failed", values={"median_s": 1.0})

    plant(a=work, b=rows("parity/2"))
    made = start(tmp_path / "r.json")
    assert keys(tmp_path / "r.json") == ["parity/2"]
    assert "still gives a speed" in made.stages["parity/a"]["note"]


def test_a_full_disk_ends_the_run_with_its_reason(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(bench: Bench) -> Iterator[Row]:
        yield from rows("parity/1")(bench)
        monkeypatch.setattr("v4sdk_bench.record.os.replace", full)
        yield from rows("parity/2")(bench)

    plant(a=work, b=raising(AssertionError("must not run")))
    monkeypatch.setattr(run, "_SAVE_EVERY_S", 0.0)
    with pytest.raises(NotSaved, match="No space left on device; the file keeps what was written before"):
        start(tmp_path / "r.json")
    monkeypatch.undo()
    assert keys(tmp_path / "r.json") == ["parity/1"]


def test_a_backend_that_vanishes_ends_the_run_and_keeps_its_rows(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(bench: Bench) -> Iterator[Row]:
        yield from rows("parity/1")(bench)
        monkeypatch.setattr(type(bench.backend), "unavailable", lambda self: "it fell off the bus")

    plant(a=work, b=rows("parity/2"))
    with pytest.raises(BackendUnavailable, match="vanished during stage parity/a: it fell off the bus"):
        start(tmp_path / "r.json")
    assert keys(tmp_path / "r.json") == ["parity/1"]
    assert Record.load(tmp_path / "r.json").status == "interrupted"


def test_only_keeps_wanted_rows_and_leaves_other_stages_out(
    tmp_path: Path, plant: Callable[..., None]
) -> None:
    plant(op=rows("parity/op/a", "parity/op/b"), other=raising(AssertionError("must not run")))
    start(tmp_path / "r.json", only=("parity/op/a",))
    assert keys(tmp_path / "r.json") == ["parity/op/a"]
    with pytest.raises(BenchError, match="--only ops/x is in none of the chosen suites"):
        start(tmp_path / "s.json", only=("ops/x",))


def test_only_without_a_row_is_an_error_in_words(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(op=rows("parity/op/a"))
    command = ["run", "--backend", "cpu", "--only", "parity/op/b"]
    result = CliRunner().invoke(cli.bench, command, standalone_mode=False)
    assert result.return_value == 1
    assert "no row has a key that begins with parity/op/b" in result.output


def test_rows_are_counted_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen, row = cli.Screen(), Row("ops/1", "1", "info")
    for event in (
        run.Event("stage", "ops/speed"),
        *[run.Event("row", row.key, row)] * 2,
        run.Event("end", "done"),
    ):
        screen.show(event)
    assert capsys.readouterr().err == "[0/0] done, 1 rows\n"


def test_the_command_of_a_row_names_what_its_value_depends_on(tmp_path: Path) -> None:
    record = Record("2026-01-01T00:00:00+00:00", "test", {"threads": 3}, {}, {})
    bench = Bench(
        plugins.select("cpu"), record, tmp_path, tmp_path, quick=True, seed=7, model=Path("my models/a")
    )
    assert bench.command("ops/linear/x") == (
        "v4sdk bench run --suite ops --backend cpu --quick --model 'my models/a' --threads 3 --seed 7 --only ops/linear/x"
    )


def test_a_host_has_no_device_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as where no kernels were built
    monkeypatch.setattr(type(plugins.select("cpu")), "identity", lambda self: None)
    made = run.run(
        run.Options(suites=("device",), backend="cpu"), tmp_path / "r.json", "c", lambda event: None
    )
    (row,) = made.rows
    assert row.state == "not run"
    assert "suites ops and model" in row.note


def test_the_command_says_budgets_result_and_next_step(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(a=rows("parity/1"))
    result = CliRunner().invoke(
        cli.bench, ["run", "--suite", "parity", "--backend", "cpu", "--output", "r.json"]
    )
    assert result.output.count("budgets in minutes: parity 0.2") == 1
    assert "1 info, 0 not run; record: r.json" in result.output
    assert "next: v4sdk bench report r.json" in result.output


def test_a_failed_row_makes_the_exit_code_red(tmp_path: Path, plant: Callable[..., None]) -> None:
    def work(bench: Bench) -> Iterator[Row]:
        yield Row("parity/1", "planted", "failed", note="off by one")

    plant(a=work)
    command = ["run", "--suite", "parity", "--backend", "cpu", "--output", str(tmp_path / "r.json")]
    result = CliRunner().invoke(cli.bench, command, standalone_mode=False)
    assert result.return_value == 1
    assert "failed: parity/1: planted (off by one)" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--peer", "nonsense"], "expected ENGINE=PYTHON"),
        (["--peer", "lama=python"], "engine `lama` is unknown, expected one of transformers, llama_cpp"),
        (["--peer", "llama_cpp=no/python"], "`no/python` is no program"),
        (["--golden", "."], "`.` holds no folder tiny-fp32"),
    ],
)
def test_bad_options_are_answered_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.bench, ["run", *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_an_output_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="does not exist"):
        start(tmp_path / "no" / "r.json")


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'jinja2', 'matplotlib', 'transformers', 'pytest'}"
    code = (
        "import sys; from click.testing import CliRunner; from v4sdk.cli import cli\n"
        "for args in (['--help'], ['bench', '--help'], ['bench', 'run', '--help'], ['bench', 'report', '--help'],"
        " ['bench', 'mini', '--help'], ['bench', 'compare', '--help'], ['export-onnx', '--help']):\n"
        "    result = CliRunner().invoke(cli, args); assert result.exit_code == 0, result.output\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_was_cut_off_yesterday_goes_on_in_its_file(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--suite", "parity", "--backend", "cpu"]
    plant(a=rows("parity/1"), b=raising(KeyboardInterrupt()))
    with pytest.raises(click.Abort):
        CliRunner().invoke(cli.bench, command, standalone_mode=False, catch_exceptions=False)
    (today,) = tmp_path.glob("v4sdk-bench-cpu-*.json")
    today.rename("v4sdk-bench-cpu-2026-01-01.json")
    plant(a=raising(AssertionError("ran again")), b=rows("parity/2"))
    CliRunner().invoke(cli.bench, command, standalone_mode=False, catch_exceptions=False)
    assert [path.name for path in tmp_path.glob("*.json")] == ["v4sdk-bench-cpu-2026-01-01.json"]
    assert keys(tmp_path / "v4sdk-bench-cpu-2026-01-01.json") == ["parity/1", "parity/2"]


def test_restart_replaces_records_and_nothing_else(tmp_path: Path, plant: Callable[..., None]) -> None:
    plant(a=rows("parity/1"))
    precious, damaged = tmp_path / "mine.json", tmp_path / "damaged.json"
    precious.write_text('{"my": "data"}')
    with pytest.raises(BenchError, match="is not a record of v4sdk bench, so it is not replaced"):
        start(precious, restart=True)
    assert precious.read_text() == '{"my": "data"}'
    start(damaged)
    damaged.write_text(damaged.read_text()[:300])
    start(damaged, restart=True)
    assert keys(damaged) == ["parity/1"]


@pytest.mark.parametrize(
    ("quick", "evidence", "seconds"),
    [(True, "emulated", 1), (False, "emulated", 3), (False, "reference", 2), (False, "device", 2)],
)
def test_an_emulated_device_has_a_time_of_its_own(quick: bool, evidence: str, seconds: float) -> None:
    stage = Stage("parity/op", rows(), 1, 2, emulated_s=3)
    backend = SimpleNamespace(evidence=evidence)
    assert stage.budget_s(quick, backend) == seconds  # type: ignore[arg-type]


def test_a_record_names_what_computes_for_the_backend(
    tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = plugins.select("cpu")
    monkeypatch.setattr(type(cpu), "software", ("pluggy", "no-such-distribution"))
    monkeypatch.setattr(type(cpu), "capability", lambda self: {"arch": 90})
    plant(a=rows("parity/1"))
    made = start(tmp_path / "r.json")
    assert made.software["pluggy"]
    assert "no-such-distribution" not in made.software
    assert Record.load(tmp_path / "r.json").machine["capability"] == {"arch": 90}
