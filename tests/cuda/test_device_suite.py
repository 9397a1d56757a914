"""The device suite through the backend's own kernels at toy sizes: what will run on a GPU has run here before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from v4sdk_bench.device import experts, stack
from v4sdk_bench.record import Record
from v4sdk_bench.stage import Bench
from v4sdk_bench.suites import device

# a few ops of every stage: the whole suite takes a minute in the interpreter
ONLY = (
    "device/identity", "device/ceilings", "device/conformance/rms_norm", "device/conformance/route_hash",
    "device/op/rms_norm", "device/library", "device/experts", "device/stack",
)  # fmt: skip
RIGHT = (
    "device/conformance/rms_norm", "device/conformance/route_hash", "device/op/rms_norm/tiny-decode-fast",
    "device/experts/tiny/random/1", "device/experts/tiny/random/1/unfused", "device/experts/tiny/random/1/bf16",
    "device/stack/toy/1/40",
)  # fmt: skip


@pytest.mark.usefixtures("interpreter")
def test_the_device_suite_runs_at_toy_sizes_and_claims_no_time(
    cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_TOY_TOKENS", (1,))
    monkeypatch.setattr(stack, "_TOYS", ((1, 40),))
    record = Record("2026-01-01T00:00:00+00:00", "test", {}, {}, {})
    bench = Bench(cuda, record, tmp_path, tmp_path, quick=True, only=ONLY)
    for stage in device.STAGES:
        for row in stage.run(bench):
            record.add(row)
    rows = {row.key: row for row in record.rows}
    assert {key: rows[key].state for key in RIGHT} == dict.fromkeys(RIGHT, "ok")
    assert {rows[key].evidence for key in RIGHT} == {"emulated"}
    assert not [row.key for row in rows.values() if row.state == "failed"]
    assert not [(row.key, name) for row in rows.values() for name in row.values if name.endswith("_s")]
    libraries = [row for key, row in rows.items() if key.startswith("device/library/")]
    assert libraries
    assert all(row.state == "not run" and "needs a GPU to prove itself" in row.note for row in libraries)
