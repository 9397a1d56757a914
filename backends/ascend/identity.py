"""The NPU's own name and clock: what a record needs before anything in it may be called measured."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .probe import VISIBLE_VARIABLE, Device, Machine

_ROUNDS = 20
_NUMBERS = 1 << 24
_SMI_TIMEOUT_S = 10


def identity(device: Device, machine: Machine) -> Mapping[str, str | float]:
    """Name, UUID, driver and versions of an NPU, and the median seconds of a small kernel that has just run on it, by events."""
    devices = torch.get_device_module("npu")
    values = torch.rand(_NUMBERS, device=torch.device("npu", device.index))
    return {
        "name": device.name,
        "uuid": uuid(devices, device.index) or "unknown",
        "driver": machine.driver or "unknown",
        "kernel_s": seconds(devices, lambda: values.mul_(1.0)),
        "soc_code": float(device.code),
        "torch_npu": device.torch_npu,
        "cann": device.cann or machine.cann or "unknown",
        "memory_bytes": float(device.memory[1]) if device.memory else 0.0,
    }


def uuid(devices: Any, index: int) -> str | None:
    """The device's UUID by torch_npu, which has it from 2.13 on; else its die's or board's number by npu-smi; else None.

    Args:
        devices: `torch.npu`. index: of the device among those that this process sees.
    """
    said = getattr(devices.get_device_properties(index), "uuid", None)
    if said is not None and str(said).strip("0-"):
        return f"NPU-{said}"
    place = _card_and_chip(index)
    if place is None:
        return None
    card, chip = place
    # a card of two chips has one serial number, so that alone it would name both
    for about, wanted, suffix in ((("-c", chip), "VDie ID", ""), ((), "Serial Number", f"-{chip}")):
        said = _smi("-t", "board", "-i", card, *about)
        found = re.search(rf"^\s*{wanted}\s*:\s*(\S.*?)\s*$", said, re.MULTILINE)
        if found and found[1].strip("0- ") not in ("", "NA", "N/A"):
            return f"NPU-{'-'.join(found[1].split())}{suffix}"
    return None


def _card_and_chip(index: int) -> tuple[str, str] | None:
    """What npu-smi calls a device of this process: the variable picks among the host's devices, a card has one chip or two."""
    visible = os.environ.get(VISIBLE_VARIABLE)
    listed = [one.strip() for one in visible.split(",")] if visible else None
    if listed is not None and (index >= len(listed) or not listed[index].isdecimal()):
        return None
    wanted = index if listed is None else int(listed[index])
    # NPU ID, Chip ID, Chip Logic ID, ..; a chip that computes nothing has `-` for the last
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s", _smi("-m"), re.MULTILINE)
    return next(((card, chip) for card, chip, logic in rows if int(logic) == wanted), None)


def _smi(*arguments: str) -> str:
    """What `npu-smi info` prints; nothing where there is none."""
    try:
        ran = subprocess.run(
            ["npu-smi", "info", *arguments],
            capture_output=True,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout


def seconds(devices: Any, work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Median seconds of a piece of work by the device's own clock.

    Args:
        devices: `torch.npu`. work: starts kernels on the current stream.
    """
    found: list[float] = []
    for _ in range(rounds):
        start, end = (devices.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        # events count in milliseconds
        found.append(start.elapsed_time(end) * 1e-3)
    return sorted(found)[len(found) // 2]
