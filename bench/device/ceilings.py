"""What the device can do at all: its memory, its matrix products, and the way from the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from v4sdk_bench.device.replayed import is_timed
from v4sdk_bench.record import Row, not_run
from v4sdk_bench.speed.ceilings import BUFFER_BYTES, DTYPES, measure
from v4sdk_bench.speed.timing import device_seconds
from v4sdk_bench.stage import Bench

_BUDGET_S = {True: 8.0, False: 40.0}
_LINK_ROUNDS = 10


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/ceilings/...`; the ceilings themselves go to the record, where every share finds them."""
    backend = bench.backend
    if not is_timed(bench):
        for name in ("memory", "products", "host-link"):
            yield not_run(
                f"device/ceilings/{name}", f"ceiling: {name}", f"`{backend.name}` is {backend.evidence} here: no times",
                command=bench.command(f"device/ceilings/{name}"),
            )  # fmt: skip
        return
    bench.say("ceilings: copy, read, matrix products of random numbers")
    found = measure(backend.device, backend.synchronize, _BUDGET_S[bench.quick], DTYPES)
    bench.record.ceilings += [asdict(one) for one in found]
    for one in found:
        key = f"device/ceilings/{one.name}"
        # a ceiling is a rate; its row names the time of one buffer or product by the device's clock
        seconds = (2 * one.buffer_bytes if one.name == "copy" else one.buffer_bytes) / one.value
        if one.unit == "flops_per_s":
            side = int(one.how.split(" ")[0])
            seconds = 2 * side**3 / one.value
        yield Row(
            key, f"ceiling: {one.name}", "info", backend.evidence,
            values={one.unit: one.value, f"low_{one.unit}": one.low, "kernel_once_s": seconds, "how": one.how},
            command=bench.command(key),
        )  # fmt: skip
    yield _link(bench)


def _link(bench: Bench) -> Row:
    """Pinned memory to the device and back."""
    device, nbytes = bench.backend.device, BUFFER_BYTES // 4
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    to = min(device_seconds(lambda: there.copy_(host, non_blocking=True), device, _LINK_ROUNDS))
    back = min(device_seconds(lambda: host.copy_(there, non_blocking=True), device, _LINK_ROUNDS))
    return Row(
        "device/ceilings/host-link", "ceiling: pinned main memory to the device and back", "info", bench.backend.evidence,
        values={
            "buffer_bytes": nbytes, "kernel_to_device_s": to, "kernel_from_device_s": back,
            "to_device_bytes_per_s": nbytes / to, "from_device_bytes_per_s": nbytes / back,
        },
        command=bench.command("device/ceilings/host-link"),
    )  # fmt: skip
