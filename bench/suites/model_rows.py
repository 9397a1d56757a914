"""What the rows of the suite `model` share: the model under test, evidence, kernel times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4sdk_bench.record import SPEED_ENDINGS, Row, Value, judged
from v4sdk_bench.speed.timing import Call, device_seconds
from v4sdk_bench.stage import Bench

BUNDLED = "v4-nano"
_KERNEL_ROUNDS = 10


@dataclass(frozen=True)
class Subject:
    """The model under test: its name in keys, its folder for loading, and what its rows must share with others'."""

    name: str
    folder: str | None
    setting: dict[str, Value]


def subject(bench: Bench) -> Subject:
    """Name the model and note it in the record."""
    from v4sdk.checkpoint import Checkpoint
    from v4sdk.loading import bundled_folder

    folder = bench.model or bundled_folder()
    name = BUNDLED if bench.model is None else Path(bench.model).resolve().name
    with Checkpoint(folder) as checkpoint:
        about = {"fingerprint": checkpoint.fingerprint(), "bytes": checkpoint.nbytes}
        layers, hidden = checkpoint.config.num_hidden_layers, checkpoint.config.hidden_size
    bench.record.models[name] = {
        **bench.record.models.get(name, {}),
        **about,
        "layers": layers,
        "hidden": hidden,
    }
    return Subject(
        name, str(bench.model) if bench.model else None, {"model": name, "fingerprint": about["fingerprint"]}
    )  # fmt: skip


def kernels(bench: Bench, **steps: Call) -> dict[str, Value]:
    """Medians on the device's own clock; nothing on a host or an emulation."""
    if bench.backend.evidence != "device":
        return {}
    device = bench.backend.device
    return {
        f"kernel_{name}_s": statistics.median(device_seconds(step, device, _KERNEL_ROUNDS))
        for name, step in steps.items()
    }


def evidence(bench: Bench, values: Mapping[str, Value]) -> Any:
    """The backend's word; times of the host around a device, such as loading, prove no kernel and do not carry it."""
    timed = any(name.endswith(SPEED_ENDINGS) for name in values)
    kernels = any(name.startswith("kernel") and name.endswith("_s") for name in values)
    return (
        "compiled" if bench.backend.evidence == "device" and timed and not kernels else bench.backend.evidence
    )


def row_of(
    bench: Bench, key: str, what: str, setting: dict[str, Value], values: dict[str, Any],
    limits: dict[str, float] | None = None, note: str = "",
) -> Row:  # fmt: skip
    """A row, judged by its limits, with evidence, command and seed; a failed one keeps no speeds."""
    state = judged(values, limits or {})
    if state == "failed":
        values = {name: value for name, value in values.items() if not name.endswith(SPEED_ENDINGS)}
    return Row(
        key, what, state, evidence(bench, values), values=values, limits=limits or {}, setting=setting, note=note,
        command=bench.command(key), seed=bench.seed,
    )  # fmt: skip
