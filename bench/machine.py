"""Where and when numbers were measured: the head of every record."""

from __future__ import annotations

import importlib.util
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("v4sdk", "torch", "transformers", "safetensors", "numpy")


def machine() -> dict[str, str]:
    """Date, processor, threads and versions."""
    about = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            about[package] = version(package)
    return about


def processor() -> str:
    """The processor's own name, or the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    named = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(named, platform.machine())
