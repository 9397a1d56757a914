"""Apply every patch to a copy of the package and see that the tests it names fail: `python -m tests.mutations`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutations.table import KERNELS, ROWS, Patch

ROOT = Path(__file__).resolve().parent.parent.parent
# folder to the package it is imported as
_PACKAGES = {"v4sdk": "v4sdk", "backends/cuda": "v4sdk_cuda"}


@dataclass(frozen=True)
class Outcome:
    """What the tests said: how many ran, which failed, and the output."""

    failed: frozenset[str]
    passed: int
    output: str


def copy_packages(target: Path, patch: Patch | None) -> None:
    """Copy what may be patched below `target`, with the patch applied."""
    for folder, package in _PACKAGES.items():
        shutil.copytree(ROOT / folder, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    if patch:
        folder = next(f for f in _PACKAGES if patch.path.startswith(f"{f}/"))
        file = target / _PACKAGES[folder] / Path(patch.path).relative_to(folder)
        text = file.read_text(encoding="utf-8")
        if text.count(patch.old) != 1:
            raise SystemExit(f"patch `{patch.label}` no longer applies to {patch.file}")
        file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")


def run_tests(patch: Patch | None, tests: Sequence[str]) -> Outcome:
    """Run tests in a forked process against copies of the packages; torch is imported once, by the parent."""
    with tempfile.TemporaryDirectory() as scratch:
        copy_packages(Path(scratch), patch)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(scratch, list(tests), sender))
        child.start()
        sender.close()
        try:
            outcome: Outcome = receiver.recv()
        except EOFError:
            outcome = Outcome(frozenset(), 0, "the test process died")
        child.join()
    return outcome


def _child(scratch: str, tests: list[str], sender: Any) -> None:
    import pytest

    sys.path.insert(0, scratch)
    os.chdir(ROOT)
    failed: set[str] = set()
    passed = 0

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            nonlocal passed
            if report.failed:
                failed.add(report.nodeid)
            elif report.when == "call" and report.passed:
                passed += 1

        def pytest_sessionstart(self) -> None:
            # a run against the untouched packages would prove nothing
            for name in _PACKAGES.values():
                found = str(importlib.import_module(name).__file__)
                if not found.startswith(scratch):
                    raise pytest.UsageError(f"{name} was imported from {found}")

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main(
            ["-q", "--tb=line", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)], [Recorder()]
        )
    sender.send(Outcome(frozenset(failed), passed, output.getvalue()))


def names(failed: frozenset[str], wanted: Sequence[str]) -> list[str]:
    """Of the wanted tests (a file stands for any test in it), those that failed."""
    bare = {re.sub(r"^tests/", "", node) for node in failed}
    return [w for w in wanted if w in bare or any(b.startswith(f"{w}::") for b in bare)]


def main() -> int:
    """Run the table; 0 if every patch was noticed by every test it names."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="rows or patches whose text contains this")
    parser.add_argument("--jobs", type=int, default=1, help="test processes at a time (default: 1)")
    parser.add_argument(
        "--with", dest="extra", nargs="*", default=None, help="run these tests instead and list what fails"
    )
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    work = [
        (number, row.bug, patch)
        for number, row in enumerate((*ROWS, *KERNELS), 1)
        for patch in row.patches
        if options.only in f"{row.bug} {patch.label}"
    ]
    for number, row in enumerate(ROWS, 1):
        if not row.patches:
            print(f"{number:2d}  {row.bug}: does not apply, {row.reason}")
    if options.list:
        for number, bug, patch in work:
            print(f"{number:2d}  {bug}: {patch.label} ({patch.path}) <- {', '.join(patch.killed_by)}")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # noqa: F401  (imported before forking, so that children need not)

    used = sorted({name for _, _, patch in work for name in patch.killed_by})
    clean = run_tests(None, options.extra or used)
    if clean.failed or not clean.passed:
        print(clean.output)
        print("the tests fail without any patch")
        return 1
    print(f"without a patch {clean.passed} tests pass")
    return _kill(work, options.extra, options.jobs)


def _kill(work: list[tuple[int, str, Patch]], extra: list[str] | None, jobs: int) -> int:
    survived = 0
    begin = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda item: run_tests(item[2], extra or item[2].killed_by), work)
        for (number, bug, patch), outcome in zip(work, outcomes, strict=True):
            wanted = patch.killed_by
            noticed = sorted(outcome.failed) if extra else names(outcome.failed, wanted)
            complete = bool(noticed) and (extra is not None or len(noticed) == len(wanted))
            survived += not complete
            verdict = "killed  " if complete else "SURVIVED"
            print(
                f"{verdict} {number:2d}  {bug}: {patch.label} <- {', '.join(noticed) or 'nothing'}",
                flush=True,
            )
            if not complete:
                print(f"         expected {', '.join(wanted)}\n{outcome.output}", flush=True)
    print(f"{len(work) - survived} of {len(work)} patches killed in {time.monotonic() - begin:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
