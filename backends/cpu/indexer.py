"""The lightning indexer's choice of entries."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch

from .arguments import (
    Cache,
    Rows,
    Step,
    address,
    cache,
    deliver,
    int32,
    int64,
    pointer,
    result,
    rows,
    step,
    structure,
)
from .kernels import Library

IndexCall = structure(
    "IndexCall",
    ("q w", Rows),
    ("keys", Cache),
    ("picks", pointer),
    ("step", Step),
    ("heads dim topk ratio", int64),
    ("bf16_scores unused", int32),
)


class Indexer:
    """Scores and picks."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def index_topk(
        self, q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `v4sdk.ops.index_topk`."""
        t, heads, dim = q.shape
        picks = result(out, (t, topk), torch.int32)
        q = q.contiguous()
        call = IndexCall(
            rows(q.view(t, heads * dim)), rows(w), cache(keys), address(picks), step(batch), heads, dim, topk, ratio,
            numerics.bf16_index_scores, 0,
        )  # fmt: skip
        self._library.run("index_topk", call, q, w, keys, batch, picks)
        return deliver(out, picks)
