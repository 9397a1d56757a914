"""What only a GPU can show beside the shared cases: a captured step equals the same step run by Python, and no kernel touches
memory that is not its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk import SamplingParams, Session
from v4sdk.backend import EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.numerics import FAST
from v4sdk.ops import OPS
from v4sdk.ops.op import Case
from v4sdk.testing.arguments import on_backend, tensors
from v4sdk.testing.conformance import DEFAULT_SCALES

PROMPTS = ("What is 3 + 4?", "Count from 1 to 9.")
# the exit status by which the tool says that it found something
FOUND = 86


def sanitizer() -> str | None:
    """The tool's path: on PATH, or of the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME")
    beside = shutil.which("compute-sanitizer", path=str(Path(home) / "bin")) if home else None
    return shutil.which("compute-sanitizer") or beside


@pytest.mark.usefixtures("gpu")
def test_a_captured_step_computes_what_the_step_computes(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7, top_logprobs=2)
    steps, record = list[Any](), type(cuda).record

    def noting(self: Any, step: Callable[[], None]) -> Callable[[], None]:
        steps.append(record(self, step))
        return steps[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(type(cuda), "record", noting)
    captured = written(cuda, params)
    # a step that is not captured computes the same too: this test would compare it with itself
    assert [step.reason for step in steps if step.reason is not None] == []
    assert any(step.graph is not None for step in steps)

    def as_it_is(self: Any, step: Callable[[], None]) -> Callable[[], None]:
        return step

    monkeypatch.setattr(type(cuda), "record", as_it_is)
    assert written(type(cuda)(), params) == captured


def written(backend: Any, params: SamplingParams) -> list[Any]:
    """Ids and log probabilities, bit for bit."""
    with Session.load(backend=backend) as session:
        answers = [session.chat([{"role": "user", "content": text}], params=params) for text in PROMPTS]
    return [(one.ids, one.logprobs) for one in answers]


REPEATS = 20


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_the_same_bits_whenever_its_programs_finish(name: str, cuda: Any) -> None:
    """Programs finish in another order on every run, and whoever comes last adds up what the others left."""
    op, config = OPS[name], ModelConfig.from_folder(bundled_folder())
    function = bind(cuda, config, EngineConfig(FAST, FAST.default_kv_format, cuda.capability())).table[op]
    for case in small(name):
        drawn = case.make(torch.device("cpu"))
        results = []
        for _ in range(REPEATS):
            given = on_backend(drawn, cuda)
            out = function(**given)
            results.append([t.cpu() for t in tensors((out, given))])
        for other in results[1:]:
            same = [torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True)]
            assert all(same), f"{name}/{case.label}"


def small(name: str) -> Iterator[Case]:
    """An op's small cases in the default numerics, or all of an op that has no numerics."""
    op = OPS[name]
    every = [case for case in (op.inputs() if op.inputs else ()) if case.scale in DEFAULT_SCALES]
    usual = [case for case in every if "fast" in case.label]
    yield from usual or every


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bytes: NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
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
