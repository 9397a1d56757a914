"""What calls the kernels: functions with the signatures of the steps they stand for. No value is read on the host, so a decode
step that calls them can be recorded.

One is a provider, `hc_pre`. `rope`, `rotate` and `swiglu_quant` are proven and compiled, and no provider calls them yet.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.errors import ShapeError

from ..chip import FAMILIES, Family
from ..providers import Provider
from .tiles import TILES

_STORED = (torch.bfloat16, torch.float16, torch.float32)


def unavailable() -> str | None:
    """Why kernels cannot run in this process; None if they can. Reads metadata and imports nothing."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return None
    try:
        version("triton-ascend")
    except PackageNotFoundError:
        return "triton-ascend is not installed"
    return None


def rotate(family: Family, x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of the last r dims of x in place, and give x.

    Shapes:
        x [T, D] or [T, H, D] bfloat16, float16 or float32, rows contiguous; table [T, r] float32, cosines first
    Edge rules:
        no token, no launch. Arithmetic in float32, rounded once.
    Raises:
        ShapeError: the shapes, the layout or the dtype are others.
    """
    half = table.shape[-1] // 2
    wrong = x.dim() not in (2, 3) or x.shape[-1] < 2 * half or x.stride(-1) != 1 or x.dtype not in _STORED
    if wrong or table.shape != (x.shape[0], 2 * half) or table.stride(-1) != 1:
        raise ShapeError(
            f"rope is given x {list(x.shape)} of {x.dtype} and a table {list(table.shape)}, "
            "expected [T, D] or [T, H, D] of at most float32 with contiguous rows, and [T, r] with r <= D"
        )
    rows = x if x.dim() == 3 else x[:, None]
    tokens, heads, dim = rows.shape
    if tokens and heads and half:
        from .rope import rope_kernel

        tile = TILES[family]
        rope_kernel[tile.programs(tokens)](
            rows, table, tokens, rows.stride(0), rows.stride(1), table.stride(0),
            **tile.rope(heads, dim, half, inverse),
        )  # fmt: skip
    return x


def rope(family: Family, x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """The same into a fresh tensor: signature and result of `v4sdk.ops.rope.rope`, once the family is given."""
    return rotate(family, x.clone(memory_format=torch.contiguous_format), table, inverse)


def hc_pre(
    family: Family,
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hc_pre`, once the family is given: products and the weighted sum by torch, all between them in one kernel.

    Shapes:
        x [T, M, N], fn [(2 + M) * M, M * N] f32, base [(2 + M) * M] f32, scale [3] f32
        -> u [T, N] dtype of x, post [T, M] f32, comb [T, M, M] f32
    """
    tokens, m, _ = x.shape
    streams = x.float()
    flat = streams.flatten(1)
    products, mean_square = flat @ fn.T, flat.square().mean(-1)
    pre, post = (torch.empty(tokens, m, dtype=torch.float32, device=x.device) for _ in range(2))
    comb = torch.empty(tokens, m, m, dtype=torch.float32, device=x.device)
    if tokens:
        from .mixes import mixes_kernel

        tile = TILES[family]
        constants = tile.mixes(tokens, m)
        mixes_kernel[tile.programs(-(-tokens // constants["BT"]))](
            products, mean_square, base, scale, pre, post, comb, tokens, iterations, norm_eps, hc_eps, **constants
        )  # fmt: skip
    u = torch.einsum("tm,tmn->tn", pre, streams).to(x.dtype)
    return u, post, comb


def swiglu_quant(
    family: Family, gate: Tensor, up: Tensor, weights: Tensor | None, limit: float
) -> tuple[Tensor, Tensor]:
    """Clamped SwiGLU, times the routing weight, as int8 with one scale per row.

    a = weight * silu(min(gate, limit)) * clamp(up, -limit, limit) in float32; scale = max |a| / 127; code = a / scale to the
    nearest, ties to even.

    Shapes:
        gate, up [R, I] bfloat16, float16 or float32 with equal strides, halves of one product are fine; weights [R] f32 or None
        -> codes [R, I] int8, scales [R] float32
    Edge rules:
        a row of zeros has codes and scale 0; no row, no launch.
    Raises:
        ShapeError: the shapes, the layout or the dtype are others.
    """
    same = gate.shape == up.shape and gate.stride() == up.stride() and gate.dtype == up.dtype
    if not same or gate.dim() != 2 or gate.stride(-1) != 1 or gate.dtype not in _STORED:
        raise ShapeError(
            f"swiglu is given {list(gate.shape)} of {gate.dtype} and {list(up.shape)} of {up.dtype}, expected two of [R, I] of "
            "at most float32 with equal strides and contiguous rows"
        )
    if weights is not None and weights.shape != gate.shape[:1]:
        raise ShapeError(f"swiglu is given weights {list(weights.shape)}, expected [{gate.shape[0]}]")
    rows, width = gate.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=gate.device)
    scales = torch.empty(rows, dtype=torch.float32, device=gate.device)
    if rows and width:
        from .swiglu import swiglu_kernel

        tile = TILES[family]
        factors = scales if weights is None else weights.float().contiguous()
        swiglu_kernel[tile.programs(rows)](
            gate, up, factors, codes, scales, rows, gate.stride(0), limit, **tile.swiglu(width, weights is not None)
        )  # fmt: skip
    return codes, scales


def _unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    if engine.numerics.float64:
        return "kernels compute in float32, and float64 is asked for"
    return unavailable()


# tried after every pack and before parts; the others are steps inside ops, which today run on torch or a pack
PROVIDERS: tuple[Provider, ...] = tuple(
    Provider("hc_pre", "kernels", (), frozenset({family}), partial(hc_pre, family), _unless)
    for family in FAMILIES
)
