"""Expert parallelism: which way is chosen and why, and every way over gloo with 2 and 4 processes against one process."""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import Nursery

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import EXACT, FAST, REFERENCE
from v4sdk.presets import V4_FLASH, V4_PRO

ep = importlib.import_module("v4sdk_ascend.ep")
HERE = Path(__file__).parent
SOC = {"910B": "Ascend910B3", "910C": "Ascend910_9382"}
SECONDS = 40.0
DISPATCH = ["npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2"]
MEGA = "cann_ops_transformer.npu_mega_moe"
FLOAT = replace(V4_FLASH, expert_dtype=None, quantization=None)


def present(*ways: str) -> Callable[[str, str], str | None]:
    """A dispatcher with the functions of some ways."""
    return lambda way, family: None if way in ways else f"{way} is not here"


def chosen(
    family: str, config: ModelConfig, processes: int, *ways: str, numerics: Any = FAST, **environ: str
) -> Any:
    """The plan for a chip with the functions of some ways."""
    return ep.plan(family, config, EngineConfig(numerics), processes, environ, present(*ways))


# --- the choice


def test_mega_moe_comes_first_and_dispatch_second() -> None:
    assert chosen("910C", FLOAT, 8, "mega_moe", "dispatch") == ep.Plan("mega_moe", 512)
    found = chosen("910C", FLOAT, 8, "dispatch")
    assert (found.way, found.passed_over) == ("dispatch", ("mega_moe: mega_moe is not here",))
    assert chosen("910C", FLOAT, 8) == ep.Plan(
        "all_to_all", 0, ("mega_moe: mega_moe is not here", "dispatch: dispatch is not here")
    )


@pytest.mark.parametrize(
    ("family", "config", "processes", "numerics", "reason"),
    [
        ("910C", FLOAT, 8, REFERENCE, "in an order of its own, and numerics are `reference`"),
        ("910C", FLOAT, 8, EXACT, "numerics are `exact`"),
        ("910C", FLOAT, 7, FAST, "256 experts do not divide among 7 ranks"),
        ("910B", replace(FLOAT, num_experts_per_tok=17), 8, FAST, "at most 16 are documented"),
    ],
)
def test_both_ways_of_the_vendor_refuse(
    family: str, config: ModelConfig, processes: int, numerics: Any, reason: str
) -> None:
    found = chosen(family, config, processes, "mega_moe", "dispatch", numerics=numerics)
    assert found.way == "all_to_all"
    assert len(found.passed_over) == 2
    assert all(reason in why for why in found.passed_over)


@pytest.mark.parametrize(
    ("family", "config", "processes", "reason"),
    [
        ("950", FLOAT, 8, "layout of the device's own"),
        ("910B", V4_FLASH, 8, "its integer matrices"),
        ("910B", replace(FLOAT, n_routed_experts=384), 3, "3 ranks, documented are 2, 4, 8, 16, 32"),
        ("910B", replace(FLOAT, hidden_size=4096 + 256), 8, "hidden size 4352"),
        ("910B", replace(FLOAT, moe_intermediate_size=512), 8, "experts of width 512"),
        ("910B", replace(FLOAT, n_routed_experts=512), 2, "256 experts on a rank"),
    ],
)
def test_mega_moe_is_refused(family: str, config: ModelConfig, processes: int, reason: str) -> None:
    found = chosen(family, config, processes, "mega_moe")
    assert reason in found.passed_over[0]


@pytest.mark.parametrize(
    ("family", "config", "processes", "environ", "reason"),
    [
        ("910B", V4_PRO, 8, {}, "rows of 7200 with their weights"),
        ("910C", replace(FLOAT, hidden_size=512), 8, {}, "from 1024 to 8192"),
        ("910B", replace(FLOAT, n_routed_experts=288), 9, {}, "groups of 9 ranks are not documented"),
        ("910C", V4_FLASH, 8, {"HCCL_BUFFSIZE": "10"}, "HCCL_BUFFSIZE=35 or more is wanted"),
    ],
)
def test_dispatch_is_refused(
    family: str, config: ModelConfig, processes: int, environ: dict[str, str], reason: str
) -> None:
    found = chosen(family, config, processes, "dispatch", **environ)
    assert reason in found.passed_over[1]


def test_dispatch_takes_as_many_tokens_as_the_buffer_holds() -> None:
    # 910C: 2 * (32 experts * 8 ranks * (64 more than 8,256 bytes, to 512) + 7 * (8,256 to 512)) bytes for a token
    each = 2 * (32 * 8 * 8704 + 7 * 8704)
    assert ep.buffer_bytes_per_token("910C", V4_FLASH, 8) == each
    assert chosen("910C", V4_FLASH, 8, "dispatch").tokens == (200 << 20) // each == 45
    assert chosen("910C", V4_FLASH, 8, "dispatch", HCCL_BUFFSIZE="8192").tokens == 512
    # 910B: 2 * 8 ranks * 6 experts * 8,256 bytes
    assert ep.buffer_bytes_per_token("910B", V4_FLASH, 8) == 2 * 8 * 6 * 8256
    assert chosen("910B", V4_FLASH, 8, "dispatch").tokens == 256
    assert chosen("910C", V4_PRO, 8, "dispatch").way == "dispatch"


def test_a_process_without_the_vendor_has_neither_way() -> None:
    for family in ("910B", "910C", "950"):
        for way in ("mega_moe", "dispatch"):
            assert ep.absent(way, family) is not None
        assert ep.plan(family, V4_FLASH, EngineConfig(FAST), 8).way == "all_to_all"


def test_unset_variables_are_named() -> None:
    assert [words.partition(":")[0] for words in ep.environment({"HCCL_OP_EXPANSION_MODE": "AIV"})] == [
        "HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_SOCKET_IFNAME",
    ]  # fmt: skip


def test_the_balance_rule_is_a_model() -> None:
    rows = {words: (round(ratio), hides) for words, ratio, hides in ep.balance()}
    assert all("model, not measurement" in words for words in rows)
    found = {
        (words.partition(" (")[0]): (ratio, hides["Pro"], hides["Flash"])
        for words, (ratio, hides) in rows.items()
    }
    assert found["ATLAS_800_A2_376T_64G, INT8, 196 GB/s"] == (3837, True, True)
    assert found["ATLAS_800_A3_752T_128G_DIE, INT8, 196 GB/s"] == (3837, True, True)
    assert found["ATLAS_800_A2_313T_64G, INT8, 196 GB/s"] == (3194, True, True)
    assert found["ATLAS_800_A2_376T_64G, INT8, 25 GB/s"] == (30080, False, False)
    assert found["ATLAS_350_425T_112G, FP8, 159 GB/s"] == (4755, True, False)
    assert found["ATLAS_350_425T_112G, FP4, 159 GB/s"] == (9509, False, False)


# --- the exchange, in processes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Processes that have imported torch."""
    made = Nursery()
    yield made
    made.close()


def _schemas() -> list[str]:
    """The vendor's own, of dispatch and combine."""
    text = (HERE / "schemas" / "torch-npu-2.13.0.json").read_text(encoding="utf-8")
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    names = tuple(f'"{key.removeprefix("npu.")}(' for key in DISPATCH)
    return [json.loads(line) for line in lines if line.startswith(names)]


def exchanged(nursery: Nursery, folder: Path, processes: int, **changes: Any) -> dict[str, Any]:
    """What the driver reports of one case."""
    case = {
        "way": "dispatch", "family": "910C", "numerics": "fast", "exact": True, "tokens": 13, "most": 4, "experts": 8,
        "hidden": 1024, "inner": 32, "planted": 0, "weak_rank": -1, "failing": "", "schemas": _schemas(),
        "plugin": str(HERE.parent.parent / "backends" / "ascend"), **changes,
    }  # fmt: skip
    assert len(case["schemas"]) == 2
    (folder / "case.json").write_text(json.dumps(case))
    script = (HERE / "ep_rank.py").read_text(encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(processes):
        environ = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1", "V4SDK_ASCEND_STUB_SOC": SOC[case["family"]],
        }  # fmt: skip
        out, err, status = (folder / f"{rank}.{name}" for name in ("out", "err", "status"))
        argv = ["rank", str(folder / "case.json")]
        ranks.append((nursery.start(script, argv, environ, out, err, status), err))
    for process, err in ranks:
        assert process.wait(SECONDS) == 0, err.read_text()
    found: dict[str, Any] = json.loads((folder / "0.out").read_text())
    return found


@pytest.mark.parametrize(
    ("processes", "family", "tokens"),
    [
        (2, "910B", 1), (2, "910B", 8), (2, "910C", 7), (2, "910C", 13), (2, "910C", 0), (4, "910B", 13), (4, "910C", 2),
        (4, "910C", 16),
    ],
)  # fmt: skip
def test_dispatch_brings_every_row_to_its_expert_and_back(
    nursery: Nursery, tmp_path: Path, processes: int, family: str, tokens: int
) -> None:
    found = exchanged(nursery, tmp_path, processes, family=family, tokens=tokens)
    assert found["equal"], found
    assert found["shape"] == [tokens, 1024]
    # longer than one call, it is v4sdk's own exchange: 13 tokens are, on 2 ranks of at most 4
    calls = 0 if tokens == 0 or tokens > 4 * processes else 2
    assert found["calls"] == DISPATCH * calls


def test_rows_counted_for_the_wrong_expert_are_seen(nursery: Nursery, tmp_path: Path) -> None:
    assert not exchanged(nursery, tmp_path, 2, tokens=5, planted=1)["equal"]


def promised(key: str) -> list[str]:
    """The arguments that the table says are passed."""
    return sorted(importlib.import_module("v4sdk_ascend.contract").contract()[key].arguments())


@pytest.mark.parametrize("family", ["910B", "910C"])
def test_dispatch_with_experts_is_the_op(nursery: Nursery, tmp_path: Path, family: str) -> None:
    found = exchanged(nursery, tmp_path, 4, family=family, exact=False)
    assert found["calls"] == DISPATCH * 2
    if family == "910B":
        # on 910C dispatch takes no weights
        assert found["passed"] == {key: promised(key) for key in DISPATCH}
    # each expert's row and their sum are rounded to BF16
    assert 0 < found["off"] <= 2**-7 * found["scale"]


@pytest.mark.parametrize("processes", [2, 4])
def test_reference_numerics_keep_every_bit(nursery: Nursery, tmp_path: Path, processes: int) -> None:
    # no way is named, so it is the one that the plan chooses
    found = exchanged(nursery, tmp_path, processes, way=None, numerics="reference", exact=False)
    assert (found["equal"], found["calls"]) == (True, [])


def test_mega_moe_is_the_op(nursery: Nursery, tmp_path: Path) -> None:
    found = exchanged(
        nursery, tmp_path, 2, way="mega_moe", exact=False, experts=4, inner=1024, tokens=9, most=2
    )
    assert found["passed"] == {MEGA: promised(MEGA)}
    # three calls of two tokens a rank, twice
    assert found["calls"] == [MEGA] * 6
    assert 0 < found["off"] <= 2**-7 * found["scale"]


def test_one_rank_that_cannot_decides_for_all(nursery: Nursery, tmp_path: Path) -> None:
    found = exchanged(nursery, tmp_path, 2, weak_rank=1, tokens=5)
    assert (found["equal"], found["calls"]) == (True, [])


@pytest.mark.parametrize("failing", DISPATCH)
def test_a_dispatch_that_fails_on_first_use_gives_way_to_our_own(
    nursery: Nursery, tmp_path: Path, failing: str
) -> None:
    found = exchanged(nursery, tmp_path, 2, failing=failing, tokens=5)
    assert (found["equal"], found["calls"]) == (True, [])
    assert found["tried"] == DISPATCH[: DISPATCH.index(failing)]


def test_a_mega_moe_that_fails_on_first_use_has_not_touched_the_experts(
    nursery: Nursery, tmp_path: Path
) -> None:
    found = exchanged(
        nursery,
        tmp_path,
        2,
        way="mega_moe",
        failing=MEGA,
        exact=False,
        experts=4,
        inner=1024,
        tokens=9,
        most=2,
    )
    assert (found["calls"], found["tried"]) == ([], [])
    assert found["off"] <= 2**-7 * found["scale"]


@pytest.mark.parametrize(("way", "calls"), [("dispatch", DISPATCH), ("mega_moe", [MEGA])])
def test_a_way_is_tried_before_it_is_taken(
    nursery: Nursery, tmp_path: Path, way: str, calls: list[str]
) -> None:
    found = exchanged(nursery, tmp_path, 2, way=way, exact=False, experts=4, inner=1024, tokens=5, most=4)
    assert found["tried"] == calls
