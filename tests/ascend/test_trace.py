"""L3: four layers of V4-Flash's shapes, traced through the vendor's wheel; the calls made are the contract's rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

contract = importlib.import_module("v4sdk_ascend.contract").contract
PACKS = ("stock", "transformer", "vendorpack")
# ops that no pack serves here, by pack at hand and family: what runs as parts on the chip's own tensors
PARTS = {
    ("stock", "910B"): {"hc_pre", "hc_post", "compress", "route", "route_hash"},
    ("stock", "910C"): {"hc_pre", "hc_post", "compress", "route", "route_hash"},
    ("stock", "950"): {"compress", "route", "route_hash"},
    ("transformer", "910B"): {"compress", "route", "route_hash"},
    ("transformer", "910C"): {"compress", "route", "route_hash"},
    ("transformer", "950"): {"compress", "route", "route_hash"},
    ("vendorpack", "910B"): set(),
    ("vendorpack", "910C"): set(),
    ("vendorpack", "950"): {"compress", "route", "route_hash"},
}


@pytest.fixture(params=PACKS)
def pack(request: pytest.FixtureRequest) -> str:
    """Each pack, alone or beside torch_npu."""
    return str(request.param)


@pytest.fixture
def traced(stand_in: Any, socs: Mapping[str, str]) -> Callable[[str, str], Any]:
    """What a forward on a family called, with one pack at hand."""
    return lambda family, pack: stand_in.facts(socs[family], "trace.py", family, pack)


def rows(pack: str, family: str) -> set[str]:
    """Rows that a step on a family must call, where a pack is at hand."""
    return {k for k, r in contract().items() if r.pack == pack and family in r.chips and r.use == "step"}


def differences(called: set[str], promised: set[str]) -> list[str]:
    """In both directions, in words."""
    return [f"{k} is called and has no row" for k in sorted(called - promised)] + [
        f"{k} has a row and is never called" for k in sorted(promised - called)
    ]


def test_calls_made_are_the_rows_of_the_contract(
    traced: Callable[[str, str], Any], family: str, pack: str, say: Callable[[str], None]
) -> None:
    found = traced(family, pack)
    called = {key for key in found["passed"] if contract()[key].pack == pack}
    assert not differences(called, rows(pack, family))
    strangers = {contract()[key].pack for key in found["passed"]} - {pack, "stock"}
    assert not strangers
    say(
        f"L3 {family} with {pack}: {len(called)} vendor calls recorded = {len(rows(pack, family))} rows of the contract"
    )


def test_each_provider_serves_without_failing(
    traced: Callable[[str, str], Any], family: str, pack: str
) -> None:
    runs = traced(family, pack)["runs"]
    # 950 also keeps rows in the native layout, from which its indexer has no call
    assert len(runs) == (3 if family == "950" else 2)
    for run in runs:
        assert not [why for _, passed in run.values() for why in passed if "failed on first use" in why]
    by = {op: by for op, (by, _) in runs[0].items()}
    assert {op for op, who in by.items() if who == "parts"} == PARTS[pack, family]


def test_every_argument_of_a_row_is_passed_somewhere(
    traced: Callable[[str, str], Any], socs: Mapping[str, str], pack: str
) -> None:
    passed: dict[str, set[str]] = {}
    for family in socs:
        for key, names in traced(family, pack)["passed"].items():
            passed.setdefault(key, set()).update(names)
    unused = {
        key: sorted(set(contract()[key].arguments()) - names)
        for key, names in passed.items()
        if contract()[key].pack == pack
    }
    assert not {key: names for key, names in unused.items() if names}


def test_a_row_too_many_and_a_row_too_few_are_noticed() -> None:
    promised = rows("stock", "910B")
    one = min(promised)
    assert differences(promised - {one}, promised) == [f"{one} has a row and is never called"]
    assert differences(promised, promised - {one}) == [f"{one} is called and has no row"]


def test_rows_that_no_step_calls_are_named_apart(say: Callable[[str], None]) -> None:
    apart = {k: r.use for k, r in contract().items() if r.use != "step"}
    assert set(apart.values()) == {"exchange", "declined"}
    say(f"L3 rows apart: {', '.join(f'{k} ({use})' for k, use in sorted(apart.items()))}")
