"""The vendor's real wheel, in child processes where CANN is replaced by a link-time stand-in: nothing here ran on an NPU.

What needs the wheel lies in `inside` and runs in a child, one per chip: `stand_in.facts` gives what a script printed, and
`stand_in.pytest` runs a file of tests there. Without the wheel these tests are skipped, with the reason, and none of them passes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SCHEMAS = HERE / "schemas"
INSIDE = HERE / "inside"
SOCS = {"910B": "Ascend910B3", "910C": "Ascend910_9382", "950": "Ascend950PR"}
# the release whose torch is the one that the tests run with
VERSION = "2.13.0"

_PLUGIN = HERE.parent.parent / "backends" / "ascend"


def _testing(name: str) -> Any:
    """A module of `v4sdk_ascend.testing`, which the wheel of v4sdk leaves out: it comes from the checkout."""
    plugin = importlib.import_module("v4sdk_ascend")
    if str(_PLUGIN) not in plugin.__path__:
        plugin.__path__.append(str(_PLUGIN))
    return importlib.import_module(f"v4sdk_ascend.testing.{name}")


stub = _testing("stub")
wheels = _testing("wheels")
_schemas = _testing("schemas")

# tests that only a child with the stand-in can run
collect_ignore = [] if stub.SOC in os.environ else ["inside"]


_SAID: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was counted: a run that looked at nothing must not read like one that did."""
    if _SAID:
        terminalreporter.section("Ascend, without an NPU")
        for line in _SAID:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def say() -> Callable[[str], None]:
    """Puts a line into the summary at the end of the run."""
    return _SAID.append


@dataclass(frozen=True)
class StandIn:
    """Runs children that see the vendor's wheel and one chip.

    Attributes:
        wheel: folder with the unpacked wheel. libraries: folder with the stand-in for CANN. source: on the path of children, has
            the plugin as it is in this checkout.
    """

    wheel: Path
    libraries: Path
    source: Path
    known: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def environment(self, soc: str, count: int = 1, **more: str) -> dict[str, str]:
        """Variables of a child; `more` are set last."""
        base = {name: value for name, value in os.environ.items() if not name.startswith("V4SDK_ASCEND_")}
        # torch_npu refuses to load where torch already has another accelerator
        base |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": self._path(base)}
        return {**stub.environment(self.wheel, self.libraries, soc, count, base), **more}

    def _path(self, base: Mapping[str, str]) -> str:
        return os.pathsep.join(filter(None, (str(self.source), base.get("PYTHONPATH"))))

    def python(
        self, soc: str, *arguments: str, count: int = 1, timeout: float = 600, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments (`"-c", code`, a file, `"-m", "v4sdk", "run"`), whatever its exit status."""
        return subprocess.run(
            [sys.executable, *arguments], env=self.environment(soc, count, **more), capture_output=True, text=True,
            # away from the checkout, so that what is installed is what runs
            timeout=timeout, check=False, cwd=self.source,
        )  # fmt: skip

    def facts(self, soc: str, script: str, *arguments: str, **more: str) -> Any:
        """What a script of `inside` printed as JSON on its last line; it runs once for all tests that ask the same."""
        key = (soc, script, *arguments, *(f"{k}={v}" for k, v in sorted(more.items())))
        if key not in self.known:
            ran = self.python(soc, str(INSIDE / script), *arguments, **more)
            assert ran.returncode == 0, (
                f"{script} as {soc} ended with {ran.returncode}:\n{ran.stderr[-4000:]}"
            )
            self.known[key] = json.loads(ran.stdout.splitlines()[-1])
        return self.known[key]

    def pytest(
        self, soc: str, file: str, *arguments: str, timeout: float = 600, **more: str
    ) -> dict[str, int]:
        """Run a file of tests of `inside`; fails as it does. Returns how many passed, were skipped, .., by pytest's own words."""
        command = ("-m", "pytest", str(INSIDE / file), "-q", "-p", "no:cacheprovider", *arguments)
        ran = self.python(soc, *command, timeout=timeout, **more)
        tail = ran.stdout.strip().splitlines()[-1:] or [""]
        _SAID.append(f"{file} as {soc}: {tail[0].strip('= ')}")
        assert ran.returncode == 0, f"{file} as {soc}:\n{ran.stdout[-8000:]}\n{ran.stderr[-2000:]}"
        return {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", tail[0])}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _tables() -> tuple[Any, ...]:
    return tuple(sorted(_schemas.load(SCHEMAS), key=lambda t: (t.distribution, _release(t.version))))


@pytest.fixture(scope="session")
def schemas() -> Any:
    """The module that reads schemas."""
    return _schemas


@pytest.fixture(scope="session")
def tables() -> tuple[Any, ...]:
    """The committed tables, oldest release first."""
    return _tables()


@pytest.fixture(scope="session")
def release() -> Callable[[str], tuple[int, ...]]:
    """The numbers of a version, in order: what versions are compared by."""
    return _release


@pytest.fixture(scope="session")
def socs() -> Mapping[str, str]:
    """A chip of each family, by the name its driver gives."""
    return SOCS


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """The vendor's wheel behind the stand-in for CANN; the test is skipped where one of them cannot be had."""
    table = next(t for t in _tables() if (t.distribution, t.version) == ("torch-npu", VERSION))
    reason = wheels.cannot_load(table)
    if reason is not None:
        pytest.skip(f"the vendor's wheel was not looked at: {reason}; ends where it can be loaded")
    into = wheels.folder()
    try:
        wheel, libraries = wheels.unpack(table, into), wheels.stand_in(table, into)
    except (wheels.OutOfReach, stub.StubError) as error:
        pytest.skip(f"the vendor's wheel was not looked at: {error}; ends where it can be had ({error.hint})")
    source = tmp_path_factory.mktemp("plugin")
    (source / "v4sdk_ascend").symlink_to(_PLUGIN)
    return StandIn(wheel, libraries, source)


@pytest.fixture(scope="session", params=list(SOCS))
def family(request: pytest.FixtureRequest) -> str:
    """Each family of chips."""
    return str(request.param)
