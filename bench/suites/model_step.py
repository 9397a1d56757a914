"""Stage `model/step`: the host's share of a decode step, kernels left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.speed.timing import percentile
from v4sdk_bench.stage import Bench, Stage

_KEY = "model/step/host"
_WHAT = "host time of one decoded token, V4-Flash's 43-layer schedule, kernels that do nothing"
_TOKENS = {True: 100, False: 1000}
_MOST_CALLS_PER_LAYER = 20


def step(bench: Bench) -> Iterator[Row]:
    """One row: seconds of this package per token, and native calls per layer."""
    from v4sdk_bench.speed.step_overhead import step_overhead

    command = bench.command(_KEY)
    found = step_overhead(bench.backend, _TOKENS[bench.quick])
    if found is None:
        yield not_run(_KEY, _WHAT, f"backend `{bench.backend.name}` has no empty kernels", command=command)
        return
    ordered = sorted(found.seconds)
    values: dict[str, Value] = {
        "host_s": statistics.median(ordered), "host_low_s": percentile(ordered, 0.1),
        "host_high_s": percentile(ordered, 0.9), "layers": found.layers,
    }  # fmt: skip
    limits: dict[str, float] = {}
    if found.calls is not None:
        values["calls_per_layer"] = found.calls / found.layers
        limits["calls_per_layer"] = _MOST_CALLS_PER_LAYER
    # time of the host around kernels that did nothing proves no kernel
    yield Row(
        _KEY, _WHAT, judged(values, limits), "reference", values=values, limits=limits,
        setting={"layers": found.layers, "recorded": found.calls is not None}, command=command,
    )  # fmt: skip


STAGE = Stage("model/step", step, 5.0, 10.0)
