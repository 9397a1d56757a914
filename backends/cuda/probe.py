"""The numeric probe: a vendor's function on small inputs of the released head sizes, held against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from v4sdk.numerics import FAST
from v4sdk.ops import inputs
from v4sdk.ops.inputs import CHUNK, FLASH, PREFILL, Draw, Make
from v4sdk.ops.op import Op
from v4sdk.testing.arguments import clone, map_tensors, tensors
from v4sdk.testing.compare import compare, describe, tolerance_for

from .launch import Launch

# heads and head sizes as released, everything else small: a probe takes milliseconds
SMALL = replace(
    FLASH, name="probe", hidden=512, q_rank=256, o_rank=128, experts=8, intermediate=256, vocab=512, topk=64
)
_MAKERS: dict[str, tuple[Make, ...]] = {
    "sparse_attn": tuple(inputs.sparse_attn(kind) for kind in ("swa", "csa", "hca")),
}


def difference(op: Op[..., Any], function: Callable[..., Any], launch: Launch) -> str | None:
    """What differs from the reference by more than the op allows, in words; None if nothing does.

    Raises:
        KeyError: nobody has said which inputs this op is probed with.
    """
    device = torch.device("cuda" if launch.target.evidence == "device" else "cpu")
    for make in _MAKERS[op.name]:
        for layout in (PREFILL, CHUNK):
            drawn = make(Draw(f"probe-{layout.name}", torch.device("cpu")), SMALL, FAST, layout)
            given = map_tensors(drawn, lambda tensor: tensor.to(device))
            got = function(**clone(given))
            for a, e in zip(tensors(got), tensors(op(**given)), strict=True):
                found = compare(a, e, tolerance_for(op, e.dtype, FAST))
                if not found.ok:
                    return describe(found)
    return None
