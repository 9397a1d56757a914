"""`v4sdk bench`: measure, compare, report. Arguments in, text out; nothing heavy is imported before a command runs."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from v4sdk_bench.mini.cli import mini
from v4sdk_bench.parity.cli import compare, invariances
from v4sdk_bench.report.cli import report

if TYPE_CHECKING:
    from v4sdk.backend import Backend
    from v4sdk_bench.record import Record
    from v4sdk_bench.run import Event
    from v4sdk_bench.stage import Stage

_SUITES = ("parity", "ops", "model", "claims", "device")


@click.group(short_help="Measure parity and speed, and report them beside other machines.")
def bench() -> None:
    """Measure parity and speed on this machine, and put the records of several machines into one report.

    \b
    v4sdk bench run --quick                       about 10 minutes on two cores
    v4sdk bench report v4sdk-bench-*.json         terminal, Markdown and one HTML page
    """


@bench.command()
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice(_SUITES),
    help="May be repeated (default: all but device).",
)
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="What to measure.")
@click.option("--quick", is_flag=True, help="Small budgets (printed), contexts up to 8,192 tokens.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Record file (default: v4sdk-bench-BACKEND-DATE.json).",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkpoint folder (default: v4-nano).",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PREFIX",
    help="Only rows whose key begins so, e.g. parity/op; may be repeated.",
)
@click.option(
    "--golden",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of golden activations.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="ENGINE=PYTHON",
    help="Python that has a peer engine; may be repeated.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="Threads of the host's libraries (default: their own choice)."
)
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--restart", is_flag=True, help="Replace the output instead of going on with it.")
def run(
    suites: tuple[str, ...], backend: str, quick: bool, output: Path | None, model: Path | None, only: tuple[str, ...],
    golden: Path | None, peers: tuple[str, ...], threads: int | None, seed: int, restart: bool,
) -> int:  # fmt: skip
    """Measure this machine and write one JSON record.

    Ctrl-C keeps what is done; the same command goes on from there, and tries again what broke. Exit code 1 if a row failed or
    a stage broke.
    """
    from v4sdk import plugins
    from v4sdk_bench import run as runner

    chosen = runner.parse_suites(
        suites or tuple({prefix.partition("/")[0] for prefix in only} & set(_SUITES))
    )
    options = runner.Options(
        chosen, backend, quick, model, seed, only, _golden(golden), _peers(peers), threads
    )
    subject = plugins.select(backend)
    plan = runner.stages(options)
    with ExitStack() as stack:
        shown = bool(only) and output is None
        if shown:
            # figures looked up one by one are read on the screen; no record of a part gets in the way of a whole one
            output = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="v4sdk-bench-"))) / "part.json"
            )
        output = output or _default_output(subject.name, quick)
        _say_budgets(plan, quick, subject)
        screen = Screen()
        try:
            record = runner.run(options, output, shlex.join(["v4sdk", *sys.argv[1:]]), screen.show, restart)
        except KeyboardInterrupt:
            screen.clear()
            if not shown:
                click.echo(
                    f"interrupted; what is done is in {output}, the same command goes on from there", err=True
                )
            raise
        finally:
            screen.clear()
        return _show_rows(record) if shown else _close(record, output)


def _show_rows(record: Record) -> int:
    """Every row with all its figures; 1 if nothing was found."""
    from v4sdk_bench.report.numbers import name_of
    from v4sdk_bench.report.numbers import show as number

    for row in record.rows:
        click.echo(
            f"{row.key}: {row.state}" + (f", evidence {row.evidence}" if row.state != "not run" else "")
        )
        click.echo(f"  {row.what}")
        limits = {
            name.removeprefix(">="): (">=" if name.startswith(">=") else "<=", v)
            for name, v in row.limits.items()
        }
        for name, value in row.values.items():
            sign, limit = limits.get(name, ("", None))
            accepted = f"   (accepted {sign} {number(name, limit)})" if sign else ""
            click.echo(f"  {name_of(name):32} {number(name, value)}{accepted}")
        if row.setting:
            click.echo("  " + ", ".join(f"{name_of(k)} {number(k, v)}" for k, v in row.setting.items()))
        if row.note:
            click.echo(f"  note: {row.note}")
    if not record.rows:
        click.echo(f"no row has a key that begins with {' or '.join(record.options['only'])}", err=True)
        click.echo(
            "hint: keys stand in a record, and in its report: v4sdk bench report RECORD --all", err=True
        )
    return _verdict(record) or int(not record.rows)


def _default_output(backend: str, quick: bool) -> Path:
    """The unfinished record of an earlier day if there is one, so that the same command goes on with it; else today's."""
    import json

    ending = "-quick.json" if quick else ".json"
    for old in sorted(Path().glob(f"v4sdk-bench-{backend}-????-??-??{ending}"), reverse=True):
        try:
            if json.loads(old.read_text(encoding="utf-8")).get("status") != "complete":
                return old
        except (OSError, ValueError, AttributeError):
            # not ours, or damaged: the run says so if it is today's
            continue
    return Path(f"v4sdk-bench-{backend}-{datetime.now():%Y-%m-%d}{ending}")


def _golden(given: Path | None) -> Path | None:
    """The folder that was named, or the repository's where that is the working folder."""
    found = given or Path("tests/golden")
    if (found / "tiny-fp32").is_dir():
        return found
    if given is None:
        return None
    raise click.BadParameter(
        f"`{given}` holds no folder tiny-fp32, expected tests/golden of the repository", param_hint="--golden"
    )


def _peers(given: tuple[str, ...]) -> dict[str, str]:
    """Engine to interpreter; a name nobody knows, or a program that is not there, is said before anything is measured."""
    found: dict[str, str] = {}
    if not given:
        return found
    from v4sdk_bench.peers.lanes import ENGINES

    known = [spec.name for spec in ENGINES]
    for text in given:
        engine, _, python = text.partition("=")
        if not python:
            raise click.BadParameter(
                f"`{text}`, expected ENGINE=PYTHON, e.g. llama_cpp=venv/bin/python", param_hint="--peer"
            )
        if engine not in known:
            raise click.BadParameter(
                f"engine `{engine}` is unknown, expected one of {', '.join(known)}", param_hint="--peer"
            )
        if shutil.which(python) is None:
            raise click.BadParameter(
                f"`{python}` is no program, expected the Python that has {engine}", param_hint="--peer"
            )
        found[engine] = python
    return found


def _say_budgets(plan: Sequence[Stage], quick: bool, backend: Backend) -> None:
    seconds: dict[str, float] = {}
    for stage in plan:
        seconds[stage.suite] = seconds.get(stage.suite, 0) + stage.budget_s(quick, backend)
    listed = ", ".join(f"{suite} {total / 60:.1f}" for suite, total in seconds.items())
    click.echo(f"budgets in minutes: {listed}; {sum(seconds.values()) / 60:.1f} in all", err=True)


def _close(record: Record, output: Path) -> int:
    from v4sdk_bench.run import summary

    for row in record.rows:
        if row.state == "failed":
            click.echo(f"failed: {row.key}: {row.what}{f' ({row.note})' if row.note else ''}", err=True)
    counts = summary(record)
    click.echo(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; record: {output}")
    click.echo(f"next: v4sdk bench report {shlex.quote(str(output))}", err=True)
    return _verdict(record)


def _verdict(record: Record) -> int:
    """1 if a row failed or a stage broke, which is said here."""
    broken = {name: stage["note"] for name, stage in record.stages.items() if stage["state"] == "broken"}
    for name, note in broken.items():
        click.echo(f"broken: stage {name}: {note}", err=True)
    return int(bool(broken) or any(row.state == "failed" for row in record.rows))


class Screen:
    """Progress on stderr: one line that is replaced on a terminal, one line per stage elsewhere."""

    def __init__(self) -> None:
        self._tty, self._stage, self._drawn = sys.stderr.isatty(), "", False
        # a row may come twice, with the floor of better ceilings
        self._rows: set[str] = set()

    def show(self, event: Event) -> None:
        """Draw one event."""
        if event.kind == "stage":
            self._stage, self._rows = f"[{event.done + 1}/{event.total}] {event.text}", set()
            self._draw("")
        elif event.kind == "row":
            self._rows.add(event.text)
            if event.row is not None and event.row.state == "failed":
                self._print(f"failed: {event.text}")
            self._draw("")
        elif event.kind == "say":
            self._draw(event.text)
        else:
            self._print(
                f"[{event.done}/{event.total}] {event.text}"
                + (f", {len(self._rows)} rows" if self._rows else "")
            )

    def clear(self) -> None:
        """Leave an empty line behind."""
        if self._drawn:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._drawn = False

    def _draw(self, text: str) -> None:
        if not self._tty:
            return
        line = f"{self._stage}: {len(self._rows)} rows {text}"
        sys.stderr.write(f"\r\033[K{line[:110]}")
        sys.stderr.flush()
        self._drawn = True

    def _print(self, text: str) -> None:
        self.clear()
        click.echo(text, err=True)


for command in (report, compare, invariances, mini):
    bench.add_command(command)
