"""The emulated vendor kernels: each against numbers worked out by hand, and what each refuses; none of it ran on an NPU."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest
import torch
from ascend.conftest import INSIDE, SCHEMAS

contract = importlib.import_module("v4sdk_ascend.contract").contract
packs = importlib.import_module("v4sdk_ascend.testing.emulators.libraries")


FILES = ("emulated_streams.py", "emulated_attention.py", "emulated_experts.py", "refused.py")


def test_kernels_give_what_was_worked_out_by_hand_and_refuse_what_is_not_documented(
    stand_in: Any, socs: dict[str, str], family: str
) -> None:
    # one child for all: most of its time is the vendor's import
    rest = [str(INSIDE / file) for file in FILES[1:]]
    assert stand_in.pytest(socs[family], FILES[0], *rest)["passed"] >= 120


@pytest.mark.parametrize("family", ["910B", "910C"])
def test_two_ranks_exchange_rows(stand_in: Any, socs: dict[str, str], family: str) -> None:
    first, second = stand_in.facts(socs[family], "two_ranks.py", PYTHONPATH=_path(stand_in, socs[family]))
    # rows of experts 0 and 1 on rank 0, of 2 and 3 on rank 1; token t with experts a, b: t * (a + 1) + 10 * t * (b + 1)
    assert first["exchange"] == [2, 2, 1 * 1 + 10 * 1 * 4, 2 * 3 + 10 * 2 * 2]
    assert second["exchange"] == [2, 2, 3 * 2 + 10 * 3 * 1, 4 * 4 + 10 * 4 * 3]
    if family == "910C":
        # 1 * (x * 1) + 2 * (x * 4): x 0.25 and 0.5; every rank's token goes to experts 0 and 3
        assert first["one call"] == pytest.approx([2, 0, 2.25], rel=5e-3)
        assert second["one call"] == pytest.approx([0, 2, 4.5], rel=5e-3)


def _path(stand_in: Any, soc: str) -> str:
    """The path of a child that imports from tests without pytest."""
    return f"{stand_in.environment(soc)['PYTHONPATH']}:{__file__.rsplit('/', 2)[0]}"


def spelt(schema: str) -> str:
    """A schema as torch prints it, without the names of results and marks of what is written."""
    found = str(torch._C.parse_schema(re.sub(r"Tensor(\(\w+!\)|!)", "Tensor", schema)))
    arguments, results = found.rsplit(" -> ", 1)
    unnamed = re.sub(r"(Tensor) \w+", r"\1", results)
    return f"{arguments} -> {unnamed}"


def test_the_other_packs_schemas_are_those_of_its_wheel() -> None:
    names = {s.split("(")[0] for s in packs.schemas("_C_ascend")}
    assert names == {row.name for row in contract().values() if row.namespace == "_C_ascend"}
    wheel = json.loads((SCHEMAS / "vllm-ascend-0.23.0.json").read_text(encoding="utf-8"))["schemas"]
    known = {spelt(s) for s in wheel if s.split("(")[0] in names}
    missing = [s for s in packs.schemas("_C_ascend") if spelt(s) not in known]
    assert not missing, "\n".join(missing)
