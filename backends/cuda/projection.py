"""Projections around attention: queries, the key-value latent, the grouped output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.precision import activation_dtype
from v4sdk.weights import Weight

from .kernels.projection import (
    groups_kernel,
    heads_kernel,
    history_kernel,
    kv_kernel,
    query_latent_kernel,
)
from .launch import Launch, deliver, result
from .linear import Linear
from .operands import GROUP, data_of, dense, operand_type, power_of_two, rounds_input, scale_of, triton_type
from .target import Target
from .tiles import DECODE_ROWS, Shape, Table, Tile, shape_of, tile

# a latent is narrow: the depth is split until every multiprocessor has work
QUERY_LATENT: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 4, split=4),
    ("any", "prefill"): Tile(64, 64, GROUP, 4, 2),
    ("80", "prefill"): Tile(64, 64, GROUP, 8, 2),
    ("90", "prefill"): Tile(128, 128, GROUP, 8, 3),
    ("100", "prefill"): Tile(128, 128, GROUP, 8, 2),
}
KV_LATENT: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 4, split=8),
    ("any", "prefill"): Tile(64, 64, GROUP, 4, 2),
    ("80", "prefill"): Tile(64, 64, GROUP, 8, 2),
}
# columns: the most that one program makes of a head; a head is always shared by several
HEADS: Table = {
    ("any", "decode"): Tile(16, 64, GROUP, 4, 4),
    ("90", "decode"): Tile(16, 128, GROUP, 4, 4),
    ("100", "decode"): Tile(16, 128, GROUP, 4, 4),
    ("any", "prefill"): Tile(64, 64, GROUP, 4, 2),
    ("90", "prefill"): Tile(128, 128, GROUP, 8, 3),
    ("100", "prefill"): Tile(128, 128, GROUP, 8, 2),
}
# half a scale's tile deep on prompts: turning a tile takes registers
GROUPS: Table = {
    ("any", "decode"): Tile(16, 32, GROUP, 4, 5),
    ("any", "prefill"): Tile(64, 64, GROUP // 2, 4, 2),
    ("90", "prefill"): Tile(128, 128, GROUP // 2, 8, 3),
    ("100", "prefill"): Tile(128, 128, GROUP // 2, 8, 3),
}
# products in float32 run without tensor cores: a thread holds all that it multiplies in a step
FLOAT32: Table = {
    ("any", "decode"): Tile(16, 32, 64, 4, 2),
    ("89", "decode"): Tile(16, 32, 32, 4, 2),
    ("any", "prefill"): Tile(64, 64, 32, 8, 2),
}
GROUPS_FLOAT32: Table = {
    ("any", "decode"): Tile(16, 32, 64, 4, 2),
    ("any", "prefill"): Tile(64, 32, 32, 8, 2),
}
# float32 sums of queries that wait for their norm; a prompt takes as many rows at a time as fit
_SUMS_BYTES = 128 << 20
# elements of rows that a thread finishes at a time; rows of the cache take more registers
_QUERY_ELEMENTS: Mapping[Shape, int] = {"decode": 16, "prefill": 32}
_KV_ELEMENTS: Mapping[Shape, int] = {"decode": 8, "prefill": 16}
_HISTORY_ROWS = 8


@dataclass(frozen=True)
class _Latent:
    """How a product whose rows the last program finishes is spread: its tile, its splits of `span` columns, rows per finish."""

    tile: Tile
    splits: int
    span: int
    block: int
    rows: int

    @staticmethod
    def of(chosen: Tile, depth: int, width: int, elements: int) -> _Latent:
        splits = min(chosen.split, -(-depth // chosen.k))
        span = -(-depth // (splits * chosen.k)) * chosen.k
        block = max(GROUP, power_of_two(width))
        return _Latent(chosen, -(-depth // span), span, block, _finished(chosen, block, elements))

    def grid(self, tokens: int, width: int) -> tuple[int, int, int]:
        return (-(-tokens // self.tile.m), -(-width // self.tile.n), self.splits)


def _finished(chosen: Tile, block: int, elements: int) -> int:
    """Rows finished at a time: by the tile alone, so that the sums of a row have one order."""
    return max(1, 32 * chosen.warps * elements // block)


def _tile(
    table: Table,
    target: Target,
    tokens: int,
    x: Tensor,
    weight: Weight,
    q8: bool,
    float32: Table | None = None,
) -> Tile:
    """The tile of a product by `table`; by `float32` (or what is usual) where it has no tensor cores to run on."""
    chosen = tile(table, target, tokens)
    # rounded inputs come in groups: the depth of a step is theirs
    if q8 or operand_type(x, weight) != triton_type(torch.float32):
        return chosen
    return replace(tile(float32 or FLOAT32, target, tokens), split=chosen.split)


class Projection:
    """What stands before and after attention."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._linear = Linear(launch)

    def q_project(
        self, x: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, rope_table: Tensor, num_heads: int, eps: float,
        numerics: Numerics, out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.q_project`."""
        t, act = x.shape[0], activation_dtype(numerics)
        q_out, qr_out = out or (None, None)
        q = result(q_out, (t, num_heads, wq_b.out_features // num_heads), act, x.device)
        qr = result(qr_out, (t, wq_a.out_features), act, x.device)
        rounds = rounds_input(wq_b, numerics)
        # made once beside the latent, not by each of the many programs that read it
        rounded = torch.empty_like(qr) if rounds else qr
        self._query_latent(x, wq_a, q_norm, qr, rounded, eps, numerics)
        per_row = 4 * wq_b.out_features
        step = max(DECODE_ROWS, _SUMS_BYTES // per_row)
        sums = torch.empty((min(t, step), wq_b.out_features), dtype=torch.float32, device=x.device)
        for i in range(0, t, step):
            # `narrow`, not a slice: it also works on tensors of a device that is not here
            rows = [v.narrow(0, i, min(step, t - i)) for v in (rounded, rope_table, q)]
            self._heads(rows[0], wq_b, rows[1], rows[2], sums, eps, numerics, t)
        return deliver(out, (q, qr))

    def _query_latent(
        self, x: Tensor, weight: Weight, gain: Tensor, qr: Tensor, rounded: Tensor, eps: float, numerics: Numerics
    ) -> None:  # fmt: skip
        t, width, depth = x.shape[0], weight.out_features, x.shape[1]
        x, q8 = dense(x), rounds_input(weight, numerics)
        chosen = _tile(QUERY_LATENT, self._launch.target, t, x, weight, q8)
        plan = _Latent.of(chosen, depth, width, _QUERY_ELEMENTS[shape_of(t)])
        grid = plan.grid(t, width)
        parts = torch.empty((plan.splits, t, width), dtype=torch.float32, device=x.device)
        self._launch(
            query_latent_kernel, grid, x, x.stride(0), data_of(weight, self._launch.target), scale_of(weight), gain, qr,
            rounded, parts, self._launch.counters(grid[0]), t, width, depth, plan.span, eps, SPLIT=plan.splits, BM=chosen.m,
            BN=chosen.n, BK=chosen.k, ROWS=plan.rows, NB=plan.block, ENCODING=weight.encoding, Q8=q8,
            OPERAND=operand_type(x, weight), BETWEEN=numerics.bf16_between, Q8_NEXT=rounded is not qr, warps=chosen.warps,
            stages=chosen.stages,
        )  # fmt: skip

    def _heads(
        self, x: Tensor, weight: Weight, table: Tensor, q: Tensor, sums: Tensor, eps: float, numerics: Numerics,
        tokens: int,
    ) -> None:  # fmt: skip
        # tiles by all tokens of the step: the last rows of a prompt are no decode step
        t, heads, dim = q.shape
        chosen = _tile(HEADS, self._launch.target, tokens, x, weight, False)
        block = max(64, power_of_two(dim))
        # heads of a decode step in several tiles whatever their size: small shapes go the way of the released ones
        columns = min(chosen.n, block // (4 if tokens <= DECODE_ROWS else 1))
        per_head = -(-dim // columns)
        finished = _finished(chosen, block, _QUERY_ELEMENTS[shape_of(tokens)])
        grid = (heads * per_head, -(-t // chosen.m))
        self._launch(
            heads_kernel, grid, x, data_of(weight, self._launch.target), scale_of(weight), table, q, sums,
            self._launch.counters(heads * grid[1]), t, heads * dim, x.shape[1], dim, table.shape[1], eps, per_head,
            BM=chosen.m, BN=columns, BK=chosen.k, ROWS=finished, DB=block, ENCODING=weight.encoding,
            OPERAND=operand_type(x, weight), BETWEEN=numerics.bf16_between, NARROW=numerics.bf16_q_norm,
            warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip

    def kv_project_store(
        self, x: Tensor, wkv: Weight, kv_norm: Tensor, rope_table: Tensor, batch: Batch, window: Tensor, eps: float,
        numerics: Numerics, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.kv_project_store`."""
        history = 0 if batch.is_decode else batch.num_sequences * window.shape[1]
        t, dim, depth = x.shape[0], wkv.out_features, x.shape[1]
        x = dense(x)
        y = result(out, (history + t, dim), activation_dtype(numerics), x.device)
        native = window.dtype == torch.uint8
        window16 = window.view(torch.bfloat16) if native else window
        q8, rope = rounds_input(wkv, numerics), rope_table.shape[1]
        chosen = _tile(KV_LATENT, self._launch.target, t, x, wkv, q8)
        plan = _Latent.of(chosen, depth, dim, _KV_ELEMENTS[shape_of(t)])
        grid = plan.grid(t, dim)
        # a launch of its own: the next one writes to the rings
        self._launch(
            history_kernel, (-(-history // _HISTORY_ROWS),), window, window16, batch.slots, y, history, window.shape[1],
            window.shape[2], dim, rope, ROWS=_HISTORY_ROWS, DB=plan.block, NATIVE=native, warps=4, stages=1,
        )  # fmt: skip
        parts = torch.empty((plan.splits, t, dim), dtype=torch.float32, device=x.device)
        self._launch(
            kv_kernel, grid, x, x.stride(0), data_of(wkv, self._launch.target), scale_of(wkv), kv_norm, rope_table,
            y.narrow(0, history, t), window, window16, batch.slots, batch.positions, batch.seq_ids, batch.cu_seqlens, parts,
            self._launch.counters(grid[0]), t, dim, depth, plan.span, rope, window.shape[1], window.shape[2], eps,
            SPLIT=plan.splits, BM=chosen.m, BN=chosen.n, BK=chosen.k, ROWS=plan.rows, DB=plan.block, ENCODING=wkv.encoding,
            Q8=q8, OPERAND=operand_type(x, wkv), BETWEEN=numerics.bf16_between, Q8_KV=numerics.q8_kv, NATIVE=native,
            DECODE=batch.is_decode, warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return deliver(out, y)

    def grouped_out(
        self, o: Tensor, wo_a: Weight, wo_b: Weight, rope_table: Tensor, groups: int, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.grouped_out`; values between the two products are BF16 wherever activations are."""
        (t, _, dim), act = o.shape, activation_dtype(numerics)
        o = o.contiguous()
        z = torch.empty((t, wo_a.out_features), dtype=act, device=o.device)
        chosen = _tile(GROUPS, self._launch.target, t, o, wo_a, False, GROUPS_FLOAT32)
        rank = wo_a.out_features // groups
        self._launch(
            groups_kernel, (-(-t // chosen.m), groups * -(-rank // chosen.n)), o, data_of(wo_a, self._launch.target),
            scale_of(wo_a), rope_table, z, t, rank, wo_a.out_features, wo_a.in_features, dim, rope_table.shape[1],
            BM=chosen.m, BN=chosen.n, BK=chosen.k, ENCODING=wo_a.encoding, OPERAND=operand_type(o, wo_a),
            warps=chosen.warps, stages=chosen.stages,
        )  # fmt: skip
        return self._linear.linear(z, wo_b, numerics, act, out)
