"""Which processor this is: what stands behind results of evidence `device`."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from .kernels import Library
from .norm import Norm

_CPUINFO = Path("/proc/cpuinfo")
# as Linux names them on x86 and on Arm
_SIGNATURE = (
    "vendor_id", "cpu family", "model", "stepping", "microcode",
    "CPU implementer", "CPU part", "CPU variant", "CPU revision",
)  # fmt: skip
_ROUNDS = 5


def identity(library: Library, cpuinfo: Path = _CPUINFO) -> dict[str, str | float]:
    """Name the processor, its signature in place of a serial number (processors have none to read), system and level.

    Returns:
        `name`, `uuid` (vendor, family, model, stepping and microcode), `driver` (system and instruction level), and
        `kernel_s`: the best of a few runs of one small kernel.
    """
    facts = _first_processor(cpuinfo)
    signature = "-".join(facts[key] for key in _SIGNATURE if key in facts)
    return {
        "name": facts.get("model name", platform.processor() or platform.machine()),
        "uuid": signature or platform.machine(),
        "driver": f"{platform.system()} {platform.release()}, level {library.level}, {library.threads} threads",
        "kernel_s": _kernel_s(library),
    }


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    try:
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def _kernel_s(library: Library) -> float:
    norm, x, weight = Norm(library), torch.ones(64, 4096), torch.ones(4096)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        norm.rms_norm(x, weight, 1e-6, torch.float32)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
