"""Rotary positions by each pack: a function for every one of them, all of one signature, for the projections that rotate.

All rotate in float32 whatever the tensor's dtype, as the reference does: sines and cosines in BF16 would cost two decimal digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v4sdk.ops.precision import wide

from . import Calls

# (calls, x [T, D] or [T, H, D], table [T, r] cosines first, inverse) -> like x, rotated in its last r dims
Rotate = Callable[[Calls, Tensor, Tensor, bool], Tensor]


def pairs(table: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the vendors read them: one value per channel, twice per pair.

    Shapes:
        table [T, r] float32, cosines first -> [T, r], [T, r]
    """
    cos, sin = (part.repeat_interleave(2, -1) for part in table.chunk(2, -1))
    return cos, -sin if inverse else sin


def stock(to: Calls, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """Rotate the last dims by torch_npu: they are cut out, since it rotates whole heads."""
    width = table.shape[-1]
    plain, tail = torch.split(x, [x.shape[-1] - width, width], -1)
    heads = wide(tail).contiguous().view(1, len(x), -1, width)
    cos, sin = (t.view(1, -1, 1, width) for t in pairs(table, inverse))
    turned = to("npu.npu_rotary_mul", heads, cos, sin, rotary_mode="interleave")
    return torch.cat((plain, turned.view(tail.shape).to(x.dtype)), -1)


def transformer(to: Calls, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """Rotate the last dims in place, of a copy, by cann_ops_transformer."""
    y, cos, sin, part = _in_place(x, table, inverse)
    to(
        "cann_ops_transformer.inplace_partial_rotary_mul",
        y,
        cos,
        sin,
        rotary_mode="interleave",
        partial_slice=part,
    )
    return y.view(x.shape).to(x.dtype)


def vendorpack(to: Calls, x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """The same by vllm-ascend, whose arguments are all positional."""
    y, cos, sin, part = _in_place(x, table, inverse)
    to("_C_ascend.inplace_partial_rotary_mul", y, cos, sin, "interleave", part)
    return y.view(x.shape).to(x.dtype)


def _in_place(x: Tensor, table: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    # every token is a batch of one: the layout [B, 1, 1, D] of sines is the one that all chips list
    y = x.to(torch.float32, copy=True).contiguous().view(len(x), 1, -1, x.shape[-1])
    cos, sin = (t[:, None, None].contiguous() for t in pairs(table, inverse))
    return y, cos, sin, [x.shape[-1] - table.shape[-1], x.shape[-1]]
