"""The kernels through the vendor's compiler: the committed table is whole and of these sources; the compiler runs on demand."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILER = "V4SDK_ASCEND_COMPILER"
TABLE = Path(__file__).parent / "lowering.json"
AGAIN = "python -m v4sdk_ascend.kernels.lowering --compiler DIR --write tests/ascend/lowering.json"

lowering = importlib.import_module("v4sdk_ascend.kernels.lowering")
variants = importlib.import_module("v4sdk_ascend.kernels.variants")


@pytest.fixture
def table() -> dict[str, Any]:
    """The committed table."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def test_the_table_is_of_these_sources(table: dict[str, Any]) -> None:
    assert table["sources"] == variants.source_hash(), f"a kernel, a tile or a variant has changed: {AGAIN}"
    assert table["versions"] == {"triton-ascend": "3.2.0", "ascendnpu-ir": "1.2.0"}
    assert len(table["made"]) == len("2026-01-01")


def test_every_kernel_was_compiled_for_every_chip(table: dict[str, Any]) -> None:
    assert lowering.faults(table) == []
    found = [(row["kernel"], row["name"], row["chip"]) for row in table["rows"]]
    assert sorted(found) == sorted(
        (v.kernel, v.name, chip) for v in variants.VARIANTS for chip in variants.CHIPS
    )
    fitting = {(kernel, chip) for kernel, name, chip in found if variants.find(kernel, name).fits}
    refused = {(kernel, chip) for kernel, name, chip in found if not variants.find(kernel, name).fits}
    assert fitting == refused == {(kernel, chip) for kernel in variants.KERNELS for chip in variants.CHIPS}
    print(
        f"L5: {len(variants.KERNELS)} kernels x {len(variants.CHIPS)} chips, {len(found)} rows, made {table['made']}"
    )


def _not_finished(table: dict[str, Any]) -> str:
    row = next(r for r in table["rows"] if r["finished"])
    row["finished"], row["reason"] = False, "exit 1: planted"
    return "planted"


def _not_refused(table: dict[str, Any]) -> str:
    row = next(r for r in table["rows"] if not r["finished"])
    row["finished"], row["ub_bytes"] = True, 1
    return "was not refused"


def _refused_for_another_reason(table: dict[str, Any]) -> str:
    row = next(r for r in table["rows"] if not r["finished"])
    del row["needs_bytes"]
    return "was not refused for its memory"


def _too_large(table: dict[str, Any]) -> str:
    next(r for r in table["rows"] if r["finished"] and r["chip"] == "910C")["ub_bytes"] = (192 << 10) + 1
    return "of the unified buffer"


def _gone(table: dict[str, Any]) -> str:
    table["rows"].pop()
    return "not in the table"


@pytest.mark.parametrize(
    "change", [_not_finished, _not_refused, _refused_for_another_reason, _too_large, _gone]
)
def test_a_wrong_table_is_seen(table: dict[str, Any], change: Any) -> None:
    planted = copy.deepcopy(table)
    expected = change(planted)
    wrong = lowering.faults(planted)
    assert len(wrong) == 1
    assert expected in wrong[0]


def test_the_plan_is_read_from_the_module() -> None:
    module = """
    %c64_i64 = arith.constant 64 : i64
    %c0_i64 = arith.constant 0 : i64
    %9 = llvm.mlir.constant(4096 : i64) : i64
    %0 = hivm.hir.pointer_cast(%c64_i64) : memref<16x4xbf16, #hivm.address_space<ub>>
    %1 = hivm.hir.pointer_cast(%9) : memref<3xi1, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c0_i64) : memref<65536xf32, #hivm.address_space<gm>>
    """
    assert lowering.unified_buffer(module) == 4096 + 1


def test_a_folder_without_the_compiler_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "v4sdk_ascend.kernels.lowering", "--compiler", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    error, hint = run.stderr.splitlines()
    assert error.startswith(f"error: `{tmp_path}` has no `triton/backends/ascend")
    assert hint.startswith("hint: pip install --target DIR --no-deps triton-ascend==3.2.0")


def test_the_compiler_says_the_same(table: dict[str, Any]) -> None:
    folder = os.environ.get(COMPILER)
    if folder is None:
        pytest.skip(
            f"the vendor's compiler, 210 MB, is fetched by hand; ends where {COMPILER} names its folder"
        )
    made = lowering.lower(Path(folder))
    assert lowering.faults(made) == []
    assert {**made, "made": table["made"]} == table
