"""Where and when numbers were measured: the head of every record."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "v4sdk",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "onnx",
    "onnxruntime",
    "pytest-benchmark",
)
# what decides which kernels a library takes on a processor; the other flags say nothing about speed
_FLAGS = ("avx", "avx2", "avx512", "amx", "fma", "asimd", "sve", "bf16", "i8mm")
# settings of the threading libraries that change what is measured
_THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine() -> dict[str, str]:
    """Date, processor, threads and versions, for the records of single commands."""
    about = {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    return about | software()


def hardware() -> dict[str, Any]:
    """What the host is and how busy it is.

    Returns:
        `processor`, `cores` (logical), `threads` (that torch uses), `memory_bytes`, `memory_limit_bytes` (of the container, or
        None), `last_level_cache_bytes` (or None), `instructions`, `system`, `threading` (environment variables of the threading
        libraries), `load` (1-minute average).
    """
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "memory_limit_bytes": _limit_bytes(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "instructions": sorted(_instructions()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threading": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_THREADING)},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def software(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of everything that computes, and a digest of v4sdk's own sources: two builds of one version differ in it.

    Args:
        more: distributions of the backend's own.
    """
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"v4sdk_sources": source_digest()}


def source_digest() -> str:
    """SHA-256 over the files of v4sdk and of its installed plugins, kernels in any language included, first 12 digits."""
    digest = hashlib.sha256()
    plugins = {point.module.partition(".")[0] for point in entry_points(group="v4sdk")}
    for package in ("v4sdk", *sorted(plugins)):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            files = (p for p in Path(root).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            for path in sorted(files):
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The processor's own name, or the architecture."""
    return next(_cpuinfo("model name"), platform.machine())


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache, or None where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=None)


def _instructions() -> set[str]:
    flags = next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")
    return {flag for flag in flags.split() if flag.startswith(_FLAGS)}


def _cpuinfo(name: str) -> Any:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return iter(())
    return (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name))


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _limit_bytes() -> int | None:
    try:
        text = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
