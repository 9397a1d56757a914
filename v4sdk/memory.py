"""Will it fit: what a model maps, holds and caches, against the memory this process may still use."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from v4sdk.config import ModelConfig
from v4sdk.errors import ConfigError, MemoryRefused
from v4sdk.kv_cache import kv_bytes
from v4sdk.numerics import KVFormat

# the kernel writes a page-rounded 2**63 where there is no limit
_NO_LIMIT = 1 << 60
LIMIT_VARIABLE = "V4SDK_MEMORY_LIMIT"
_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
# what allocators and the interpreter take on the way
_RESERVE_SHARE, _RESERVE_LEAST_BYTES = 0.05, 8_000_000
# what takes less than this share of free memory is plainly small: copying it at load delays nobody for long and crowds nobody
# out. A larger model starts from its files at once, and only the pages it needs are read
_SMALL_SHARE = 0.5


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

    def settled(self, nbytes: int) -> MemoryPlan:
        """Give the plan in which so many of the mapped bytes are copied into memory."""
        return replace(
            self, mapped_bytes=self.mapped_bytes - nbytes, resident_bytes=self.resident_bytes + nbytes
        )

    def is_small(self, step_bytes: int) -> bool:
        """Tell whether all of it, with what a step computes with, takes at most half of what is free."""
        if self.free is None:
            return False
        whole = self.needed_bytes + self.mapped_bytes + _reserve(self.free, step_bytes)
        return whole <= self.free.nbytes * _SMALL_SHARE

    def check(self, demanded_by: str | None = None) -> None:
        """Refuse what cannot fit.

        Args:
            demanded_by: the setting that wants weights resident, if one does.

        Raises:
            MemoryRefused: with all numbers, if resident and KV bytes exceed what is free.
        """
        if self.free is None or self.needed_bytes <= self.free.nbytes:
            return
        raise MemoryRefused(
            f"the model needs {gigabytes(self.needed_bytes)} in memory, expected at most "
            f"{gigabytes(self.free.nbytes)}: {self.render()}",
            hint=f"leave out {demanded_by}: weights are then read from their files"
            if demanded_by
            else "use a shorter context, KV format `native`, fewer sequences, or a machine with more memory",
        )


@dataclass(frozen=True)
class ExpertSizes:
    """The routed experts of a model.

    Attributes:
        total_bytes: of all of them, part of what is mapped.
        one_bytes: of the largest: one expert of one layer, scales included.
        per_token: how many of them one token needs in one layer.
    """

    total_bytes: int
    one_bytes: int
    per_token: int


@dataclass(frozen=True)
class ExpertBudget:
    """How many bytes of routed experts may be in memory at once."""

    nbytes: int
    sizes: ExpertSizes
    free: FreeMemory

    def render(self) -> str:
        """Say once what that means."""
        share = self.nbytes / max(1, self.sizes.total_bytes)
        return (
            f"{gigabytes(self.sizes.total_bytes)} of routed experts do not fit into the {gigabytes(self.free.nbytes)} free "
            f"({self.free.bound}), so they are read from disk when they are chosen, through a cache of "
            f"{gigabytes(self.nbytes)} ({share:.0%} of them)"
        )


def step_bytes(config: ModelConfig, tokens: int) -> int:
    """Estimate what one forward pass over `tokens` tokens holds beside weights and cache.

    Streams before and after a sub-layer with what mixes them, queries and attention outputs, rows of chosen experts; float32.
    """
    streams = 6 * config.hc_mult * config.hidden_size
    heads = 4 * config.num_attention_heads * config.head_dim
    chosen = config.num_experts_per_tok * (2 * config.moe_intermediate_size + config.hidden_size)
    return 4 * tokens * (streams + heads + chosen)


def expert_budget(plan: MemoryPlan, sizes: ExpertSizes, step_bytes: int) -> ExpertBudget | None:
    """Give what is left for routed experts beside everything that every token needs; None if all of them fit.

    Args:
        step_bytes: what a step computes with.

    Raises:
        MemoryRefused: with all numbers, if that is less than two layers of one token need.
    """
    if plan.free is None or plan.needed_bytes + plan.mapped_bytes <= plan.free.nbytes:
        return None
    dense = plan.mapped_bytes - sizes.total_bytes
    reserve = _reserve(plan.free, step_bytes)
    left = plan.free.nbytes - plan.needed_bytes - dense - reserve
    # two layers: what one has read is not thrown out while the next is being read
    least = min(sizes.total_bytes, 2 * sizes.per_token * sizes.one_bytes)
    if left < least:
        needed = plan.needed_bytes + dense + reserve + least
        raise MemoryRefused(
            f"the model needs {gigabytes(needed)} in memory even with its routed experts on disk, expected at most "
            f"{gigabytes(plan.free.nbytes)} ({plan.free.bound}): {gigabytes(dense)} of weights that every token needs, "
            f"{gigabytes(plan.resident_bytes)} resident, {gigabytes(plan.kv_bytes)} of KV, {gigabytes(reserve)} to compute with, "
            f"{gigabytes(least)} for the {sizes.per_token} experts of a token in two layers",
            hint="use a shorter context, a smaller prefill_chunk, or a higher memory limit",
        )
    return ExpertBudget(min(left, sizes.total_bytes), sizes, plan.free)


def parse_bytes(size: int | str) -> int:
    """Read a size such as `8000000000`, `8GB` or `7.5 GiB`.

    Raises:
        ConfigError: if it is none.
    """
    found = _SIZE.fullmatch(str(size).strip())
    if not found or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(
            f"the memory limit is `{size}`, expected bytes, or a size such as `8GB` or `7.5GiB`"
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])


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


def free_memory(root: str | Path = "/", limit: int | str | None = None) -> FreeMemory | None:
    """Give what this process may still allocate: what is left of the system, its control groups and `limit`, the least.

    Args:
        root: where `proc` and `sys` are; tests put copies elsewhere.
        limit: most memory this process may use in all, e.g. `8GB`; None asks `V4SDK_MEMORY_LIMIT`.

    Raises:
        ConfigError: if the limit is no size.
    """
    root = Path(root)
    limit = limit if limit is not None else os.environ.get(LIMIT_VARIABLE) or None
    asked = None if limit is None else _under(parse_bytes(limit), root)
    found = [free for free in (_system(root), *_control_groups(root), asked) if free is not None]
    return min(found, key=lambda free: free.nbytes, default=None)


def used_memory(root: str | Path = "/") -> int:
    """Give the bytes of main memory this process occupies: its own pages and those of files it has mapped."""
    return sum(_status(Path(root), name) for name in ("RssAnon:", "RssFile:", "RssShmem:"))


def gigabytes(n: int) -> str:
    """Write bytes in decimal units."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _reserve(free: FreeMemory, step_bytes: int) -> int:
    return step_bytes + max(_RESERVE_LEAST_BYTES, int(free.nbytes * _RESERVE_SHARE))


def _system(root: Path) -> FreeMemory | None:
    available = _table(root / "proc" / "meminfo").get("MemAvailable:")
    # given in KiB
    return None if available is None else FreeMemory(available * 1024, "of this machine")


def _under(limit: int, root: Path) -> FreeMemory:
    used = used_memory(root)
    return FreeMemory(max(0, limit - used), f"of the {gigabytes(limit)} allowed, {gigabytes(used)} in use")


def _status(root: Path, name: str) -> int:
    # given in KiB
    return _table(root / "proc" / "self" / "status").get(name, 0) * 1024


def _control_groups(root: Path) -> list[FreeMemory]:
    """Every group this process is in, up to the top: the tightest one binds."""
    found = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys" / "fs" / "cgroup" / ("memory" if controllers else "")
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if controllers
            else ("memory.max", "memory.current", "")
        )
        group = top / path.strip("/")
        # inside a container the path may be the host's and not exist here
        for folder in (group, *group.parents):
            found.append(_group(folder, *names, mapped=_status(root, "RssFile:")))
            if folder == top:
                break
    return [free for free in found if free is not None]


def _group(folder: Path, limit_name: str, used_name: str, prefix: str, mapped: int) -> FreeMemory | None:
    limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    # file pages are given up before anything fails: weights that another run has read must not look like a full house. What
    # this process has mapped itself it needs, as far as it was used lately
    table = _table(folder / "memory.stat")
    idle, active = table.get(f"{prefix}inactive_file", 0), table.get(f"{prefix}active_file", 0)
    free = int(limit) - int(used) + idle + max(0, active - mapped)
    return FreeMemory(max(0, free), "under this process's memory limit")


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
