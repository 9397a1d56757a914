"""The device suite: what only an accelerator can say about itself. On a host it says that there is none.

Its stages take at most ten minutes each. Where the device is emulated they run at toy sizes, with the same rows and no times: so
the script itself is proven before a device is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def _stage(name: str, quick_s: float) -> Stage:
    """A stage that is left out where the processor is the device: its speed is in other suites."""

    def run(bench: Bench) -> Iterator[Row]:
        if bench.backend.device.type == "cpu" and bench.backend.evidence != "emulated":
            return
        import importlib

        work: Callable[[Bench], Iterator[Row]] = importlib.import_module(f"v4sdk_bench.device.{name}").run
        yield from work(bench)

    return Stage(f"device/{_KEYS.get(name, name)}", run, quick_s, 600)


_KEYS = {"op_rows": "op", "libraries": "library"}
STAGES = (
    Stage("device/identity", identity, 5, 5),
    _stage("ceilings", 30),
    _stage("conformance", 180),
    _stage("op_rows", 180),
    _stage("libraries", 60),
    _stage("experts", 120),
    _stage("stack", 120),
)
