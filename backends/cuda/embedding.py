"""Token rows into streams, and rotary tables."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.precision import activation_dtype

from .kernels.embedding import embed_kernel, rope_table_kernel
from .launch import Launch, deliver, result
from .operands import power_of_two

# columns and values of one program of `embed`, and rows of one program of `rope_table`
_COLUMNS = 1024
_VALUES = 4096
_ROWS = 16


class Embedding:
    """What depends on ids and positions alone."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def embed(
        self, token_ids: Tensor, weight: Tensor, hc_mult: int, numerics: Numerics, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.embed`."""
        t, n = token_ids.shape[0], weight.shape[1]
        y = result(out, (t, hc_mult, n), activation_dtype(numerics), weight.device)
        block = min(_COLUMNS, power_of_two(n))
        tokens = _VALUES // block
        self._launch(
            embed_kernel, (-(-t // tokens), -(-n // block)), token_ids.contiguous(), weight, weight.stride(0), y, t, n,
            M=hc_mult, BT=tokens, BLOCK=block, warps=4, stages=1,
        )  # fmt: skip
        return deliver(out, y)

    def rope_table(self, positions: Tensor, inv: Tensor, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.rope_table`."""
        t, half = positions.shape[0], inv.shape[0]
        table = result(out, (t, 2 * half), torch.float32, positions.device)
        self._launch(
            rope_table_kernel, (-(-t // _ROWS),), positions.contiguous(), inv.contiguous(), table, t, half, BT=_ROWS,
            BH=power_of_two(half), warps=4, stages=1,
        )  # fmt: skip
        return deliver(out, table)
