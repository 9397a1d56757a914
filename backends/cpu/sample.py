"""From logits to one token per row, and on to the next step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import address, deliver, int64, pointer, result, structure
from .kernels import Library

SampleCall = structure(
    "SampleCall",
    ("logits bias temperature top_k top_p min_p uniform ids logprobs top_ids top_logprobs", pointer),
    ("tokens vocab top", int64),
)
FeedCall = structure("FeedCall", ("drawn token_ids positions", pointer), ("tokens", int64))


class Sample:
    """The end of a step."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def sample(
        self, logits: Tensor, bias: Tensor | None, temperature: Tensor | None, top_k: Tensor, top_p: Tensor,
        min_p: Tensor, uniform: Tensor, num_top: int, out: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `v4sdk.ops.sample`."""
        t, vocab = logits.shape
        ids, logprobs, top_ids, top_logprobs = out or (None, None, None, None)
        top = min(num_top, vocab)
        ids, logprobs = result(ids, (t,), torch.int64), result(logprobs, (t,), torch.float32)
        top_ids = result(top_ids, (t, top), torch.int64)
        top_logprobs = result(top_logprobs, (t, top), torch.float32)
        given = (logits, bias, temperature, top_k, top_p, min_p, uniform)
        made = (ids, logprobs, top_ids, top_logprobs)
        call = SampleCall(*(address(x) for x in (*given, *made)), t, vocab, top)
        self._library.run("sample", call, given, made)
        return deliver(out, made)

    def feed(self, drawn: Tensor, token_ids: Tensor, positions: Tensor) -> None:
        """See `v4sdk.ops.feed`."""
        call = FeedCall(address(drawn), address(token_ids), address(positions), drawn.shape[0])
        self._library.run("feed", call, drawn, token_ids, positions)
