"""Runs a command as on a chip that is not there: the vendor's wheel, a stand-in for CANN, and its functions computed on the CPU.

    python -m v4sdk_ascend.testing.run --soc Ascend910B3 -- v4sdk doctor --backend ascend

It fetches the wheel (42 MB) on first use. What it prints is emulated: nothing of it ran on an NPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from v4sdk.errors import V4Error

from ..chip import CHIPS, by_name
from ..probe import EMULATE_VARIABLE
from . import stub, wheels
from .schemas import WheelError, load

# beside this plugin in a checkout; a table names the wheel that it was made from
TABLES = Path(__file__).resolve().parents[3] / "tests" / "ascend" / "schemas"


def variables(soc: str, tables: Path = TABLES, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a command that sees one emulated chip.

    Raises:
        V4Error: the chip is unknown, or the wheel or its stand-in cannot be had.
    """
    if by_name(soc) is None:
        known = ", ".join(chip.name for chip in CHIPS)
        raise V4Error(f"SoC `{soc}` is unknown, expected one of {known}", hint="--soc Ascend910B3")
    usable = [t for t in load(tables) if t.distribution == "torch-npu" and wheels.cannot_load(t) is None]
    if not usable:
        raise WheelError(
            f"{tables} has no table of a torch_npu that this Python and this torch can load",
            hint="use the torch release of one of them, or run it from a checkout",
        )
    into = wheels.folder()
    wheel, libraries = wheels.unpack(usable[-1], into), wheels.stand_in(usable[-1], into)
    return {**stub.environment(wheel, libraries, soc, base=base), EMULATE_VARIABLE: "1"}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status of what it ran."""
    parser = argparse.ArgumentParser(prog="python -m v4sdk_ascend.testing.run", description=__doc__)
    parser.add_argument("--soc", default="Ascend910B3", help="the chip, as its driver would name it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("expected a command after --")
    # `v4sdk` of this very environment, where it is not on the path
    if command[0] == "v4sdk" and shutil.which("v4sdk") is None:
        command = [sys.executable, "-m", *command]
    try:
        environment = variables(given.soc, base=os.environ)
    except V4Error as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        print(f"error: `{command[0]}` cannot be run: {error.strerror}", file=sys.stderr)
        print("hint: after -- comes a command, as in -- v4sdk doctor --backend ascend", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
