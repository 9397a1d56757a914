"""Every kernel at real size, compiled for every chip: it fits, keeps its values in registers, and stays within its budget.

Compiling needs a process whose kernels are not interpreted: one run of `python -m v4sdk_cuda.budget` serves all selected tests.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk.ops import OPS

HERE = Path(__file__).parent
BUDGET = HERE / "budget-triton-3.9.json"
ARCHS = (80, 89, 90, 100, 103, 120)

pytest.importorskip("triton", reason="Triton is not installed; it is a test dependency on Linux")


def with_kernel() -> set[str]:
    """The ops in the backend's table."""
    launch = importlib.import_module("v4sdk_cuda.launch").Launch
    target = importlib.import_module("v4sdk_cuda.target").described(90, "compiled")
    return {
        row.op.name
        for row in importlib.import_module("v4sdk_cuda.backend").table(launch(target, torch.device("cpu")))
    }


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the interpreter, on the packages that this process has."""
    package = importlib.import_module("v4sdk_cuda").__file__
    assert package is not None
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(package).parent.parent), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command found for the ops and chips of the selected tests."""
    wanted = [i.callspec.params for i in request.session.items if getattr(i, "originalname", "") == PER_OP]  # type: ignore[attr-defined]
    names = sorted({params["name"] for params in wanted} & with_kernel())
    archs = sorted({str(params["arch"]) for params in wanted})
    if not names:
        return {"rows": [], "failed": [], "moved": []}
    found = tmp_path_factory.mktemp("compiled") / "found.json"
    jobs = str(min(2, os.cpu_count() or 1))
    said = run("-m", "v4sdk_cuda.budget", "--op", ",".join(names), "--arch", ",".join(archs), "--jobs", jobs,
               "--check", str(BUDGET), "--json", str(found))  # fmt: skip
    if not found.exists():
        pytest.fail(f"the command failed: {said.stdout[-2000:]}{said.stderr[-2000:]}")
    print(said.stdout)
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPS)
def test_kernels_fit_their_chip_and_keep_their_budget(name: str, arch: int, compiled: dict[str, Any]) -> None:
    assert name in with_kernel(), f"`{name}` has no kernel in the backend's table"
    rows = [row for row in compiled["rows"] if (row["op"], row["arch"]) == (name, arch)]
    about = f"{name}: ", f" on {arch}: "
    wrong = [f"{row['kernel']}: {text} ({row['variant']})" for row in rows for text in row["wrong"]]
    wrong += [text for text in compiled["failed"] if text.startswith(f"{name}/") and f" on {arch}: " in text]
    wrong += [text for text in compiled["moved"] if text.startswith(about[0]) and about[1] in text]
    wrong += [text for text in compiled["moved"] if "is of Triton" in text]
    assert not wrong, "\n".join([*wrong, f"if that is meant: python -m v4sdk_cuda.budget --write {BUDGET}"])
    assert rows


PER_OP = test_kernels_fit_their_chip_and_keep_their_budget.__name__


def test_there_are_few_enough_variants_to_compile_on_every_change() -> None:
    budget = importlib.import_module("v4sdk_cuda.budget")
    ops = json.loads(BUDGET.read_text(encoding="utf-8"))["ops"]
    variants = {
        (k, v, a) for ks in ops.values() for k, vs in ks.items() for v, archs in vs.items() for a in archs
    }
    assert 0 < len(variants) <= budget.MOST_VARIANTS


@pytest.mark.parametrize(
    ("plant", "arch", "said"),
    [
        ("nothing", 90, ""),
        ("too much shared memory", 120, "197,632 bytes of shared memory, the chip has 101,376"),
        ("spills", 90, "loads and stores of spilled registers, expected none"),
        ("float32 where BF16 is expected", 90, "a 64 x 64 product of f32, expected one of bf16"),
        ("narrow loads", 90, "its widest load has 4 bytes, expected 16"),
    ],
)
def test_what_is_planted_is_said(
    plant: str, arch: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run(str(HERE / "planted.py"), plant, str(arch))
    assert result.returncode == 0, result.stderr
    assert (said in result.stdout) if said else not result.stdout.strip()


def variant(**changes: Any) -> Any:
    """A compiled variant that nothing is wrong with."""
    right = {
        "kernel": "k", "variant": "BM=128 warps=8 stages=3 ()", "arch": 90, "registers": 100, "stack_bytes": 0,
        "shared_bytes": 1 << 10, "instructions": {"HGMMA": 8, "LDG": 2}, "widest_load": 16, "dots": (("bf16", 128, 128),),
    }  # fmt: skip
    return importlib.import_module("v4sdk_cuda.compilation").Compiled(**right | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"instructions": {"HMMA": 8}}, ["matrix instructions HMMA for 128 rows, expected HGMMA|QGMMA"]),
        ({"instructions": {"FFMA": 8}}, ["matrix instructions none for 128 rows, expected HGMMA|QGMMA"]),
        ({"instructions": {"HMMA": 8}, "dots": (("bf16", 16, 64),)}, []),
        ({"instructions": {"HMMA": 8}, "arch": 100}, ["matrix instructions HMMA for 128 rows, expected UTC[A-Z]*MMA"]),
        ({"instructions": {"UTCHMMA": 8}, "arch": 103}, []),
        ({"instructions": {"HMMA": 8}, "arch": 120}, []),
        ({"instructions": {"STL": 1, "HGMMA": 1}}, ["1 loads and stores of spilled registers, expected none"]),
        ({"stack_bytes": 8}, ["8 bytes of stack, expected none"]),
        ({"shared_bytes": 233_000}, ["233,000 bytes of shared memory, the chip has 232,448"]),
        ({"widest_load": 8}, ["its widest load has 8 bytes, expected 16"]),
    ],
)  # fmt: skip
def test_a_variant_is_judged(changes: dict[str, Any], said: list[str]) -> None:
    target = importlib.import_module("v4sdk_cuda.target")
    made = variant(**changes)
    complaints = importlib.import_module("v4sdk_cuda.expected").complaints
    assert complaints(made, target.described(made.arch, "compiled"), True, False) == said


def test_exact_numerics_only_have_to_fit() -> None:
    complaints = importlib.import_module("v4sdk_cuda.expected").complaints
    target = importlib.import_module("v4sdk_cuda.target").described(90, "compiled")
    slow = variant(
        stack_bytes=64, dots=(("f32", 128, 128),), instructions={"FFMA": 1, "LDL": 1}, widest_load=4
    )
    assert complaints(slow, target, True, True) == []
    assert complaints(variant(shared_bytes=300_000), target, True, True) == [
        "300,000 bytes of shared memory, the chip has 232,448"
    ]


def test_spills_are_accepted_of_one_kernel_with_one_compiler() -> None:
    expected = importlib.import_module("v4sdk_cuda.expected")
    for (kernel, arch, version), reason in expected.SPILLS.items():
        assert reason
        target = importlib.import_module("v4sdk_cuda.target").described(arch, "compiled")
        spilt = {"kernel": kernel, "arch": arch, "stack_bytes": 8, "instructions": {"STL": 2, "HGMMA": 1}}
        assert not expected.complaints(variant(**spilt, triton=version), target, True, False)
        assert len(expected.complaints(variant(**spilt, triton="3.9"), target, True, False)) == 2


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([108, 11_000], []),
        ([109, 10_000], ["100 -> 109 registers"]),
        ([91, 10_000], ["100 -> 91 registers"]),
        ([100, 11_025], ["10,000 -> 11,025 bytes shared"]),
    ],
)
def test_a_budget_moves_only_when_somebody_says_so(now: list[int], said: list[str]) -> None:
    budget = importlib.import_module("v4sdk_cuda.budget")
    row = importlib.import_module("v4sdk_cuda.variants").Row
    committed = {"ops": {"linear": {"k": {"BM=16": {"90": [100, 10_000], "80": [1, 1]}}}}}
    rows = [row("linear", 90, "k", "BM=16", *now, (), 16, ("case",), ())]
    found = budget.differences(committed, rows, ["linear"], [90])
    assert [text.removeprefix("linear: k on 90: ").removesuffix(" (BM=16)") for text in found] == said


def test_variants_that_come_and_go_are_said() -> None:
    budget = importlib.import_module("v4sdk_cuda.budget")
    row = importlib.import_module("v4sdk_cuda.variants").Row
    committed = {
        "ops": {"linear": {"k": {"BM=16": {"90": [100, 10_000]}}}, "logits": {"k": {"BM=1": {"90": [1, 1]}}}}
    }
    rows = [row("linear", 90, "k", "BM=32", 90, 2048, (), 16, ("case",), ())]
    assert budget.differences(committed, rows, ["linear"], [90]) == [
        "linear: k on 90: gone (BM=16)",
        "linear: k on 90: new, 90 registers, 2,048 bytes shared (BM=32)",
    ]
