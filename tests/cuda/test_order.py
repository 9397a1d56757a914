"""Programs finish in any order: whoever arrives last adds up what the others left, and the program numbered first may be it.

The interpreter runs programs as they are numbered, so the last one always arrives last. Here it meets them the other way round.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS
from v4sdk.ops.op import Case
from v4sdk.testing import judge_case
from v4sdk.testing.conformance import DEFAULT_SCALES

# what adds up the results of several programs: every decode step; of the others one, should they come to do so
COUNTING = (
    "linear", "q_project", "kv_project_store", "compress", "index_query", "sparse_attn", "grouped_out", "route",
    "routed_experts", "shared_expert", "logits", "sample",
)  # fmt: skip


def cases(name: str) -> list[Case]:
    """Decode steps in the default numerics, or all cases of an op that has none."""
    given = OPS[name].inputs
    small = [case for case in (given() if given else ()) if case.scale in DEFAULT_SCALES]
    steps = [
        c for c in small if "decode" in c.label and "fast" in c.label and not c.label.startswith("mapped")
    ]
    return (steps or small) if name in COUNTING else (steps or small)[:1]


@pytest.fixture
def builder(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter's source of program numbers, which counts them down."""
    found = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    forwards = found.set_grid_idx

    def backwards(self: Any, *index: int) -> None:
        forwards(self, *(n - 1 - at for n, at in zip(self.grid_dim, index, strict=True)))

    monkeypatch.setattr(found, "set_grid_idx", backwards)
    return found


def test_programs_are_numbered_backwards(builder: Any) -> None:
    made = builder()
    made.set_grid_dim(2, 3, 1)
    made.set_grid_idx(0, 0, 0)
    assert made.grid_idx == (1, 2, 0)


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}/{case.label}") for name in OPS for case in cases(name)],
)
def test_a_result_is_right_whoever_arrives_last(name: str, case: Case, cuda: Any) -> None:
    asked, counters = list[int](), cuda.launch.counters

    def counting(count: int) -> torch.Tensor:
        asked.append(count)
        return counters(count)  # type: ignore[no-any-return]

    cuda.launch.counters = counting
    found = judge_case(OPS[name], case, cuda, ModelConfig.from_folder(bundled_folder()))
    assert found.how == "kernel", found.detail
    assert found.status in ("passed", "known gap"), found.detail
    assert asked or name not in COUNTING or case.label == "no-rows"
    # the next launch begins with the same counters
    assert not asked or not int(counters(max(asked)).count_nonzero())
