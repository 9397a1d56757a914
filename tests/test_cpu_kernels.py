"""The library of kernels: levels, threads, and results that depend on neither threads nor neighbours in a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk import Session, plugins
from v4sdk.errors import ConfigError
from v4sdk.ops import OPS
from v4sdk.testing.arguments import clone, is_bit_equal, tensors

BACKEND = plugins.select("cpu")


@pytest.fixture
def library() -> Any:
    found = import_module(type(BACKEND).__module__.rpartition(".")[0] + ".kernels").library()
    if found is None:
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    level, threads = found.level, found.threads
    yield found
    found.set_level(level)
    found.set_threads(threads)


def kernels() -> dict[str, Any]:
    return {row.op.name: row.function for row in BACKEND.kernels()}


def outcome(name: str, args: dict[str, Any]) -> list[torch.Tensor]:
    given = clone(args)
    result = kernels()[name](**given)
    return [*tensors(result), *(t for argument in OPS[name].mutates for t in tensors(given[argument]))]


@pytest.mark.parametrize("name", sorted(OPS))
def test_results_do_not_depend_on_threads(library: Any, name: str) -> None:
    cases = [case for case in OPS[name].inputs() if case.scale in ("tiny", "odd")]  # type: ignore[misc]
    for level in library.levels:
        library.set_level(level)
        for case in cases:
            args = case.make(torch.device("cpu"))
            found = []
            for threads in (1, 2, 5):
                library.set_threads(threads)
                found.append(outcome(name, args))
            for other in found[1:]:
                same = [is_bit_equal(a, b) for a, b in zip(found[0], other, strict=True)]
                assert all(same), f"{level}: {case.label}"


def rows_of(value: Any, count: int, size: int) -> Any:
    """The first `size` of `count` rows of everything that has a row per token."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count:
        return value[:size].clone()
    return value


@pytest.mark.parametrize(
    "name",
    ["linear", "rms_norm", "hc_pre", "hc_post_pre", "route", "routed_experts", "shared_expert", "logits"],
)
@pytest.mark.parametrize("size", [1, 2, 7, 31])
def test_a_row_of_a_batch_equals_the_row_in_a_smaller_batch(library: Any, name: str, size: int) -> None:
    """Up to 32 rows, whatever the others are: decode gives an answer the same logits alone and among others."""
    from v4sdk.numerics import FAST
    from v4sdk.ops import inputs
    from v4sdk.ops.inputs import TINY, Draw, Layout

    layout = Layout("batch", tuple(range(40, 72)), (1,) * 32)
    make = getattr(inputs, name)
    make = make(False) if name == "routed_experts" else make
    args = make(Draw(f"{name}-{size}", torch.device("cpu")), TINY, FAST, layout)
    few = {key: rows_of(value, 32, size) for key, value in args.items()}
    for level in library.levels:
        library.set_level(level)
        whole, part = outcome(name, args), outcome(name, few)
        assert all(is_bit_equal(a[:size], b) for a, b in zip(whole, part, strict=True)), level


def test_a_level_that_is_not_there_is_refused(library: Any) -> None:
    with pytest.raises(ConfigError, match=r"instruction level `sse9` is not available, this processor has"):
        library.set_level("sse9")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("V4SDK_CPU_LEVEL", "sse9", "instruction level `sse9` is not available"),
        ("V4SDK_CPU_THREADS", "0", "expected a number of threads from 1 to 1024"),
        ("V4SDK_CPU_THREADS", "many", "V4SDK_CPU_THREADS is `many`"),
        ("V4SDK_CPU_WEIGHTS", "sometimes", "expected auto, mapped or resident"),
        ("V4SDK_CPU_AFFINITY", "0-", "expected processors such as"),
        ("V4SDK_CPU_AFFINITY", "4000", "names processor 4000"),
    ],
)
def test_bad_settings_are_one_line(library: Any, variable: str, value: str, text: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "v4sdk", "run", "hello"],
        capture_output=True,
        text=True,
        env=os.environ | {variable: value},
    )
    assert found.returncode != 0
    assert text in found.stderr
    assert "Traceback" not in found.stderr


def test_another_version_s_arguments_are_refused(library: Any) -> None:
    import ctypes

    with pytest.raises(TypeError, match="it is of another version"):
        library.run("rms_norm", (ctypes.c_char * 3)())  # type: ignore[arg-type]


def test_a_closed_session_leaves_no_thread(library: Any) -> None:
    library.set_threads(3)
    library.rest()
    before = len(list(Path("/proc/self/task").iterdir()))
    with Session.load(backend="cpu") as session:
        session.generate("copy: 'red'")
        assert len(list(Path("/proc/self/task").iterdir())) > before
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_without_a_library_the_references_answer(tmp_path: Path) -> None:
    """As after an installation without a compiler."""
    missing = os.environ | {"V4SDK_CPU_LIBRARY": str(tmp_path / "none.so")}
    found = subprocess.run(
        [sys.executable, "-m", "v4sdk", "run", "What is 3 + 4?"], capture_output=True, text=True, env=missing
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "7"
    assert found.stderr.count("run the reference on cpu") == 1
    doctor = subprocess.run(
        [sys.executable, "-m", "v4sdk", "doctor"], capture_output=True, text=True, env=missing
    )
    assert "not built" in doctor.stdout


def test_a_team_of_another_size_for_a_while(library: Any) -> None:
    before = library.threads
    with plugins.select("cpu").with_threads(before + 2):
        assert library.threads == before + 2
    assert library.threads == before
