"""Suite `ops`: every op on its own inputs, its median beside the least time that bytes and FLOPs allow on this machine.

pytest-benchmark runs `bench_ops.py`, one op after the other. Wrong results have no time; what lies in the caches has no share of
the memory's bandwidth.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.speed.timing import Sample, load
from v4sdk_bench.stage import OUT_OF_TIME, Bench, BenchError, Stage

if TYPE_CHECKING:
    import pytest

    from v4sdk_bench.speed.ceilings import Ceiling
    from v4sdk_bench.speed.op_cases import OpCase, Plan, Timed

_FILE = "v4sdk_bench.speed.bench_ops"
_QUICK_S, _FULL_S = 120.0, 1800.0
# of one case's timed rounds; of the ceilings before and after
_CASE_S = {True: 0.1, False: 1.0}
_CEILINGS_S = {True: 6.0, False: 30.0}
_FULL_LIMIT_BYTES = 8_000_000_000
_QUICK_DTYPES = ("float32", "bfloat16")


def run(bench: Bench) -> Iterator[Row]:
    """Rows `ops/<op>/<case>`; ceilings go to the record."""
    from v4sdk.config import ModelConfig
    from v4sdk.loading import bundled_folder
    from v4sdk_bench.speed.op_cases import QUICK_LIMIT_BYTES, Plan, chosen

    require_pytest()
    cases = [c for c in chosen(bench.quick) if bench.wants(f"ops/{c.label}") and not _kept(bench, c)]
    if not cases and not bench.wants("ops/noise"):
        return
    ceilings = measure_ceilings(bench)
    limit = QUICK_LIMIT_BYTES if bench.quick else _FULL_LIMIT_BYTES
    config = ModelConfig.from_folder(bench.model or bundled_folder())
    if bench.wants("ops/noise"):
        yield noise_row(bench)
    found: list[tuple[OpCase, Timed, float]] = []
    # one run of pytest per op, so that an interrupted suite keeps the ops before
    for name in dict.fromkeys(c.op.name for c in cases):
        own = [c for c in cases if c.op.name == name]
        plan = Plan(bench.backend, config, own, _CASE_S[bench.quick], limit)
        watch = Watch(bench, plan)
        run_pytest(plan, watch)
        for case in own:
            yield from _rows(bench, plan, watch, case, ceilings)
            if case.label in plan.timed:
                found.append((case, plan.timed[case.label], watch.seconds.get(case.label, 0.0)))
    after = measure_ceilings(bench)
    if any(a.value > b.value for a in after for b in ceilings if a.name == b.name):
        # the machine can do more than was known when these rows were written
        for case, timed, seconds in found:
            yield timed_row(bench, case, timed, after, seconds)


def require_pytest() -> None:
    """Say what is missing, before anything is measured.

    Raises:
        BenchError: without pytest or pytest-benchmark.
    """
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise BenchError(
            f"the suite `ops` needs {' and '.join(missing).replace('_', '-')}, which is not installed",
            hint="pip install 'v4sdk[bench]'",
        )


def measure_ceilings(bench: Bench, budget_s: float | None = None) -> list[Ceiling]:
    """Measure, note it in the record, and give the best that this run has seen so far."""
    from v4sdk_bench.speed.ceilings import DTYPES, best, measure

    bench.say("ceilings: memory bandwidth and matrix products")
    backend = bench.backend
    dtypes = _QUICK_DTYPES if bench.quick else DTYPES
    found: list[Ceiling] = measure(
        backend.device, backend.synchronize, budget_s or _CEILINGS_S[bench.quick], dtypes
    )
    bench.record.ceilings += [asdict(ceiling) for ceiling in found]
    highest: list[Ceiling] = best(bench.record.ceilings)
    return highest


def noise_row(bench: Bench) -> Row:
    """An op against itself: what difference this machine shows where there is none."""
    import torch

    from v4sdk_bench.speed.timing import paired

    x = torch.ones(256, 4096, device=bench.backend.device)

    def work() -> object:
        return (x * 1.5).sum()

    found = paired(work, work, _CASE_S[bench.quick] * 10, sync=bench.backend.synchronize)
    return Row(
        "ops/noise", "the same call against itself", "info", "reference", setting={"elements": x.numel()},
        values={**found.values(), "verdict": found.verdict, "load": load()}, command=bench.command("ops/noise"),
    )  # fmt: skip


class Watch:
    """Follows a run of pytest: progress, budget, what went wrong and how long each case took in all."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench, self.plan = bench, plan
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.output = io.StringIO()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Say what comes next; leave it out if the budget is used up."""
        import pytest

        label = _label(item.nodeid)
        self.bench.say(f"ops: {label}")
        # the ceilings are measured once more at the end
        if self.bench.left() < _CEILINGS_S[self.bench.quick] * 1.5:
            # becomes a row that was not run
            self.plan.left_out[label] = OUT_OF_TIME
            pytest.skip(f"{OUT_OF_TIME}; ends without --quick, or with --only this op")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep failures and times."""
        label = _label(report.nodeid)
        self.seconds[label] = self.seconds.get(label, 0.0) + report.duration
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            told = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
            self.failures[label] = (told or lines or ["failed without a word"])[0]


def run_pytest(plan: Plan, watch: Watch) -> None:
    """Run `bench_ops.py` in this process, on its own: no settings, plugins or caches of whatever project it is called in.

    Raises:
        BenchError: if pytest itself fails. KeyboardInterrupt: as pressed.
    """
    import pytest

    from v4sdk_bench.speed.bench_ops import PLAN

    options = [
        "--pyargs", _FILE, "-c", os.devnull, "--rootdir", str(watch.bench.scratch), "--noconftest", "--import-mode=importlib",
        "-p", "no:cacheprovider", "-p", "no:warnings", "-p", "pytest_benchmark.plugin", "-s", "-q", "--assert=plain",
        "--benchmark-storage", (watch.bench.scratch / "benchmarks").as_uri(),
    ]  # fmt: skip
    # whoever turns warnings into errors means their own code
    with (
        _own_environment(),
        contextlib.redirect_stdout(watch.output),
        warnings.catch_warnings(action="ignore"),
    ):
        config_plugins: list[Any] = [_Handing(plan, PLAN), watch]
        code = pytest.main(options, plugins=config_plugins)
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        last = watch.output.getvalue().strip().splitlines()[-1:] or ["it said nothing"]
        raise BenchError(
            f"pytest could not run the op benchmarks: {last[0]}",
            hint=f"pytest --pyargs {_FILE} shows the whole of it",
        )


class _Handing:
    """Registers the plan under the name that `bench_ops.py` looks for."""

    def __init__(self, plan: Plan, name: str) -> None:
        self._plan, self._name = plan, name

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self._plan, self._name)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    # what somebody set for their own tests is not meant for this run
    mine = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    before = {name: os.environ.pop(name, None) for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", *mine)}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _rows(bench: Bench, plan: Plan, watch: Watch, case: OpCase, ceilings: list[Ceiling]) -> Iterator[Row]:
    key, label, seconds = f"ops/{case.label}", case.label, watch.seconds.get(case.label, 0.0)
    red = bench.wrong(f"parity/op/{case.op.name}/")
    if label in plan.left_out:
        yield not_run(
            key, _what(case), plan.left_out[label], setting=_setting(case), command=bench.command(key)
        )
    elif label in plan.wrong or label in watch.failures or red is not None:
        found = plan.wrong.get(label)
        why = (
            found.detail if found else watch.failures.get(label) or f"parity is red: {red.key if red else ''}"
        )
        yield Row(
            key, _what(case), "failed", found.evidence if found else "reference",
            values={"error": found.worst} if found else {}, limits={"error": 1.0} if found else {},
            setting=_setting(case), note=f"no time: {why}", command=bench.command(key), seconds=seconds,
        )  # fmt: skip
    else:
        timed = plan.timed[label]
        yield timed_row(bench, case, timed, ceilings, seconds)
        if timed.against is not None:
            yield Row(
                f"{key}/against-reference", f"{case.op.name}: the reference (a) and the {timed.ready.how} (b) in turns",
                "info", timed.ready.evidence,
                values={**timed.against.values(), "verdict": timed.against.verdict, **_kernel(timed)},
                setting=_setting(case), command=bench.command(key),
            )  # fmt: skip


def timed_row(bench: Bench, case: OpCase, timed: Timed, ceilings: list[Ceiling], seconds: float) -> Row:
    """A case that is right, with its floor and its share of the ceiling; failed if that is above 100%."""
    from v4sdk_bench.speed.ceilings import floor_s, share

    key, ready = f"ops/{case.label}", timed.ready
    rounds = Sample(tuple(timed.seconds), 0.0, load())
    about: dict[str, Value] = {
        "error": ready.worst, "read_bytes": ready.cost.read_bytes, "write_bytes": ready.cost.write_bytes,
        "flops": ready.cost.flops, "how": ready.how, "in_cache": ready.in_cache,
    }  # fmt: skip
    row = Row(
        key, _what(case), judged(about, {"error": 1.0}), ready.evidence,
        values=about, limits={"error": 1.0}, setting={**_setting(case), "dtype": ready.dtype},
        command=bench.command(key), seconds=seconds,
    )  # fmt: skip
    speeds = rounds.values() | {"spread": rounds.spread, "load": load()} | _kernel(timed)
    del speeds["cpu_s"]
    floor, bound = floor_s(ready.cost, ceilings, ready.dtype, ready.in_cache)
    note = "in cache: memory bandwidth sets no floor" if ready.in_cache else ""
    if floor:
        try:
            of_ceiling = share(floor, rounds.median)
        except BenchError as exc:
            return replace(row, state="failed", note=f"{exc.message}; {exc.hint}")
        speeds |= {"floor_s": floor, "bound": bound, "share_of_ceiling": of_ceiling}
    return replace(row, values={**about, **speeds}, note=note)


def _kernel(timed: Timed) -> dict[str, Value]:
    if not timed.kernel_seconds:
        return {}
    rounds = Sample(tuple(timed.kernel_seconds), 0.0, load())
    return {"kernel_median_s": rounds.median, "kernel_low_s": rounds.low, "kernel_high_s": rounds.high}


def _kept(bench: Bench, case: OpCase) -> bool:
    """Measured by the part of this stage that ran before an interruption."""
    row = bench.record.row(f"ops/{case.label}")
    return row is not None and row.state == "ok"


def _what(case: OpCase) -> str:
    return f"{case.op.name}, {case.case.label}"


def _setting(case: OpCase) -> dict[str, Value]:
    caches = "emptied before each round" if case.real else "as the round before left them"
    return {"op": case.op.name, "case": case.case.label, "scale": case.case.scale, "caches": caches}


def _label(nodeid: str) -> str:
    return nodeid.partition("[")[2].removesuffix("]")


STAGES = (Stage("ops/speed", run, _QUICK_S, _FULL_S),)
