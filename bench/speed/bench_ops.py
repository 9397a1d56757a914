"""Time of every op on its own inputs, driven by pytest-benchmark.

    pytest --pyargs v4sdk_bench.speed.bench_ops                             the quick cases, as a table
    pytest --pyargs v4sdk_bench.speed.bench_ops -k "sparse_attn and flash"
    V4SDK_BACKEND=NAME pytest --pyargs v4sdk_bench.speed.bench_ops          another backend

A case is compared with its reference first; one that is wrong fails and has no time. `v4sdk bench run --suite ops` runs this file
too and puts floors and shares of the measured ceilings beside the times.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from v4sdk_bench.speed.op_cases import QUICK_LIMIT_BYTES, NotTimed, OpCase, Plan, Ready, chosen

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

PLAN = "v4sdk-op-plan"
_LEAST, _MOST = 5, 1000
_BUDGET_S = 0.2


def plan_of(config: pytest.Config) -> Plan:
    """The plan that was handed to this run of pytest, or the quick one of the chosen backend."""
    plan = config.pluginmanager.get_plugin(PLAN)
    if plan is None:
        from v4sdk import plugins
        from v4sdk.config import ModelConfig
        from v4sdk.loading import bundled_folder

        config_of_nano = ModelConfig.from_folder(bundled_folder())
        plan = Plan(plugins.select(None), config_of_nano, chosen(quick=True), _BUDGET_S, QUICK_LIMIT_BYTES)
        config.pluginmanager.register(plan, PLAN)
    assert isinstance(plan, Plan)
    return plan


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per op and case."""
    cases = plan_of(metafunc.config).cases
    metafunc.parametrize("subject", cases, ids=[c.label for c in cases])


def test_op(benchmark: BenchmarkFixture, subject: OpCase, request: pytest.FixtureRequest) -> None:
    """Judge a case, then time it; what it writes in place is put back outside the timed part."""
    plan = plan_of(request.config)
    # as the engine runs them
    with torch.inference_mode():
        try:
            ready = plan.ready(subject)
        except NotTimed as exc:
            # the suite records it as a row that was not run
            pytest.skip(f"{exc}; ends without --quick, or where there is more memory")
        _time(benchmark, plan, ready)


def _time(benchmark: BenchmarkFixture, plan: Plan, ready: Ready) -> None:
    began = time.perf_counter()
    # emptying the caches may take longer than the op
    ready.reset()
    ready.call()
    once = time.perf_counter() - began
    rounds = min(_MOST, max(_LEAST, math.ceil(plan.budget_s / max(once, 1e-7))))
    benchmark.group = ready.subject.op.name
    benchmark.extra_info.update(
        moved_bytes=ready.cost.bytes, flops=ready.cost.flops, how=ready.how, dtype=ready.dtype, in_cache=ready.in_cache
    )  # fmt: skip

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        ready.reset()
        return (), {}

    benchmark.pedantic(ready.call, setup=setup, rounds=rounds, warmup_rounds=1)  # type: ignore[no-untyped-call]
    # None where timing was switched off with --benchmark-disable
    if benchmark.stats is not None:
        plan.keep(ready, list(benchmark.stats.stats.data))
