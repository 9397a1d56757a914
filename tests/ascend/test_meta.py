"""Every stock call with our shapes, by the vendor's own shape functions, for each family of chips: no value is computed."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

contract = importlib.import_module("v4sdk_ascend.contract").contract

# wrong calls that the vendor's shape functions take as if they were right: nothing but a device will notice these
UNCHECKED = {"npu.npu_rotary_mul", "npu.npu_mhc_post"}


@pytest.fixture(scope="session")
def facts(stand_in: Any, family: str, socs: dict[str, str]) -> Any:
    return stand_in.facts(socs[family], "facts.py", family)


def test_calls_with_our_shapes_are_accepted_and_wrong_ones_are_not(
    facts: Any, family: str, say: Callable[[str], None]
) -> None:
    wrong = [
        f"{model} {key}, {label}: {found}, not {expected}: {said}"
        for model, key, label, expected, found, said in facts["meta"]
        if found != expected
    ]
    assert not wrong, "\n".join(wrong)
    counts = Counter(row[4] for row in facts["meta"])
    say(
        f"L2, {family}: {len({row[1] for row in facts['meta']})} ops, {counts['accepted']} right calls accepted; wrong: "
        f"{counts['refused']} refused, {counts['shows']} seen in the result, {counts['unchecked']} not looked at by the vendor"
    )
    assert counts["refused"] >= 8


def test_every_row_has_a_right_call_and_a_wrong_one(facts: Any, family: str) -> None:
    rows = {key for key, call in contract().items() if call.pack == "stock" and family in call.chips}
    accepted = {row[1] for row in facts["meta"] if row[4] == "accepted"}
    noticed = {row[1] for row in facts["meta"] if row[4] in ("refused", "shows")}
    assert accepted == rows
    assert rows - noticed == UNCHECKED & rows


def test_every_argument_of_the_table_was_passed(facts: Any, family: str) -> None:
    for key, names in facts["passed"].items():
        assert set(names) == set(contract()[key].arguments(family)), key
