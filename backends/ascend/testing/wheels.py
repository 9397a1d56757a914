"""A vendor's wheel in a private folder, never installed: fetched once, held against the hash of the committed table, unpacked."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import stub
from .schemas import Table, WheelError

FOLDER = "V4SDK_ASCEND_WHEELS"
_FETCHED_WITHIN = 300  # seconds


class OutOfReach(WheelError):
    """The package index cannot be reached, or does not have the wheel."""

    way_out = f"put the file into the folder that {FOLDER} names"


def folder() -> Path:
    """Where wheels are kept: what V4SDK_ASCEND_WHEELS names, or a folder of the user's cache."""
    named = os.environ.get(FOLDER)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "v4sdk" / "ascend-wheels"


def cannot_load(table: Table) -> str | None:
    """Why this Python cannot load a wheel of torch_npu, whose name says what it was built for; None if it can."""
    _, release, python, _, system = table.wheel.removesuffix(".whl").split("-")
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if sys.implementation.name != "cpython" or here != python:
        return f"{table.wheel} is for {python}, and this Python is {here}"
    machine = platform.machine()
    if not sys.platform.startswith("linux") or not system.endswith(machine):
        return f"{table.wheel} is for {system}, and this machine is {sys.platform} on {machine}"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    wanted, has = (re.findall(r"\d+", text)[:2] for text in (release, torch))
    return f"{table.wheel} is for torch {release}, and this is torch {torch}" if wanted != has else None


def fetch(table: Table, into: Path) -> Path:
    """The wheel of a table, downloaded if the folder does not have it.

    Raises:
        OutOfReach: it cannot be had. WheelError: what came is not the file that the table was made from.
    """
    file = into / table.wheel
    if not file.exists():
        _download(table, file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != table.sha256:
        raise WheelError(
            f"{file} has sha256 {found}, and {table.sha256} was expected",
            hint="delete the file; if it comes again so, make the table anew and read what changed",
        )
    return file


def _download(table: Table, file: Path) -> None:
    _, _, python, abi, system = table.wheel.removesuffix(".whl").split("-")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--implementation=cp", f"--python-version={python.removeprefix('cp')}", f"--abi={abi}",
            f"--platform={system}", "--retries=1", "--timeout=20", f"--dest={scratch}",
            f"{table.distribution}=={table.version}",
        ]  # fmt: skip
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=_FETCHED_WITHIN, check=False
            )
        except subprocess.TimeoutExpired:
            raise OutOfReach(f"{table.wheel} did not come within {_FETCHED_WITHIN} s") from None
        made = Path(scratch) / table.wheel
        if ran.returncode or not made.exists():
            lines = [
                line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("WARNING")
            ]
            raise OutOfReach(
                f"{table.wheel} cannot be fetched: {(lines or ['pip gave no reason'])[-1].strip()}"
            )
        made.replace(file)


def unpack(table: Table, into: Path) -> Path:
    """The folder with the unpacked wheel, beside the file; fetched and unpacked if need be.

    Raises:
        OutOfReach, WheelError: as `fetch`.
    """
    # the hash in the name: what lies there was made from that file and no other
    folder = into / f"{table.distribution}-{table.version}-{table.sha256[:12]}"
    with _kept(into):
        if not folder.exists():
            file = fetch(table, into)
            scratch = Path(tempfile.mkdtemp(dir=into))
            with zipfile.ZipFile(file) as archive:
                archive.extractall(scratch)
            _settle(scratch, folder)
    return folder


def stand_in(table: Table, into: Path) -> Path:
    """The folder with the link-time stand-in for CANN, built for the unpacked wheel if need be.

    Raises:
        StubError: it cannot be built here. OutOfReach, WheelError: as `fetch`.
    """
    wheel = unpack(table, into)
    made_by = hashlib.sha256(Path(stub.__file__).read_bytes() + version("torch").encode()).hexdigest()
    folder = into / f"stand-in-{table.sha256[:12]}-{made_by[:12]}"
    with _kept(into):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=into))
            try:
                stub.build(wheel, scratch)
            except stub.StubError:
                shutil.rmtree(scratch)
                raise
            _settle(scratch, folder)
    return folder


@contextmanager
def _kept(into: Path) -> Iterator[None]:
    """Say in a line why nothing can be kept in a folder."""
    try:
        yield
    except OSError as error:
        raise WheelError(
            f"wheels cannot be kept in {into}: {error.strerror}", hint=f"{FOLDER} names another folder"
        ) from error


def _settle(made: Path, folder: Path) -> None:
    """Give a folder its name; another process may have been first."""
    try:
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        if not folder.exists():
            raise
