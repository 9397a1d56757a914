"""Compressed entries and index queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.precision import activation_dtype, between_dtype
from v4sdk.weights import Weight

from .kernels.compressor import keep_kernel, pair_kernel, pool_kernel
from .kernels.index_query import index_query_kernel
from .launch import Launch, deliver, result
from .operands import GROUP, data_of, dense, operand_type, power_of_two, rounds_input, scale_of, triton_type
from .tiles import Table, Tile, tile

# both products in one program; `split` is the most parts of the depth: as many as fill the chip are taken
PAIR_TILES: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 3, split=16),
    ("100", "decode"): Tile(16, 32, GROUP, 8, 2, split=16),
    ("any", "prefill"): Tile(64, 32, 64, 4, 3, split=8),
    ("90", "prefill"): Tile(128, 64, 64, 8, 3, split=8),
    ("100", "prefill"): Tile(128, 64, 64, 8, 3, split=8),
}
# n channels at a time of as many blocks as have k positions, padded
POOL_TILES: Table = {
    ("any", "decode"): Tile(1, 64, 32, 4, 1),
    ("any", "prefill"): Tile(1, 64, 16, 4, 1),
}
# n is for head weights; queries take whole heads
QUERY_TILES: Table = {
    ("any", "decode"): Tile(16, 64, GROUP, 4, 3, split=2),
    ("any", "prefill"): Tile(64, 64, GROUP, 8, 2),
    ("90", "prefill"): Tile(128, 64, GROUP, 8, 2),
}
# up to so many tokens of a decode step, pooling and storing follow in the launch of the products
_FUSED_TOKENS = 8
# beyond so many tokens, tiles alone fill the chip
_SPLIT_TOKENS = 128
# most tokens that one program of pooling looks through
_MOST_SCANNED = 256
# what stands for the entries where only products are wanted: one compiled kernel then serves entries of every kind
_NO_ENTRIES_SHAPE = (1, 1, 1)
_NO_ENTRIES = {
    "FUSED": False, "P": 1, "EB": 64, "OVERLAP": False, "IS_INDEX": False, "ROUNDS": False, "NATIVE": False,
}  # fmt: skip


class Compressor:
    """Kernels of `compress` and `index_query`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def compress(
        self, x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, norm: Tensor, inv_freq: Tensor, batch: Batch,
        state: Tensor, entries: Tensor, ratio: int, is_index: bool, eps: float, numerics: Numerics,
    ) -> None:  # fmt: skip
        """See `v4sdk.ops.compress`."""
        t, w, length, e = x.shape[0], ape.shape[1], state.shape[1], norm.shape[0]
        is_decode = batch.is_decode
        pair = state if is_decode else x.new_empty((t, 2, w), dtype=torch.float32)
        native, act = entries.dtype == torch.uint8, activation_dtype(numerics)
        given = (
            batch.positions, batch.seq_ids, batch.cu_seqlens, batch.slots, x.new_empty((t, e), dtype=act), batch.block_table,
            batch.block_table.shape[1], norm, inv_freq,
        )  # fmt: skip
        kept = (entries, entries.view(torch.bfloat16) if native and not is_index else entries, *entries.shape)
        sizes = (t, e, 2 * inv_freq.shape[0], w, length, ratio, eps)
        constants = {
            "EB": max(64, power_of_two(e)), "OVERLAP": w == 2 * e, "DECODE": is_decode, "ACT": triton_type(act),
            "IS_INDEX": is_index, "ROUNDS": numerics.q4_index if is_index else numerics.q8_kv, "NATIVE": native,
        }  # fmt: skip
        if is_decode and t <= _FUSED_TOKENS:
            shared, fused = (*given, *kept, *sizes), {"FUSED": True, "P": min(64, power_of_two(length))}
            self._multiply(x, wkv, wgate, ape, pair, state, shared, e, constants | fused)
        else:
            shared = (*given, pair, pair, *_NO_ENTRIES_SHAPE, *sizes)
            self._multiply(x, wkv, wgate, ape, pair, state, shared, e, constants | _NO_ENTRIES)
            self._pool(pair, state, (*given, *kept, *sizes), t, e, length, ratio, constants)
        if not is_decode:
            self._keep(pair, state, batch)

    def _multiply(
        self, x: Tensor, wkv: Weight, wgate: Weight, ape: Tensor, pair: Tensor, state: Tensor, shared: tuple[Any, ...],
        e: int, constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """Fill `pair`; with the constant FUSED everything else as well."""
        t, depth, w = x.shape[0], x.shape[1], ape.shape[1]
        x = dense(x)
        target = self._launch.target
        chosen = tile(PAIR_TILES, target, t)
        rows, columns = -(-t // chosen.m), w // e * -(-e // chosen.n)
        # two programs for each multiprocessor; the order of a row's sum depends on the tile, not on how many rows there are
        most = min(chosen.split, max(1, 2 * target.multiprocessors // columns)) if t <= _SPLIT_TOKENS else 1
        span, split = parted(depth, chosen.k, most)
        parts = x.new_empty((split, t, 2, w), dtype=torch.float32) if split > 1 else pair
        # one per tile of the products, and one for the entries
        counters = self._launch.counters(rows * columns + 1)
        self._launch(
            pair_kernel, (rows, columns, split), x, x.stride(0), data_of(wkv, target), scale_of(wkv), data_of(wgate, target),
            scale_of(wgate), ape, parts, pair, counters, depth, span, state, *shared, SPLIT=split, BM=chosen.m, BN=chosen.n,
            BK=chosen.k, KV=wkv.encoding, GATE=wgate.encoding, OPERAND=operand_type(x, wkv, wgate), G=1,
            **constants, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip

    def _pool(
        self, pair: Tensor, state: Tensor, shared: tuple[Any, ...], t: int, e: int, length: int, ratio: int,
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """Pool and store the entries of all blocks that close."""
        chosen = tile(POOL_TILES, self._launch.target, t)
        padded = min(chosen.k, power_of_two(length))
        blocks = chosen.k // padded
        scanned = min(_MOST_SCANNED, power_of_two(blocks * ratio))
        grid = (-(-t // scanned), -(-e // chosen.n))
        self._launch(
            pool_kernel, grid, self._launch.counters(grid[0]), pair, state, *shared, CH=scanned, G=blocks, P=padded, BN=chosen.n,
            **constants, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip

    def _keep(self, pair: Tensor, state: Tensor, batch: Batch) -> None:
        """Save the last rows of every sequence; everything that reads older ones was launched before."""
        length, width = state.shape[1], 2 * pair.shape[2]
        rows, columns = 8, 256
        grid = (batch.num_sequences, -(-length // rows), -(-width // columns))
        self._launch(
            keep_kernel, grid, pair, state, batch.positions, batch.cu_seqlens, batch.slots, length, width, BR=rows, BC=columns,
            warps=4, stages=1,
        )  # fmt: skip

    def index_query(
        self, x: Tensor, qr: Tensor, wq_b: Weight, weights_proj: Weight, rope_table: Tensor, num_heads: int,
        numerics: Numerics, out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.index_query`."""
        t, width, target = x.shape[0], wq_b.out_features, self._launch.target
        e, act, between = width // num_heads, activation_dtype(numerics), between_dtype(numerics)
        x, qr = dense(x), dense(qr)
        given_q, given_w = out or (None, None)
        q = result(given_q, (t, num_heads, e), act, x.device)
        w = result(given_w, (t, num_heads), between, x.device)
        operands = operand_type(qr, wq_b), operand_type(x, weights_proj)
        chosen = tile(QUERY_TILES, target, t)
        # tiles of float32 activations take twice the memory; those are never rounded to FP8 in groups
        k = chosen.k if numerics.bf16_activations or numerics.q8_gemm_input else chosen.k // 2
        q_span, q_split = parted(qr.shape[1], chosen.k, chosen.split)
        # parts of head weights as deep as those of queries, or they would come last
        w_span, w_split = parted(x.shape[1], chosen.k, -(-x.shape[1] // q_span))
        columns = min(chosen.n, max(16, power_of_two(num_heads)))
        tiles, rows = -(-num_heads // columns), -(-t // chosen.m)
        self._launch(
            index_query_kernel, (rows, tiles * w_split + num_heads * q_split), x, x.stride(0), qr, qr.stride(0),
            data_of(wq_b, target), scale_of(wq_b), data_of(weights_proj, target), scale_of(weights_proj), rope_table, q, w,
            _parts(q_split, q), _parts(w_split, w), self._launch.counters(rows * (tiles + (num_heads if q_split > 1 else 0))),
            t, num_heads, e, rope_table.shape[1], qr.shape[1], q_span, x.shape[1], w_span, e**-0.5 * num_heads**-0.5,
            Q_SPLIT=q_split, W_SPLIT=w_split, BM=chosen.m, BN=columns, BK=k, EB=max(32, power_of_two(e)), QB=wq_b.encoding,
            PROJ=weights_proj.encoding, Q8_Q=rounds_input(wq_b, numerics), Q8_W=rounds_input(weights_proj, numerics),
            Q_OPERAND=operands[0], W_OPERAND=operands[1], BETWEEN=triton_type(between), ACT=triton_type(act),
            ROUNDS=numerics.q4_index, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return deliver(out, (q, w))


def _parts(split: int, like: Tensor) -> Tensor:
    """Where parts of a product go: [split, like] float32."""
    return like.new_empty((split, like.numel()), dtype=torch.float32) if split > 1 else like


def parted(depth: int, step: int, most: int) -> tuple[int, int]:
    """Columns of one part, a multiple of `step`, and how many parts that makes, at most `most`."""
    span = -(-depth // (min(most, -(-depth // step)) * step)) * step
    return span, -(-depth // span)
