"""Manifold-constrained hyper-connections: one kernel writes back, collapses and normalises, in whichever part is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Rows, address, deliver, float32, int32, int64, pointer, result, rows, structure
from .kernels import Library

HyperCall = structure(
    "HyperCall",
    ("y_in x_in x_out u_out", Rows),
    ("post_in comb_in post_out comb_out fn base scale", pointer),
    ("norm_weight", Rows),
    ("tokens streams width", int64),
    ("iterations head", int32),
    ("norm_eps hc_eps", float32),
)


class HyperConnection:
    """The stream ops."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def _run(
        self, x: Tensor, *, write: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        mix: tuple[Tensor, Tensor, Tensor] | None = None, u: Tensor | None = None,
        made: tuple[Tensor, Tensor] | None = None, norm: Tensor | None = None,
        iterations: int = 0, norm_eps: float = 0.0, hc_eps: float = 0.0,
    ) -> None:  # fmt: skip
        """`write` is (y, post, comb, streams out), `mix` is (fn, base, scale), `made` is (post, comb) of the next sub-layer."""
        t, m, n = x.shape
        y, post, comb, streams = write or (None, None, None, None)
        fn, base, scale = mix or (None, None, None)
        next_post, next_comb = made or (None, None)
        flat = None if streams is None else streams.view(t, m * n)
        call = HyperCall(
            rows(y), rows(x.view(t, m * n)), rows(flat), rows(u), address(post), address(comb), address(next_post),
            address(next_comb), address(fn), address(base), address(scale), rows(norm), t, m, n, iterations,
            mix is not None and made is None, norm_eps, hc_eps,
        )  # fmt: skip
        self._library.run("hyper", call, x, write, mix, u, made, norm)

    def hc_pre(
        self, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, norm_eps: float, hc_eps: float,
        out: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.hc_pre`."""
        t, m, n = x.shape
        u, post, comb = out or (None, None, None)
        u = result(u, (t, n), x.dtype)
        post, comb = result(post, (t, m), torch.float32), result(comb, (t, m, m), torch.float32)
        self._run(x.contiguous(), mix=(fn, base, scale), u=u, made=(post, comb), iterations=iterations,
                  norm_eps=norm_eps, hc_eps=hc_eps)  # fmt: skip
        return deliver(out, (u, post, comb))

    def hc_post(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.hc_post`."""
        streams = result(out, tuple(x.shape), x.dtype)
        self._run(x.contiguous(), write=(y, post, comb, streams))
        return deliver(out, streams)

    def hc_post_pre(
        self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
        norm_weight: Tensor, iterations: int, norm_eps: float, hc_eps: float, out: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.hc_post_pre`."""
        t, m, n = x.shape
        streams, u, next_post, next_comb = out or (None, None, None, None)
        streams, u = result(streams, (t, m, n), x.dtype), result(u, (t, n), x.dtype)
        next_post = result(next_post, (t, m), torch.float32)
        next_comb = result(next_comb, (t, m, m), torch.float32)
        self._run(
            x.contiguous(), write=(y, post, comb, streams), mix=(fn, base, scale), u=u, made=(next_post, next_comb),
            norm=norm_weight, iterations=iterations, norm_eps=norm_eps, hc_eps=hc_eps,
        )  # fmt: skip
        return deliver(out, (streams, u, next_post, next_comb))

    def hc_head(
        self, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.hc_head`."""
        u = result(out, (x.shape[0], x.shape[2]), x.dtype)
        self._run(x.contiguous(), mix=(fn, base, scale), u=u, norm_eps=norm_eps, hc_eps=hc_eps)
        return deliver(out, u)
