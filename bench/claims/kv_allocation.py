"""Bytes that real caches of released shapes take: the tensors, and the memory of the process once every byte was written."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

from v4sdk.backend import Backend
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache, kv_bytes
from v4sdk.numerics import KVFormat
from v4sdk_bench.speed.ceilings import free_bytes

# more than this share of what is free would take memory from whatever else runs
_SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class Allocation:
    """One sequence's cache, allocated.

    Attributes:
        formula_bytes: `kv_bytes`. own_bytes: tensor rows that belong to the sequence. tensor_bytes: all of the cache's tensors,
            with the scratch slot and page. resident_bytes: growth of the process (or of the device's used memory); None where
            it cannot be read.
    """

    num_tokens: int
    formula_bytes: int
    own_bytes: int
    tensor_bytes: int
    resident_bytes: int | None


def allocate(config: ModelConfig, num_tokens: int, backend: Backend, fmt: KVFormat = "native") -> Allocation:
    """Allocate the cache of one sequence, write every byte of it, and let it go.

    Raises:
        MemoryError, RuntimeError: if the device has no room; ask `fits` first.
    """
    gc.collect()
    before = _used_bytes(backend)
    cache = KVCache(config, fmt, backend.device)
    rows = cache.allocate()
    cache.reserve(rows, num_tokens)
    own = 0
    for layer in cache.layers:
        for tensor in layer.fixed().values():
            own += tensor[0].nbytes
        for tensor in layer.paged().values():
            own += tensor[0].nbytes * len(rows.pages)
        for tensor in (*layer.fixed().values(), *layer.paged().values()):
            # memory that was never written need not exist
            tensor.fill_(1)
    after = _used_bytes(backend)
    grown = None if before is None or after is None else after - before
    return Allocation(num_tokens, kv_bytes(config, num_tokens, fmt), own, cache.nbytes, grown)


def fits(config: ModelConfig, num_tokens: int, backend: Backend, fmt: KVFormat = "native") -> bool:
    """Whether the device is known to have ample room for the cache of one sequence."""
    return kv_bytes(config, num_tokens, fmt) <= _SHARE_OF_FREE * (free_bytes(backend) or 0)


def _used_bytes(backend: Backend) -> int | None:
    memory = backend.memory()
    if memory is not None:
        return memory.total_bytes - memory.free_bytes
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
