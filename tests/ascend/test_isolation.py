"""With the vendor's wheel on the path, nothing loads it that was not asked for Ascend: torch would, by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from v4sdk.loading import bundled_folder

# the last line says which modules of the vendor are loaded, and how the command ended
RUN = """
import sys
from v4sdk.cli import main
sys.argv = ["v4sdk", *sys.argv[1:]]
try:
    status = main()
except SystemExit as end:
    status = end.code
print("loaded:", sorted(name for name in sys.modules if name.split(".")[0] == "torch_npu")[:1], "status:", status or 0)
"""


def run(stand_in: Any, code: str, *arguments: str, cann: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a child where torch may load extensions by itself, as on a user's machine; without CANN, loading raises."""
    environment = stand_in.environment("Ascend910B3")
    del environment["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    if not cann:
        del environment["LD_LIBRARY_PATH"]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


QUESTION = ("--max-tokens", "4", "What is 3 + 4?")


@pytest.mark.parametrize(
    ("command", "cann"),
    [
        (("backends",), True),
        (("doctor",), True),
        (("doctor", "--backend", "cpu"), True),
        (("convert", "SOURCE", "TARGET", "--for", "ascend-w8a8"), True),
        (("run", "--backend", "cpu", *QUESTION), True),
        # an NPU is to be seen, and still it is not what runs unasked
        (("run", *QUESTION), True),
        (("run", "--backend", "cpu", *QUESTION), False),
    ],
    ids=["backends", "doctor", "doctor-cpu", "convert", "run", "run-unasked", "run-without-cann"],
)
def test_commands_for_other_backends_leave_it_alone(
    stand_in: Any, tmp_path: Path, command: tuple[str, ...], cann: bool
) -> None:
    places = {"SOURCE": str(bundled_folder()), "TARGET": str(tmp_path / "converted")}
    ran = run(stand_in, RUN, *(places.get(word, word) for word in command), cann=cann)
    assert ran.stdout.splitlines()[-1:] == ["loaded: [] status: 0"], ran.stdout[-2000:] + ran.stderr[-4000:]


def test_torch_would_have_loaded_it(stand_in: Any) -> None:
    ran = run(stand_in, "import sys, torch; print('torch_npu' in sys.modules)")
    assert ran.stdout.splitlines()[-1:] == ["True"], ran.stderr[-2000:]
    ran = run(stand_in, "import torch", cann=False)
    assert ran.returncode != 0
    assert "libhccl.so" in ran.stderr
