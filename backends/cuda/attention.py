"""Attention over the window and the compressed entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch

from .kernels.attention import decode_kernel, prompt_kernel
from .launch import Launch, deliver, result
from .operands import power_of_two
from .target import Target
from .tiles import Table, Tile, tile

# rows (heads, and tokens where heads are few), keys of one step, keys of one program of those that share a decoded token
TILES: Table = {
    ("any", "decode"): Tile(16, 32, 128, 8, 1),
    # FP8 is decoded by integer instructions, which take registers of their own
    ("80", "decode"): Tile(16, 16, 128, 8, 1),
    ("90", "decode"): Tile(16, 32, 128, 8, 2),
    ("100", "decode"): Tile(16, 32, 128, 8, 2),
    ("any", "prefill"): Tile(16, 32, 1024, 8, 1),
    ("80", "prefill"): Tile(16, 16, 1024, 8, 1),
    ("90", "prefill"): Tile(64, 32, 1024, 8, 1),
}
# float32 operands
WIDE_TILE = Tile(16, 32, 256, 8, 1)
# with more tokens every program takes all keys of one; and no token's keys are cut into more than about so many parts
_SHARED_TOKENS, _MOST_PARTS = 64, 64
_FEWEST_HEADS = 4
# columns of a native row under one scale
_SCALED = 64
# of heads up to this wide, registers hold the sums of so many rows on every chip
_NARROW, _NARROW_ROWS = 128, 64
_LOG2_E = 1.4426950408889634


class Attention:
    """The sparse softmax."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def sparse_attn(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.sparse_attn`."""
        q, y = q.contiguous(), result(out, tuple(q.shape), q.dtype, q.device)
        run = self._decode if batch.is_decode else self._prompt
        run(q, kv, window, entries, picks, batch, sink, ratio, rope_dim, numerics, y)
        return deliver(out, y)

    def _decode(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics, y: Tensor,
    ) -> None:  # fmt: skip
        """One token per sequence; `kv` is in the ring already."""
        (t, heads, dim), target = q.shape, self._launch.target
        far, kind, bound = _entries(entries, picks, batch, window)
        chosen, operand = _tile(target, t, q, window, far)
        blocks = -(-window.shape[1] // chosen.n) + -(-bound // chosen.n)
        span = _span(chosen, t, blocks)
        split = -(-blocks // span)
        together = _together(min(chosen.m, power_of_two(heads)), t * split, heads, target)
        grid = (t * -(-heads // together), split)
        parts = q.new_empty((t, split, heads, dim), dtype=torch.float32) if split > 1 else sink
        stats = q.new_empty((t, split, 2, heads), dtype=torch.float32) if split > 1 else sink
        self._launch(
            decode_kernel, grid, q, *_views(window, target), *_views(far, target), batch.block_table if picks is None else picks,
            batch.block_table, batch.positions, batch.slots, sink, y, parts, stats,
            self._launch.counters(grid[0] if split > 1 else 1), heads, dim, rope_dim, window.shape[1],
            bound if kind == "picked" else 0, ratio, batch.block_table.shape[1], far.shape[1], far.shape[0],
            _LOG2_E * dim**-0.5, span, split, FAR=kind, NEAR_NATIVE=window.dtype == torch.uint8,
            FAR_NATIVE=far.dtype == torch.uint8, IS_SPLIT=split > 1, HEADS=together, BH=chosen.m, BN=chosen.n,
            DB=max(16, power_of_two(dim)), OPERAND=operand, BF16_P=numerics.bf16_between, warps=chosen.warps,
            stages=chosen.stages,
        )  # fmt: skip

    def _prompt(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics, y: Tensor,
    ) -> None:  # fmt: skip
        """Sequences of any length; `kv` holds what their rings held before."""
        (t, heads, dim), target = q.shape, self._launch.target
        far, kind, bound = _entries(entries, picks, batch, window)
        chosen, operand = _tile(target, t, q, kv, far)
        rows = chosen.m if dim > _NARROW else _NARROW_ROWS
        together = min(rows, power_of_two(heads))
        tokens = rows // together
        grid = (-(-t // tokens) * -(-heads // together),)
        self._launch(
            prompt_kernel, grid, q, kv, kv.stride(0), *_views(far, target), batch.block_table if picks is None else picks,
            batch.block_table, batch.positions, batch.seq_ids, batch.cu_seqlens, sink, y, t, batch.num_sequences, heads, dim,
            rope_dim, window.shape[1], bound if kind == "picked" else 0, ratio, batch.block_table.shape[1], far.shape[1],
            far.shape[0], _LOG2_E * dim**-0.5, FAR=kind, FAR_NATIVE=far.dtype == torch.uint8, TOKENS=tokens,
            PICKS=power_of_two(bound) if kind == "picked" else 1, BH=rows, BN=chosen.n, DB=max(16, power_of_two(dim)),
            OPERAND=operand, BF16_P=numerics.bf16_between, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip


def too_wide(config: ModelConfig, engine: EngineConfig) -> str | None:
    """Native rows whose rotary columns fill more than one group of scaled ones."""
    wide = config.qk_rope_head_dim
    return f"qk_rope_head_dim {wide} > {_SCALED}" if wide > _SCALED else None


def _entries(
    entries: Tensor | None, picks: Tensor | None, batch: Batch, window: Tensor
) -> tuple[Tensor, str, int]:
    """The cache of entries (any tensor where there is none), which of them a token sees, and how many at most, by shapes."""
    if entries is None:
        return window, "none", 0
    if picks is not None:
        return entries, "picked", picks.shape[1]
    return entries, "all", batch.block_table.shape[1] * entries.shape[1]


def _tile(target: Target, tokens: int, *given: Tensor) -> tuple[Tile, Any]:
    """The tile, and what products multiply in: BF16 unless something comes in float32. Native rows are exact in BF16."""
    import triton.language as tl

    if any(x.dtype == torch.float32 for x in given):
        return WIDE_TILE, tl.float32
    return tile(TILES, target, tokens), tl.bfloat16


def _span(chosen: Tile, tokens: int, blocks: int) -> int:
    """Blocks of one program; the same for all numbers of tokens of a tile's class, so that a token is summed in one order."""
    if tokens > _SHARED_TOKENS:
        return blocks
    return max(chosen.k // chosen.n, power_of_two(blocks) // _MOST_PARTS)


def _together(most: int, shares: int, heads: int, target: Target) -> int:
    """Heads of one program: fewer than it could take where multiprocessors would idle. Changes no result."""
    together = most
    while together > _FEWEST_HEADS and shares * -(-2 * heads // together) <= target.multiprocessors:
        together //= 2
    return together


def _views(rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows as a kernel reads them: FP8 values, bytes and BF16 of the native layout, and its row in 8 bytes; or floats."""
    if rows.dtype != torch.uint8:
        return rows, rows, rows, rows.stride(-2)
    codes = rows.view(torch.float8_e4m3fn) if target.has_fp8 else rows
    return codes, rows, rows.view(torch.bfloat16), rows.stride(-2) // 8
