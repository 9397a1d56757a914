"""The GPU's own name: what a record needs before anything in it may be called measured."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROUNDS = 20
_NUMBERS = 1 << 24


def identity(device: int) -> Mapping[str, str | float]:
    """Name, UUID and driver of a GPU, and the median seconds of a small kernel that has just run on it, by events."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "uuid": f"GPU-{properties.uuid}",
        "driver": driver_version() or "unknown",
        "kernel_s": _kernel_seconds(device),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": float(properties.total_memory),
    }


def driver_version() -> str | None:
    """What the driver's own library says, e.g. `580.95.05`; None where it says nothing."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0:
        return None
    try:
        if library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) != 0:
            return None
        return text.value.decode() or None
    finally:
        library.nvmlShutdown()


def profiled(step: Callable[[], object]) -> Mapping[str, int]:
    """Run a step and count the kernels, copies and fills that the GPU ran for it, by name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    # the events of the host, of the same names, are there too
    return Counter(event.name for event in seen.events() or () if event.device_type.name == "CUDA")


def _kernel_seconds(device: int) -> float:
    values = torch.rand(_NUMBERS, device=torch.device("cuda", device))
    found: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(_ROUNDS):
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        values.mul_(1.0)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e-3)
    return sorted(found)[len(found) // 2]
