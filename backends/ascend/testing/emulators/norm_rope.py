"""RMS norm and rotary positions: `_op_plugin_docs.py` of the torch_npu 2.13.0 wheel, and the documents of the packs' rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .documented import FLOAT, emulates, family, refuse, want_contiguous, want_dtype


@emulates("npu", "npu_rms_norm")
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:  # noqa: A002 - the schema's word
    """y = x / sqrt(mean(x**2) + epsilon) * gamma over the dims of gamma; also the reciprocal root, float32.

    Shapes:
        input of 2 to 8 dims, gamma its last dims and of its dtype -> like input, [.., 1] float32
    """
    want_dtype("input", input, *FLOAT)
    refuse(gamma.dtype != input.dtype, f"gamma is {gamma.dtype}, input {input.dtype}; they must be the same")
    refuse(not 2 <= input.dim() <= 8, f"input has {input.dim()} dims, documented are 2 to 8")
    refuse(
        input.shape[-gamma.dim() :] != gamma.shape,
        f"gamma {list(gamma.shape)} is not the end of {list(input.shape)}",
    )
    over = tuple(range(-gamma.dim(), 0))
    x = input.float()
    root = torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon)
    return (x * root * gamma.float()).to(input.dtype), root


def rotate_pairs(x: Tensor) -> Tensor:
    """Adjacent pairs (a, b) become (-b, a)."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@emulates("npu", "npu_rotary_mul")
def npu_rotary_mul(
    input: Tensor,  # noqa: A002 - the schema's word
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """r1 * x + r2 * rotated(x); `half` swaps the halves of the last dim, `interleave` adjacent pairs.

    Shapes:
        input 4 dims, r1 and r2 of its dtype and broadcast over heads -> like input
    """
    want_dtype("input", input, *FLOAT)
    refuse(rotate is not None, "a matrix `rotate` is not emulated")
    refuse(
        rotary_mode not in ("half", "interleave"),
        f"rotary_mode is `{rotary_mode}`, documented are half and interleave",
    )
    refuse(input.dim() != 4, f"input has {input.dim()} dims, documented are 4")
    refuse(
        {r1.dtype, r2.dtype} != {input.dtype}, f"r1 and r2 are {r1.dtype}, {r2.dtype}, input {input.dtype}"
    )
    d = input.shape[-1]
    refuse(d % 2 != 0 or d >= 896, f"the last dim is {d}, documented are even ones below 896")
    refuse(
        r1.shape != r2.shape or r1.dim() != 4 or r1.shape[-1] != d,
        f"r1 is {list(r1.shape)}, r2 {list(r2.shape)}",
    )
    if family() != "950" and rotary_mode == "interleave":
        # one of the layouts BNSD, BSND, SBND: only the dim of positions is long
        long = [i for i in range(3) if r1.shape[i] != 1]
        refuse(
            len(long) > 1, f"r1 is {list(r1.shape)}; interleaved it may be long in one dim beside the last"
        )
        heads = input.shape[0] * (input.shape[2] if long != [2] else input.shape[1])
        refuse(heads >= 1000, f"batch times heads is {heads}, documented are less than 1000")
    x = input.float()
    half = d // 2
    swapped = (
        rotate_pairs(x) if rotary_mode == "interleave" else torch.cat((-x[..., half:], x[..., :half]), -1)
    )
    return (r1.float() * x + r2.float() * swapped).to(input.dtype)


def _rotate_part(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: Sequence[int]) -> None:
    want_dtype("x", x, *FLOAT)
    want_dtype("r1", r1, *FLOAT)
    want_contiguous(x=x, r1=r1, r2=r2)
    refuse(rotary_mode != "interleave", f"rotary_mode is `{rotary_mode}`, documented is interleave")
    refuse(r1.dtype != r2.dtype or r1.shape != r2.shape, "r1 and r2 differ in dtype or shape")
    refuse(
        x.dim() != 4 or r1.dim() != 4 or 0 in x.shape,
        f"x is {list(x.shape)}, documented are 4 dims, none empty",
    )
    refuse(
        x.shape[-1] > 1024 or x.shape[-1] % 2 != 0,
        f"the last dim is {x.shape[-1]}, documented are even ones to 1024",
    )
    refuse(len(partial_slice) != 2, f"partial_slice is {list(partial_slice)}, expected start and end")
    start, end = partial_slice
    refuse(
        not 0 <= start <= end <= x.shape[-1] or (end - start) % 2 != 0,
        f"partial_slice is {list(partial_slice)}",
    )
    refuse(
        r1.shape[-1] != end - start, f"r1 has a last dim of {r1.shape[-1]}, the slice is {end - start} wide"
    )
    b, s, n, _ = x.shape
    listed = {(b, s, 1), (b, 1, 1)}
    if family() == "950":
        listed |= {(b, s, n), (b, 1, n), (1, 1, 1)}
    refuse(
        tuple(r1.shape[:3]) not in listed,
        f"r1 is {list(r1.shape)} for x {list(x.shape)}, documented are {sorted(listed)}",
    )
    part = x[..., start:end].float()
    x[..., start:end] = (part * r1.float() + rotate_pairs(part) * r2.float()).to(x.dtype)


@emulates("cann_ops_transformer", "inplace_partial_rotary_mul")
def inplace_partial_rotary_mul(
    x: Tensor,
    r1: Tensor,
    r2: Tensor,
    *,
    rotary_mode: str = "interleave",
    partial_slice: Sequence[int] = (0, 0),
) -> None:
    """Rotate adjacent pairs of x[..., start:end] in place: part * r1 + rotated(part) * r2.

    Shapes:
        x [B, S, N, D] contiguous, r1 and r2 [B, S or 1, 1, end - start] of one float dtype
    """
    _rotate_part(x, r1, r2, rotary_mode, partial_slice)


@emulates("_C_ascend", "inplace_partial_rotary_mul")
def c_inplace_partial_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: Sequence[int]
) -> None:
    """The same of the other pack, whose last two arguments are positional and have no default."""
    _rotate_part(x, r1, r2, rotary_mode, partial_slice)
