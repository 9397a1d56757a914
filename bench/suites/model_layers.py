"""Stage `model/layers`: single layers of V4-Flash and V4-Pro with drawn weights, beside their floors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.speed.timing import sample
from v4sdk_bench.stage import OUT_OF_TIME, Bench, BenchError
from v4sdk_bench.suites.model_rows import kernels, row_of

if TYPE_CHECKING:
    from v4sdk_bench.speed.real_shapes import LayerCase

_LAYER_S = {True: 4.0, False: 20.0}
_CEILINGS_S = {True: 3.0, False: 20.0}


def layers(bench: Bench) -> Iterator[Row]:
    """Single layers of V4-Flash and V4-Pro, beside their floors."""
    from v4sdk_bench.speed.ceilings import best
    from v4sdk_bench.speed.real_shapes import cases
    from v4sdk_bench.suites.ops import measure_ceilings

    wanted = [case for case in cases(bench.quick) if bench.wants(case.key)]
    if not wanted:
        return
    # those of the ops suite count too: the best of the run is the ceiling
    measure_ceilings(bench, _CEILINGS_S[bench.quick])
    measured: list[tuple[LayerCase, Row]] = []
    for case in wanted:
        if bench.left() < 0:
            yield not_run(
                case.key,
                _layer_name(case),
                OUT_OF_TIME,
                command=bench.command(case.key),
            )
            continue
        row = _layer_row(bench, case)
        if row.state == "ok":
            measured.append((case, row))
        yield row if row.state != "ok" else _with_floor(row, best(bench.record.ceilings))
    measure_ceilings(bench, _CEILINGS_S[bench.quick])
    for _, row in measured:
        yield _with_floor(row, best(bench.record.ceilings))


def _layer_name(case: LayerCase) -> str:
    step = "a decoded token" if case.tokens == 1 else f"{case.tokens} tokens read"
    return f"V4-{case.model.title()}: one {case.kind.upper()} layer, {step}"


def _layer_row(bench: Bench, case: LayerCase) -> Row:
    from v4sdk_bench.speed.real_shapes import ALIKE_LEAST, CONTEXT, OUTPUT_LIMIT, layer

    began = time.monotonic()
    setting: dict[str, Value] = {
        "shape": case.model, "kind": case.kind, "tokens": case.tokens, "context": CONTEXT, "state": "synthetic KV and weights",
        "numerics": "fast", "kv_format": "native",
    }  # fmt: skip
    try:
        found = layer(case, bench.backend, bench.say, bench.seed)
    except BenchError as exc:
        return not_run(
            case.key, _layer_name(case), exc.message, setting=setting, command=bench.command(case.key)
        )
    values: dict[str, Value] = {
        "relative_l2": found.relative_l2, "routed_alike_share": found.routed_alike, "finite": int(found.finite),
        "read_bytes": found.cost.read_bytes, "write_bytes": found.cost.write_bytes, "flops": found.cost.flops,
        "experts": found.experts, "weight_bytes": found.weight_bytes,
    }  # fmt: skip
    limits = {"relative_l2": OUTPUT_LIMIT, ">=routed_alike_share": ALIKE_LEAST, ">=finite": 1}
    if judged(values, limits) == "ok":
        bench.say(f"{case.key}: timing")
        # it ran before, for the comparison
        rounds = sample(found.step, _LAYER_S[bench.quick], least=3, warm=0)
        values |= {
            **rounds.values(),
            "spread": rounds.spread,
            "load": rounds.load,
            **kernels(bench, median=found.step),
        }
    row = row_of(bench, case.key, _layer_name(case), setting, values, limits=limits)
    return replace(row, seconds=round(time.monotonic() - began, 3))


def _with_floor(row: Row, ceilings: list[Any]) -> Row:
    """Put the floor and the share of the ceiling into a row; failed above 100%."""
    from v4sdk.ops.op import Cost
    from v4sdk_bench.speed.ceilings import floor_s, share

    values: dict[str, Any] = dict(row.values)
    floor, bound = floor_s(
        Cost(values["read_bytes"], values["write_bytes"], values["flops"]), ceilings, "bfloat16"
    )
    try:
        of_ceiling = share(floor, values["median_s"])
    except BenchError as exc:
        plain = (
            "relative_l2", "routed_alike_share", "finite", "read_bytes", "write_bytes", "flops", "experts", "weight_bytes",
        )  # fmt: skip
        return replace(
            row, state="failed", values={k: values[k] for k in plain}, note=f"{exc.message}; {exc.hint}"
        )
    return replace(row, values={**values, "floor_s": floor, "bound": bound, "share_of_ceiling": of_ceiling})
