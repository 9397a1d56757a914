"""Runs suites one stage after the other into one record: progress, budgets, interruption, resumption."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from v4sdk import plugins
from v4sdk.backend import Backend
from v4sdk.errors import BackendUnavailable, V4Error
from v4sdk_bench.machine import hardware, software
from v4sdk_bench.record import KIND, SUITES, BadRecord, NotSaved, Record, Row
from v4sdk_bench.stage import Bench, BenchError, Stage, now

DEFAULT_SUITES = ("parity", "ops", "model", "claims")
# between rows the file is written at most this often: a row is cheap, a write need not be
_SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class Options:
    """What a run chose.

    Attributes:
        suites: in the order they run. backend: name or `auto`. model: checkpoint folder, None for the bundled one.
        only: key prefixes; stages without such rows are left out. peers: engine to the Python that has it.
        threads: of the host's libraries, None for their own choice.
    """

    suites: tuple[str, ...] = DEFAULT_SUITES
    backend: str = plugins.AUTO
    quick: bool = False
    model: Path | None = None
    seed: int = 0
    only: tuple[str, ...] = ()
    golden: Path | None = None
    peers: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    def to_json(self, backend: Backend) -> dict[str, Any]:
        """As stored in a record; resuming requires the same."""
        raw = asdict(self) | {"backend": backend.name, "suites": list(self.suites), "only": list(self.only)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in raw.items()}


@dataclass(frozen=True)
class Event:
    """What a run tells its caller.

    Attributes:
        kind: `stage` begins (`text` its name), `say` replaces the last line of progress, `row` was found, `end` of a stage.
    """

    kind: str
    text: str
    row: Row | None = None
    done: int = 0
    total: int = 0


OnEvent = Callable[[Event], None]


def stages(options: Options) -> list[Stage]:
    """The stages of the chosen suites, those that `only` rules out left out.

    Raises:
        BenchError: if `only` names a suite that was not chosen.
    """
    found: list[Stage] = []
    for suite in options.suites:
        wanted = [prefix for prefix in options.only if prefix.partition("/")[0] == suite]
        if options.only and not wanted:
            continue
        every: tuple[Stage, ...] = importlib.import_module(f"v4sdk_bench.suites.{suite}").STAGES
        # a key need not begin with its stage's name: then every stage of the suite may hold it
        named = {p: [s for s in every if f"{p}/".startswith(f"{s.name}/")] for p in wanted}
        if wanted and all(named.values()):
            found += [s for s in every if any(s in of_prefix for of_prefix in named.values())]
        else:
            found += every
    strangers = [p for p in options.only if p.partition("/")[0] not in options.suites]
    if strangers:
        raise BenchError(
            f"--only {strangers[0]} is in none of the chosen suites, expected a prefix of {', '.join(options.suites)}",
            hint="a key begins with its suite, as in the record: --only parity/op",
        )
    return found


def run(options: Options, output: Path, command: str, on_event: OnEvent, restart: bool = False) -> Record:
    """Measure, and keep what is found in `output` at every moment.

    An `output` that is unfinished, or in which a stage broke, is gone on with if options, machine and software are the same; its
    finished stages are not repeated.

    Raises:
        BadRecord, BenchError: if `output` cannot be written, is something else, or is already complete.
        BackendUnavailable: if the backend cannot be used, or vanished; what was found until then is kept.
        KeyboardInterrupt: after the record was marked as interrupted and written.
    """
    backend = plugins.select(options.backend)
    record = _open(options, backend, output, command, restart)
    plan = stages(options)
    record.save(output)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="v4sdk-bench-") as scratch,
            _threads(backend, options.threads),
        ):
            bench = Bench(
                backend, record, Path(scratch), cache_folder(), options.quick, options.seed, options.model,
                dict(options.peers), options.golden, options.only,
            )  # fmt: skip
            for at, stage in enumerate(plan):
                if record.stages.get(stage.name, {}).get("state") == "done":
                    on_event(Event("end", f"{stage.name}: kept from before", done=at + 1, total=len(plan)))
                    continue
                on_event(Event("stage", stage.name, done=at, total=len(plan)))
                _run_stage(stage, bench, output, on_event)
                record.save(output)
                end = record.stages[stage.name]
                on_event(
                    Event(
                        "end",
                        f"{stage.name}: {end['state']}, {end['seconds']:.0f} s",
                        done=at + 1,
                        total=len(plan),
                    )
                )
                gone = backend.unavailable()
                if gone is not None:
                    raise BackendUnavailable(
                        f"backend `{backend.name}` vanished during stage {stage.name}: {gone}",
                        hint=f"the finished rows are in {output}; once the device is back, the same command goes on from there",
                    )
    except BaseException:
        record.status = "interrupted"
        record.save(output)
        raise
    record.status, record.finished = "complete", now()
    record.save(output)
    return record


def _open(options: Options, backend: Backend, output: Path, command: str, restart: bool) -> Record:
    chosen, about = options.to_json(backend), software(backend.software)
    # of an emulated chip this is all that says which one it was
    facts = {"capability": dict(backend.capability())} if backend.capability() else {}
    fresh = Record(now(), command, chosen, hardware() | facts, about, device=_device(backend))
    if not output.parent.is_dir():
        raise BenchError(f"the folder of {output} does not exist", hint=f"mkdir -p {output.parent}")
    if restart and output.exists() and f'"kind": "{KIND}"' not in _head(output):
        raise BenchError(
            f"{output} is not a record of v4sdk bench, so it is not replaced", hint="give another --output"
        )
    if restart or not output.exists():
        return fresh
    try:
        old = Record.load(output)
    except BadRecord as exc:
        ours = f'"kind": "{KIND}"' in _head(output)
        way_out = "give another --output" + (", or --restart to replace it" if ours else "")
        raise BadRecord(exc.message, hint=way_out) from exc
    if old.status == "complete" and all(stage["state"] == "done" for stage in old.stages.values()):
        raise BenchError(
            f"{output} is a complete record of {old.started}",
            hint="give another --output, or --restart to replace it",
        )
    same_machine = all(old.machine.get(k) == fresh.machine[k] for k in ("processor", "cores", "memory_bytes"))
    for name, before, after in (
        ("options", old.options, chosen),
        ("software", old.software, about),
        ("machine", same_machine, True),
    ):
        if before != after:
            raise BenchError(
                f"{output} is not finished, and its {name} differ: {_difference(before, after)}",
                hint="repeat the command it was made with to go on, give another --output, or --restart to replace it",
            )
    return replace(old, status="running", finished=None)


def _head(path: Path) -> str:
    """Where a record says that it is one, damaged or not."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(200)
    except OSError as exc:
        raise BenchError(f"cannot read {path}: {exc.strerror}", hint="give another --output") from exc


def _difference(before: Any, after: Any) -> str:
    if not isinstance(before, dict):
        return "it was measured on another one"
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return "; ".join(f"{n} was {before.get(n)!r}, is {after.get(n)!r}" for n in names)


def _device(backend: Backend) -> dict[str, Any] | None:
    found = backend.identity()
    return None if found is None else dict(found)


def _run_stage(stage: Stage, bench: Bench, output: Path, on_event: OnEvent) -> None:
    """Run one stage; what goes wrong inside it breaks this stage, not the run."""
    began = saved = time.monotonic()
    budget = stage.budget_s(bench.quick, bench.backend)
    bench.deadline = began + budget
    bench.say = lambda text: on_event(Event("say", text))
    state, note = "done", ""
    try:
        last = began
        for row in stage.run(bench):
            if not bench.wants(row.key):
                continue
            finished = time.monotonic()
            row = replace(row, date=row.date or now(), seconds=row.seconds or round(finished - last, 3))
            last = finished
            bench.record.add(row)
            on_event(Event("row", row.key, row))
            if finished - saved > _SAVE_EVERY_S:
                bench.record.save(output)
                saved = finished
    except NotSaved:
        raise
    except V4Error as exc:
        state, note = "broken", f"{exc.message}; {exc.hint}" if exc.hint else exc.message
    except (
        Exception
    ) as exc:  # a device that fails raises anything, and other stages may still have something to say
        state, note = "broken", f"{type(exc).__name__}: {exc}"
    finally:
        seconds = round(time.monotonic() - began, 1)
        bench.record.stages[stage.name] = {
            "state": "interrupted",
            "seconds": seconds,
            "budget_s": budget,
            "note": "",
        }
    bench.record.stages[stage.name].update(state=state, note=note)


def cache_folder() -> Path:
    """Where made checkpoints stay between runs: `$XDG_CACHE_HOME/v4sdk/bench`, or below `~/.cache`."""
    import os

    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "v4sdk" / "bench"


@contextmanager
def _threads(backend: Backend, count: int | None) -> Iterator[None]:
    if not count:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with backend.with_threads(count):
            yield
    finally:
        torch.set_num_threads(before)


def summary(record: Record) -> dict[str, int]:
    """Rows by state."""
    counts = dict.fromkeys(("ok", "failed", "info", "not run"), 0)
    for row in record.rows:
        counts[row.state] += 1
    return counts


def parse_suites(names: Sequence[str]) -> tuple[str, ...]:
    """Chosen suites in their own order; none chosen is all that need no accelerator."""
    return tuple(s for s in SUITES if s in names) if names else DEFAULT_SUITES
