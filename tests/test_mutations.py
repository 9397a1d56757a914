"""The table of shipped bugs stays true: every patch still applies, and the tests it names exist."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_table() -> Any:
    spec = importlib.util.spec_from_file_location(
        "mutation_table", Path(__file__).parent / "mutations" / "table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TABLE = load_table()
PATCHES = [
    pytest.param(patch, id=f"{row.bug[:30]}: {patch.label}")
    for row in (*TABLE.ROWS, *TABLE.KERNELS)
    for patch in row.patches
]


def test_every_bug_of_the_list_is_a_patch_or_has_its_reason() -> None:
    assert len(TABLE.ROWS) == 19
    assert all(bool(row.patches) != bool(row.reason) for row in TABLE.ROWS)


@pytest.mark.parametrize("patch", PATCHES)
def test_patch_applies_and_compiles(patch: Any) -> None:
    text = (ROOT / patch.path).read_text(encoding="utf-8")
    assert text.count(patch.old) == 1
    compile(text.replace(patch.old, patch.new), patch.file, "exec")


@pytest.mark.parametrize("patch", PATCHES)
def test_tests_that_notice_a_patch_exist(patch: Any) -> None:
    assert patch.killed_by
    for name in patch.killed_by:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}" in (ROOT / "tests" / file).read_text(encoding="utf-8")
