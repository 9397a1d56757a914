"""Token rows into streams, and rotary tables."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.precision import activation_dtype

from .arguments import Rows, address, deliver, int64, pointer, result, rows, structure
from .kernels import Library

EmbedCall = structure(
    "EmbedCall", ("token_ids", pointer), ("weight y", Rows), ("tokens streams width", int64)
)
RopeTableCall = structure("RopeTableCall", ("positions inv_freq table", pointer), ("tokens half", int64))


class Embedding:
    """What depends on ids and positions alone."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def embed(
        self, token_ids: Tensor, weight: Tensor, hc_mult: int, numerics: Numerics, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.embed`."""
        t, n = token_ids.shape[0], weight.shape[1]
        y = result(out, (t, hc_mult, n), activation_dtype(numerics))
        call = EmbedCall(address(token_ids), rows(weight), rows(y.view(t, hc_mult * n)), t, hc_mult, n)
        self._library.run("embed", call, token_ids, weight, y)
        return deliver(out, y)

    def rope_table(self, positions: Tensor, inv: Tensor, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.rope_table`."""
        half = inv.shape[0]
        table = result(out, (positions.shape[0], 2 * half), torch.float32)
        call = RopeTableCall(address(positions), address(inv), address(table), positions.shape[0], half)
        self._library.run("rope_table", call, positions, inv, table)
        return deliver(out, table)
