"""Per-sequence state of every layer: window rings, compressed entries, index keys, open compressor blocks.

One page covers `page_tokens` source tokens in every layer, so one block table serves them all. The fixed part lives in
slots. Formats are parameters; nothing here knows what the rows mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4sdk.config import LayerSpec, ModelConfig
from v4sdk.numerics import KVFormat, index_row_bytes, kv_row_bytes
from v4sdk.ops.batch import Batch, make_batch

PAGE_TOKENS = 1024
# new capacity beyond what is needed, as a fraction; memory in use stays close to the formula
_GROWTH = 0.125


@dataclass
class LayerCache:
    """Cache tensors of one layer; the last slot and the last page are scratch.

    Attributes:
        window: [slots + 1, W, row]. entries: [pages + 1, page_tokens / ratio, row] or None.
        index_keys: like entries, for CSA. state, index_state: [slots + 1, L, 2, w] float32 open compressor blocks.
    """

    window: Tensor
    entries: Tensor | None = None
    index_keys: Tensor | None = None
    state: Tensor | None = None
    index_state: Tensor | None = None

    def paged(self) -> dict[str, Tensor]:
        """Tensors that grow with the context."""
        return {
            k: t for k, t in (("entries", self.entries), ("index_keys", self.index_keys)) if t is not None
        }

    def fixed(self) -> dict[str, Tensor]:
        """Tensors of constant size per sequence."""
        named = (("window", self.window), ("state", self.state), ("index_state", self.index_state))
        return {k: t for k, t in named if t is not None}


@dataclass
class CacheRows:
    """What one sequence owns: a slot, and a page for each run of `page_tokens` tokens."""

    slot: int
    pages: list[int] = field(default_factory=list)


def layer_row_bytes(config: ModelConfig, layer: LayerSpec, fmt: KVFormat) -> tuple[int, int]:
    """(growing bytes per compressed entry, fixed bytes per sequence) of one layer."""
    row = kv_row_bytes(config.head_dim, config.qk_rope_head_dim, fmt)
    fixed = config.sliding_window * row
    if layer.kind == "swa":
        return 0, fixed
    growing = row
    fixed += _state_floats(config.head_dim, layer) * 4
    if layer.kind == "csa":
        growing += index_row_bytes(config.index_head_dim, fmt)
        fixed += _state_floats(config.index_head_dim, layer) * 4
    return growing, fixed


def kv_bytes(config: ModelConfig, num_tokens: int, fmt: KVFormat) -> int:
    """Bytes one sequence of `num_tokens` holds: entries, windows and open blocks (3.70 GB for Flash at 1,048,576)."""
    total = 0
    for layer in config.layers:
        growing, fixed = layer_row_bytes(config, layer, fmt)
        total += fixed + (num_tokens // layer.ratio * growing if layer.ratio else 0)
    return total


def _state_floats(width: int, layer: LayerSpec) -> int:
    span, halves = (2 * layer.ratio, 2) if layer.overlap else (layer.ratio, 1)
    return span * 2 * halves * width


class KVCache:
    """A pool of slots and pages for all layers of one model on one device.

    Args:
        config: shapes. fmt: row format. device: where tensors live.
        layers: blocks to hold state for; the backbone by default.
        admit: asked with the bytes of every growth before it happens; raises to refuse it.
    """

    def __init__(
        self,
        config: ModelConfig,
        fmt: KVFormat,
        device: torch.device | None = None,
        layers: tuple[LayerSpec, ...] | None = None,
        page_tokens: int = PAGE_TOKENS,
        admit: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self.config, self.fmt, self.page_tokens = config, fmt, page_tokens
        self.device = device or torch.device("cpu")
        self.specs = config.layers if layers is None else layers
        self._admit = admit
        self._num_slots = self._num_pages = 0
        # counts the times tensors have moved: addresses kept from before are stale
        self.generation = 0
        self._free_slots: list[int] = []
        self._free_pages: list[int] = []
        self.layers = [self._empty_layer(spec) for spec in self.specs]

    def _empty_layer(self, spec: LayerSpec) -> LayerCache:
        c = self.config
        dtype = {"native": torch.uint8, "bf16": torch.bfloat16, "float32": torch.float32}[self.fmt]
        kv = kv_row_bytes(c.head_dim, c.qk_rope_head_dim, self.fmt) // dtype.itemsize
        cache = LayerCache(self._zeros((1, c.sliding_window, kv), dtype))
        if spec.ratio:
            rows = self.page_tokens // spec.ratio
            span, halves = (2 * spec.ratio, 2) if spec.overlap else (spec.ratio, 1)
            cache.entries = self._zeros((1, rows, kv), dtype)
            cache.state = self._zeros((1, span, 2, halves * c.head_dim), torch.float32)
            if spec.kind == "csa":
                index = index_row_bytes(c.index_head_dim, self.fmt) // dtype.itemsize
                cache.index_keys = self._zeros((1, rows, index), dtype)
                cache.index_state = self._zeros((1, span, 2, halves * c.index_head_dim), torch.float32)
        return cache

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all cache tensors, scratch and spare capacity included."""
        return sum(t.nbytes for c in self.layers for t in (*c.paged().values(), *c.fixed().values()))

    def allocate(self) -> CacheRows:
        """Take a slot with no tokens yet."""
        if not self._free_slots:
            self._grow_slots(max(1, self._num_slots))
        return CacheRows(self._free_slots.pop(0))

    def reserve(self, rows: CacheRows, num_tokens: int) -> None:
        """Make sure `rows` has pages for `num_tokens` tokens in all."""
        want = -(-num_tokens // self.page_tokens)
        short = want - len(rows.pages) - len(self._free_pages)
        if short > 0:
            self._grow_pages(max(short, int(self._num_pages * _GROWTH)))
        while len(rows.pages) < want:
            rows.pages.append(self._free_pages.pop(0))

    def truncate(self, rows: CacheRows, num_tokens: int) -> None:
        """Give back pages beyond `num_tokens` tokens."""
        want = -(-num_tokens // self.page_tokens)
        self._free_pages.extend(rows.pages[want:])
        del rows.pages[want:]

    def release(self, rows: CacheRows) -> None:
        """Give everything back. Stale rows are never read: visibility follows from positions alone."""
        self.truncate(rows, 0)
        self._free_slots.append(rows.slot)

    def fork(self, rows: CacheRows) -> CacheRows:
        """Copy a sequence's state into rows of its own."""
        twin = self.allocate()
        self.restore_fixed(twin, self.snapshot_fixed(rows))
        self.reserve(twin, len(rows.pages) * self.page_tokens)
        for cache in self.layers:
            for tensor in cache.paged().values():
                tensor[twin.pages] = tensor[rows.pages]
        return twin

    def snapshot_fixed(self, rows: CacheRows) -> list[dict[str, Tensor]]:
        """Copy the fixed-size part: what a later position overwrites."""
        return [{k: t[rows.slot].clone() for k, t in cache.fixed().items()} for cache in self.layers]

    def restore_fixed(self, rows: CacheRows, snapshot: list[dict[str, Tensor]]) -> None:
        """Put a fixed-size part back."""
        for cache, saved in zip(self.layers, snapshot, strict=True):
            for name, tensor in cache.fixed().items():
                tensor[rows.slot] = saved[name]

    def read_entries(self, rows: CacheRows, num_tokens: int) -> list[dict[str, Tensor]]:
        """Compressed rows in order, independent of pages: per layer [n, row]."""
        return [
            {
                k: t[rows.pages].flatten(0, 1)[: num_tokens // spec.ratio].clone()
                for k, t in cache.paged().items()
            }
            for spec, cache in zip(self.specs, self.layers, strict=True)
        ]

    def write_entries(self, rows: CacheRows, saved: list[dict[str, Tensor]]) -> None:
        """Put compressed rows back; pages must be reserved."""
        pages = torch.tensor(rows.pages, dtype=torch.long, device=self.device)
        for cache, named in zip(self.layers, saved, strict=True):
            for name, tensor in cache.paged().items():
                at = torch.arange(named[name].shape[0], device=self.device)
                per_page = tensor.shape[1]
                tensor[pages[at // per_page], at % per_page] = named[name].to(self.device)

    def batch(self, rows: list[CacheRows], token_ids: list[list[int]], starts: list[int]) -> Batch:
        """Pack the next tokens of several sequences; pages are reserved here."""
        for r, ids, start in zip(rows, token_ids, starts, strict=True):
            self.reserve(r, start + len(ids))
        lengths = [len(ids) for ids in token_ids]
        bounds = [0]
        for n in lengths:
            bounds.append(bounds[-1] + n)
        positions = [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]
        width = max(len(r.pages) for r in rows)
        table = [r.pages + [-1] * (width - len(r.pages)) for r in rows]
        return make_batch(
            torch.tensor([t for ids in token_ids for t in ids], dtype=torch.long, device=self.device),
            self._int32(positions),
            self._int32(bounds),
            self._int32([r.slot for r in rows]),
            self._int32(table),
            self.page_tokens,
        )

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _grow_slots(self, more: int) -> None:
        self.generation += 1
        for cache in self.layers:
            for name, tensor in cache.fixed().items():
                setattr(cache, name, self._extended(tensor, more))
        self._free_slots.extend(range(self._num_slots, self._num_slots + more))
        self._num_slots += more

    def _grow_pages(self, more: int) -> None:
        tensors = [tensor for cache in self.layers for tensor in cache.paged().values()]
        largest = max((t.nbytes for t in tensors), default=0)
        self._admit(sum(more * t[0].nbytes for t in tensors) + largest)
        self.generation += 1
        # one tensor at a time, so the transient copy is one layer's rows
        for cache in self.layers:
            for name, tensor in cache.paged().items():
                setattr(cache, name, self._extended(tensor, more))
        self._free_pages.extend(range(self._num_pages, self._num_pages + more))
        self._num_pages += more

    def _extended(self, tensor: Tensor, more: int) -> Tensor:
        grown = self._zeros((tensor.shape[0] + more, *tensor.shape[1:]), tensor.dtype)
        # what was scratch becomes an ordinary row; the new last one is scratch
        grown[: tensor.shape[0]] = tensor.detach()
        return grown
