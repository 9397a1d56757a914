"""What only a GPU can show beside the shared cases: a captured step equals the same step run by Python, and no kernel touches
memory that is not its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from v4sdk import SamplingParams, Session
from v4sdk.ops import OPS

PROMPTS = ("What is 3 + 4?", "Count from 1 to 9.")
# the exit status by which the tool says that it found something
FOUND = 86


def sanitizer() -> str | None:
    """The tool's path: on PATH, or of the toolkit that CUDA_HOME names."""
    folders = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


@pytest.mark.usefixtures("gpu")
def test_a_captured_step_computes_what_the_step_computes(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7, top_logprobs=2)
    captured = written(cuda, params)

    def as_it_is(self: Any, step: Callable[[], None]) -> Callable[[], None]:
        return step

    monkeypatch.setattr(type(cuda), "record", as_it_is)
    assert written(type(cuda)(), params) == captured


def written(backend: Any, params: SamplingParams) -> list[Any]:
    """Ids and log probabilities, bit for bit."""
    with Session.load(backend=backend) as session:
        answers = [session.chat([{"role": "user", "content": text}], params=params) for text in PROMPTS]
    return [(one.ids, one.logprobs) for one in answers]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_stays_within_its_memory(op: str, tool: str) -> None:
    found = sanitizer()
    if found is None:
        pytest.skip(
            "compute-sanitizer is not installed; ends with a CUDA toolkit on PATH, or where CUDA_HOME names one"
        )
    words = [found, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "v4sdk"]
    done = subprocess.run(
        [*words, "conformance", "--backend", "cuda", "--op", op, "--scale", "tiny"],
        # memory that torch keeps for itself would hide an access past the end of a tensor
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
