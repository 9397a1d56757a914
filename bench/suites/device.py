"""The device suite: what only an accelerator can say about itself. On a host it says that there is none."""

from __future__ import annotations

from collections.abc import Iterator

from v4sdk_bench.record import Row, not_run
from v4sdk_bench.stage import Bench, Stage

_WHAT = "the accelerator names itself: model, UUID, driver"


def identity(bench: Bench) -> Iterator[Row]:
    """One row with the device's name and the time of one kernel; every row of evidence `device` rests on it."""
    command = f"v4sdk bench run --suite device --backend {bench.backend.name}"
    found = bench.backend.identity()
    if found is None:
        where = f"backend `{bench.backend.name}` computes on this machine's {bench.backend.device.type}"
        yield not_run(
            "device/identity", _WHAT, f"{where}; its speed is in the suites ops and model", command=command
        )
        return
    bench.record.device = dict(found)
    yield Row("device/identity", _WHAT, "info", bench.backend.evidence, dict(found), command=command)


STAGES = (Stage("device/identity", identity, 5, 5),)
