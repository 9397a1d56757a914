"""Manifold-constrained hyper-connections: launches over columns write back and sum, a launch over tokens mixes and collapses."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.hyper_connection import finish_kernel, streams_kernel, sums_kernel
from .launch import Launch, deliver, result
from .operands import dense, power_of_two
from .tiles import Table, Tile, shape_of, tile

# m: tokens, n: columns of every stream. A decode step takes as many programs as there are multiprocessors
TILES: Table = {
    ("any", "decode"): Tile(1, 32, 0, 4, 1),
    ("any", "prefill"): Tile(32, 128, 0, 8, 1),
}
# m: tokens, k: values of one step; a part sums _SPAN of them, so that a row's sums have the same order in every prompt
SUM_TILES: Table = {
    ("any", "decode"): Tile(64, 32, 32, 4, 3),
    ("any", "prefill"): Tile(64, 32, 32, 4, 3),
    # with a depth of 32 the compiler spills
    ("100", "prefill"): Tile(64, 32, 64, 4, 3),
}
_SPAN = 1024
# tokens whose matrices one program makes doubly stochastic
_TOGETHER = {"decode": 1, "prefill": 32}
# values of streams that one program collapses at most, unless one token has more
_COLLAPSED = 1 << 14


class HyperConnection:
    """The stream ops."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def _streams(
        self, x: Tensor, write: tuple[Tensor, Tensor, Tensor, Tensor] | None, fn: Tensor | None
    ) -> Tensor:
        """Write back and sum up: `write` is (y, post, comb, streams out).

        Returns:
            the parts [T, splits, row] of the mixes (see the kernels), none without `fn`
        """
        t, m, n = x.shape
        chosen = tile(TILES, self._launch.target, t)
        count, many = 0 if fn is None else fn.shape[0], chosen.m > 1
        splits = -(-m * n // _SPAN) if many else -(-n // chosen.n)
        # the sum of squares stands behind the others; no product is narrower than 16
        row = max(16, power_of_two(count + 1))
        parts = torch.empty((t, splits if count else 0, row), dtype=torch.float32, device=x.device)
        y, post, comb, streams = write or (x, None, None, None)
        y = dense(y)
        if write is not None or not many:
            self._launch(
                streams_kernel, (-(-t // chosen.m), -(-n // chosen.n)), y, y.stride(0), x, post, comb, streams, fn, parts, t, n,
                M=m, WRITE=write is not None, COUNT=0 if many else count, ROW=row, BM=chosen.m, BN=chosen.n,
                warps=chosen.warps, stages=chosen.stages,
            )  # fmt: skip
        if fn is not None and many:
            chosen = tile(SUM_TILES, self._launch.target, t)
            self._launch(
                sums_kernel, (-(-t // chosen.m), splits), x if streams is None else streams, fn, parts, t, m * n, _SPAN,
                COUNT=count, ROW=row, BM=chosen.m, BK=chosen.k, warps=chosen.warps, stages=chosen.stages,
            )  # fmt: skip
        return parts

    def _finish(
        self, x: Tensor, mix: tuple[Tensor, Tensor, Tensor], parts: Tensor, u: Tensor,
        made: tuple[Tensor, Tensor] | None, gain: Tensor | None, iterations: int, norm_eps: float, hc_eps: float,
    ) -> None:  # fmt: skip
        """From the parts to `u`, and to `made`, the (post, comb) of the next sub-layer."""
        t, m, n = x.shape
        together = _TOGETHER[shape_of(t)]
        groups = 0 if made is None else -(-t // together)
        post, comb = made or (None, None)
        block = power_of_two(n)
        rows = max(1, _COLLAPSED // (power_of_two(m) * block))
        self._launch(
            finish_kernel, (groups + -(-t // rows),), x, parts, mix[1], mix[2], gain, u, post, comb, t, n, parts.shape[1], groups,
            iterations, norm_eps, hc_eps, M=m, MP=power_of_two(m), COUNT=mix[0].shape[0], NORM=gain is not None,
            SP=power_of_two(parts.shape[1]), ROW=parts.shape[2], BT=together, BC=rows,
            BLOCK=block, warps=16 if block > 4096 else 8, stages=1,
        )  # fmt: skip

    def hc_pre(
        self, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float,
        out: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.hc_pre`."""
        t, m, n = x.shape
        u, post, comb = out or (None, None, None)
        x, fn, u = x.contiguous(), fn.contiguous(), result(u, (t, n), x.dtype, x.device)
        post = result(post, (t, m), torch.float32, x.device)
        comb = result(comb, (t, m, m), torch.float32, x.device)
        parts = self._streams(x, None, fn)
        self._finish(x, (fn, base, scale), parts, u, (post, comb), None, iterations, norm_eps, hc_eps)
        return deliver(out, (u, post, comb))

    def hc_post(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.hc_post`."""
        streams = result(out, tuple(x.shape), x.dtype, x.device)
        self._streams(x.contiguous(), (y, post.contiguous(), comb.contiguous(), streams), None)
        return deliver(out, streams)

    def hc_post_pre(
        self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
        norm_weight: Tensor, iterations: int, norm_eps: float, hc_eps: float,
        out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.hc_post_pre`."""
        t, m, n = x.shape
        streams, u, next_post, next_comb = out or (None, None, None, None)
        streams = result(streams, (t, m, n), x.dtype, x.device)
        u = result(u, (t, n), x.dtype, x.device)
        next_post = result(next_post, (t, m), torch.float32, x.device)
        next_comb = result(next_comb, (t, m, m), torch.float32, x.device)
        fn = fn.contiguous()
        parts = self._streams(x.contiguous(), (y, post.contiguous(), comb.contiguous(), streams), fn)
        self._finish(streams, (fn, base, scale), parts, u, (next_post, next_comb), norm_weight, iterations,
                     norm_eps, hc_eps)  # fmt: skip
        return deliver(out, (streams, u, next_post, next_comb))

    def hc_head(
        self, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.hc_head`."""
        u = result(out, (x.shape[0], x.shape[2]), x.dtype, x.device)
        x, fn = x.contiguous(), fn.contiguous()
        parts = self._streams(x, None, fn)
        self._finish(x, (fn, base, scale), parts, u, None, None, 0, norm_eps, hc_eps)
        return deliver(out, u)
