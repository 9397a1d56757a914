"""The numeric probe: a vendor's function on small inputs of the released head sizes, held against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from v4sdk.numerics import FAST, REFERENCE, Numerics
from v4sdk.ops import inputs
from v4sdk.ops.inputs import CHUNK, FLASH, PREFILL, Draw, Make
from v4sdk.ops.op import Op

# heads and head sizes as released, everything else small: a probe takes milliseconds
SMALL = replace(
    FLASH, name="probe", hidden=512, q_rank=256, o_rank=128, experts=8, intermediate=256, vocab=512, topk=64
)
# by op: arguments, and numerics in which a library takes them
_PROBES: Mapping[str, tuple[tuple[Make, Numerics], ...]] = {
    "sparse_attn": tuple((inputs.sparse_attn(kind), FAST) for kind in ("swa", "csa", "hca")),
    "linear": ((inputs.linear, REFERENCE),),
    "hc_post": ((inputs.hc_post, FAST),),
}


def difference(op: Op[..., Any], function: Callable[..., Any], device: torch.device) -> str | None:
    """What differs from the reference by more than the op allows, in words; None if nothing does.

    Raises:
        KeyError: nobody has said which inputs this op is probed with.
    """
    for make, numerics in _PROBES[op.name]:
        for layout in (PREFILL, CHUNK):
            # drawn for each side anew: the same values, and neither can write into the other's
            got, want = (
                run(**make(Draw(f"probe-{layout.name}", device), SMALL, numerics, layout))
                for run in (function, op)
            )
            if got.shape != want.shape or got.dtype != want.dtype:
                return f"{got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
            allowed = op.tolerances[want.dtype]
            off = ~torch.isclose(got.float(), want.float(), rtol=allowed.rtol, atol=allowed.atol)
            if bool(off.any()):
                apart = float((got.float() - want.float()).abs().max())
                return f"{int(off.sum())} of {off.numel()} values by up to {apart:.3g}"
    return None
