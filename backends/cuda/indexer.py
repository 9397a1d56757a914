"""The lightning indexer's choice of entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch

from .kernels.indexer import decode_scores_kernel, pick_kernel, prompt_scores_kernel
from .launch import Launch, deliver, result
from .operands import dense, power_of_two
from .tiles import Table, Tile, tile

# m tokens share a tile of n keys, as many at a time as have k heads; a decode step is bound by reading keys, each once
TILES: Table = {
    ("any", "decode"): Tile(1, 64, 64, 4, 3),
    ("any", "prefill"): Tile(32, 64, 128, 4, 2),
}
# products of float32 have no tensor cores
WIDE_TILES: Table = {
    ("any", "decode"): Tile(1, 32, 64, 8, 1),
    ("any", "prefill"): Tile(32, 32, 64, 8, 1),
}
# programs per multiprocessor of a decode step: queries are read again by each
_WAVES = 4
# scores of as many tokens as fit are chosen from at a time
_WORKSPACE_BYTES = 64 << 20
# keys that one program chooses from: in registers, and below 2**15
_LARGEST_BLOCK = 1 << 14
_SMALLEST_BLOCK = 1 << 8
# keys whose places are counted at a time: a scan needs many registers
_PART = 1 << 12
# short rows of a prompt share a program
_PICK_COLUMNS = 1 << 12


class Indexer:
    """Scores and picks."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def index_topk(
        self, q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.index_topk`."""
        t, limit = q.shape[0], batch.block_table.shape[1] * keys.shape[1]
        picks = result(out, (t, topk), torch.int32, q.device)
        rows = max(1, min(t, _WORKSPACE_BYTES // (4 * max(1, limit))))
        for first in range(0, t, rows):
            last = min(t, first + rows)
            # where every entry a table can hold is picked, nothing needs a score
            n = limit if limit > topk else 0
            scores = torch.empty((last - first, n), dtype=torch.int32, device=q.device)
            if n:
                self._score(q, w, keys, batch, topk, ratio, numerics, scores, first, last)
            some = (batch.positions.narrow(0, first, last - first), picks.narrow(0, first, last - first))
            self._pick(scores, *some, limit, topk, ratio, 1 if batch.is_decode else _PICK_COLUMNS)
        return deliver(out, picks)

    def _score(
        self, q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics, scores: Tensor,
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Order keys of the scores of tokens first..last."""
        heads, e, limit = q.shape[1], q.shape[2], scores.shape[1]
        q, w, keys = dense(q.reshape(q.shape[0], heads * e)), dense(w), dense(keys)
        narrow = q.dtype == torch.bfloat16 and (keys.dtype != torch.float32 or numerics.q4_index)
        chosen = tile(
            TILES if narrow else WIDE_TILES, self._launch.target, 1 if batch.is_decode else q.shape[0]
        )
        constants = _constants(keys, heads, e, chosen, narrow) | {"BF16_SCORES": numerics.bf16_index_scores}
        table = dense(batch.block_table)
        if batch.is_decode:
            tiles = -(-limit // chosen.n)
            programs = _WAVES * self._launch.target.multiprocessors
            span = -(-tiles * (last - first) // programs) * chosen.n
            self._launch(
                decode_scores_kernel, (-(-limit // span), last - first), q, q.stride(0), w, w.stride(0), keys, table,
                table.stride(0), batch.positions, batch.seq_ids, scores, first, limit, span, topk, ratio, keys.shape[0] - 1,
                warps=chosen.warps, stages=chosen.stages, **constants,
            )  # fmt: skip
            return
        grid = (-(-limit // chosen.n), -(-(last - first) // chosen.m))
        self._launch(
            prompt_scores_kernel, grid, q, q.stride(0), w, w.stride(0), keys, table, table.stride(0), batch.positions,
            batch.seq_ids, batch.cu_seqlens, scores, first, last, limit, chosen.m, topk, ratio, keys.shape[0] - 1,
            QUERIES=max(1, chosen.k // constants["BH"]), warps=chosen.warps, stages=chosen.stages, **constants,
        )  # fmt: skip

    def _pick(
        self, keys: Tensor, positions: Tensor, picks: Tensor, limit: int, topk: int, ratio: int, columns: int
    ) -> None:
        """Choose from keys [t, n]: in blocks, and then among the blocks' choices, until one block holds all.

        Args:
            columns: of all the rows that one program should have at least.
        """
        t, entries = keys.shape[0], keys
        while True:
            n, listed = keys.shape[1], entries is not keys
            block = _block(n, topk)
            blocks = max(1, -(-n // block))
            final = blocks == 1
            to, to_keys = picks, picks
            if not final:
                to = torch.empty((t, blocks * topk), dtype=torch.int32, device=keys.device)
                to_keys = torch.empty_like(to)
            rows = min(power_of_two(t), max(1, columns // block))
            part = max(1, min(block, _PART // rows))
            self._launch(
                pick_kernel, (blocks, -(-t // rows)), keys, entries, positions, to, to_keys, t, n, limit, topk, ratio,
                LISTED=listed, FINAL=final, ROWS=rows, BLOCK=block, PART=part, BK=power_of_two(topk),
                warps=min(16, max(4, rows * block // 512)), stages=1,
            )  # fmt: skip
            if final:
                return
            entries, keys = to, to_keys


def _block(n: int, topk: int) -> int:
    """How many keys a program chooses from: all, or else about as many as there will be choices left."""
    if n <= _LARGEST_BLOCK:
        return max(_SMALLEST_BLOCK, power_of_two(n))
    fewest = power_of_two(2 * topk)
    return min(max(fewest, power_of_two(int((n * topk) ** 0.5))), max(fewest, _LARGEST_BLOCK))


def _constants(keys: Tensor, heads: int, e: int, chosen: Tile, narrow: bool) -> dict[str, Any]:
    """What both score kernels are specialised for."""
    import triton.language as tl

    return {
        "H": heads, "E": e, "PAGE": keys.shape[1], "PAGE_STRIDE": keys.stride(0), "ROW_STRIDE": keys.stride(1),
        "BN": chosen.n, "BH": max(16, power_of_two(heads)), "BE": max(32, power_of_two(e)),
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
    }  # fmt: skip
