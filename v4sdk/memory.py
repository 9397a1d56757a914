"""Will it fit: what a model maps, holds and caches, against the memory this process may still use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from v4sdk.config import ModelConfig
from v4sdk.errors import MemoryRefused
from v4sdk.kv_cache import kv_bytes
from v4sdk.numerics import KVFormat

# the kernel writes a page-rounded 2**63 where there is no limit
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can still be used, and what sets that bound, in words."""

    nbytes: int
    bound: str


@dataclass(frozen=True)
class MemoryPlan:
    """What a session is about to use.

    Attributes:
        mapped_bytes: weights read from the files as they are needed; the system may drop and read them again.
        resident_bytes: weights and buffers that stay in memory once loaded.
        kv_bytes: cache rows of `sequences` sequences of `context_tokens` tokens in `kv_format`.
        free: what may still be used, None if the system does not say.
    """

    mapped_bytes: int
    resident_bytes: int
    kv_bytes: int
    context_tokens: int
    sequences: int
    kv_format: KVFormat
    free: FreeMemory | None

    @property
    def needed_bytes(self) -> int:
        """What must fit at the same time."""
        return self.resident_bytes + self.kv_bytes

    def render(self) -> str:
        """Give all numbers in one line."""
        many = f"{self.sequences} x " if self.sequences > 1 else ""
        free = "" if self.free is None else f"; {gigabytes(self.free.nbytes)} free ({self.free.bound})"
        return (
            f"{gigabytes(self.mapped_bytes)} mapped, {gigabytes(self.resident_bytes)} resident, "
            f"{gigabytes(self.kv_bytes)} of KV for {many}{self.context_tokens:,} tokens in {self.kv_format}{free}"
        )

    def warning(self) -> str | None:
        """Say so when it runs but not from memory; None when everything fits."""
        if self.free is None or self.needed_bytes + self.mapped_bytes <= self.free.nbytes:
            return None
        over = self.needed_bytes + self.mapped_bytes - self.free.nbytes
        return (
            f"the weights exceed free memory by {gigabytes(over)}, so parts of them are read from disk again and "
            f"again: {self.render()}"
        )

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            MemoryRefused: with all numbers, if resident and KV bytes exceed what is free.
        """
        if self.free is None or self.needed_bytes <= self.free.nbytes:
            return
        raise MemoryRefused(
            f"the model needs {gigabytes(self.needed_bytes)} in memory, expected at most "
            f"{gigabytes(self.free.nbytes)}: {self.render()}",
            hint="use a shorter context, KV format `native`, fewer sequences, or a machine with more memory",
        )


def check_growth(num_bytes: int, free: FreeMemory | None) -> None:
    """Refuse cache rows that no longer fit.

    Raises:
        MemoryRefused: with both numbers.
    """
    if free is not None and num_bytes > free.nbytes:
        raise MemoryRefused(
            f"the KV cache needs {gigabytes(num_bytes)} more, expected at most {gigabytes(free.nbytes)} ({free.bound})",
            hint="use a shorter context, KV format `native`, or fewer sequences at once",
        )


def plan_memory(
    config: ModelConfig, *, mapped_bytes: int, resident_bytes: int, context_tokens: int, kv_format: KVFormat,
    sequences: int = 1, free: FreeMemory | None = None,
) -> MemoryPlan:  # fmt: skip
    """Add up a session before anything is loaded.

    Args:
        free: of the device that holds the weights; of this process by default.
    """
    cache = sequences * kv_bytes(config, context_tokens, kv_format)
    return MemoryPlan(
        mapped_bytes, resident_bytes, cache, context_tokens, sequences, kv_format, free or free_memory()
    )


def free_memory(root: str | Path = "/") -> FreeMemory | None:
    """Give what this process may still allocate: the system's free memory or its control group's, whichever is less.

    Args:
        root: where `proc` and `sys` are; tests put copies elsewhere.
    """
    root = Path(root)
    found = [free for free in (_system(root), *_control_groups(root)) if free is not None]
    return min(found, key=lambda free: free.nbytes, default=None)


def gigabytes(n: int) -> str:
    """Write bytes in decimal units."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _system(root: Path) -> FreeMemory | None:
    available = _table(root / "proc" / "meminfo").get("MemAvailable:")
    # given in KiB
    return None if available is None else FreeMemory(available * 1024, "of this machine")


def _control_groups(root: Path) -> list[FreeMemory]:
    """Every group this process is in, up to the top: the tightest one binds."""
    found = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / ("memory" if controllers else "")
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = top / path.strip("/")
        # inside a container the path may be the host's and not exist here
        for folder in (group, *group.parents):
            found.append(_group(folder, *names))
            if folder == top:
                break
    return [free for free in found if free is not None]


def _group(folder: Path, limit_name: str, used_name: str, cached_name: str) -> FreeMemory | None:
    limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    # file pages nobody has used lately are given up before anything fails
    cached = _table(folder / "memory.stat").get(cached_name, 0)
    return FreeMemory(max(0, int(limit) - int(used) + cached), "under this process's memory limit")


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
