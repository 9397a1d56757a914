"""One token for each of several sequences, from buffers made once; and the sampling inputs that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v4sdk import ops as o
from v4sdk.backend import Backend
from v4sdk.kv_cache import KVCache
from v4sdk.model import V4Model
from v4sdk.ops.batch import Batch
from v4sdk.sampling import SamplingParams, uniforms
from v4sdk.sequence import SequenceState

# uniforms are computed this many positions at a time
_AHEAD = 64


class Constraint(Protocol):
    """What the next token may be, e.g. a grammar."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next, [vocab_size]."""

    def accept(self, index: int, /) -> None:
        """Move on by the token that was taken."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one generated token, before bias and filters.

    Attributes:
        top: the likeliest tokens at this place with theirs, falling.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Sampling inputs for a fixed set of rows.

    Args:
        params: per row, with every value filled in. states: per row. constraints: per row.
    """

    def __init__(
        self, params: Sequence[SamplingParams], states: Sequence[SequenceState],
        constraints: Sequence[Constraint | None], vocab_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._states, self._device, self._params = states, device, params
        self._constraints = constraints
        self._greedy = all(p.is_greedy for p in params)
        self.num_top = max(p.top_logprobs for p in params)
        self._wants = any(p.logprobs for p in params)
        numbers = [(p.temperature or 0.0, p.top_p or 1.0, p.min_p or 0.0) for p in params]
        by_name = torch.tensor(numbers, dtype=torch.float32).T.contiguous().to(device)
        self._temperature = None if self._greedy else by_name[0]
        self._top_p, self._min_p = by_name[1], by_name[2]
        self._top_k = torch.tensor([p.top_k or 0 for p in params], dtype=torch.int32, device=device)
        self._uniform = torch.zeros(len(params), device=device)
        self._ahead: list[tuple[int, list[float]]] = [(0, [])] * len(params)
        self._fixed_bias = self._bias(vocab_size)
        self._current_bias = None if self._fixed_bias is None else self._fixed_bias.clone()

    def _bias(self, vocab_size: int) -> Tensor | None:
        if not any(p.logit_bias for p in self._params) and not any(self._constraints):
            return None
        bias = torch.zeros(len(self._params), vocab_size)
        for row, p in zip(bias, self._params, strict=True):
            for index, value in p.logit_bias.items():
                row[index] = value
        return bias.to(self._device)

    def prepare(self) -> None:
        """Set what depends on the positions: uniforms and constraints. Called before each draw."""
        if not self._greedy:
            drawn = [self._next_uniform(row) for row in range(len(self._states))]
            self._uniform.copy_(torch.tensor(drawn, dtype=torch.float32))
        if self._current_bias is None or self._fixed_bias is None:
            return
        for row, constraint in enumerate(self._constraints):
            if constraint:
                barred = torch.from_numpy(~constraint.allowed()).to(self._device)
                self._current_bias[row] = self._fixed_bias[row].masked_fill(barred, float("-inf"))

    def _next_uniform(self, row: int) -> float:
        state = self._states[row]
        at, (first, values) = len(state.ids), self._ahead[row]
        if not first <= at < first + len(values):
            values = uniforms(state.seed or 0, state.stream, at, _AHEAD)
            first = at
            self._ahead[row] = first, values
        return values[at - first]

    def draw(self, model: V4Model, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the op on the prepared inputs; nothing is read on the host."""
        return model.ops[o.sample](
            logits, self._current_bias, self._temperature, self._top_k, self._top_p, self._min_p, self._uniform,
            self.num_top,
        )  # fmt: skip

    def read(self, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[TokenLogprob]:
        """Bring the drawn tokens to the host; log-probabilities only where somebody asked for them."""
        ids = drawn[0].tolist()
        for constraint, index in zip(self._constraints, ids, strict=True):
            if constraint:
                constraint.accept(index)
        if not self._wants:
            return [TokenLogprob(index, 0.0) for index in ids]
        logprobs, tops, top_logprobs = drawn[1].tolist(), drawn[2].tolist(), drawn[3].tolist()
        return [
            TokenLogprob(index, lp, tuple(zip(top[: p.top_logprobs], top_lp[: p.top_logprobs], strict=True)))
            for index, lp, top, top_lp, p in zip(ids, logprobs, tops, top_logprobs, self._params, strict=True)
        ]


class DecodeStep:
    """Feeds one pending token per sequence and draws the next, over buffers that keep their addresses.

    Valid until a sequence needs a new page, the cache moves, or the set of sequences changes.
    """

    def __init__(
        self,
        model: V4Model,
        cache: KVCache,
        backend: Backend,
        states: Sequence[SequenceState],
        sampler: Sampler,
    ) -> None:
        self._model, self._cache, self._states, self._sampler = model, cache, states, sampler
        self._batch = cache.batch(
            [s.rows for s in states], [[s.ids[s.num_cached]] for s in states], [s.num_cached for s in states]
        )
        page = cache.page_tokens
        # steps until the first sequence has filled its last page
        self.steps_left = min(len(s.rows.pages) * page - s.num_cached for s in states)
        self._generation = cache.generation
        self._drawn: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._replay = backend.record(self.advance)

    @property
    def is_spent(self) -> bool:
        """A step must be made anew: a page is full, or the cache has moved under the recorded addresses."""
        return self.steps_left == 0 or self._generation != self._cache.generation

    @property
    def replay(self) -> Callable[[], None]:
        """What the backend made of the step."""
        return self._replay

    @property
    def batch(self) -> Batch:
        """The buffers."""
        return self._batch

    @property
    def drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the last step gave, in buffers too: the results of the op `sample`."""
        assert self._drawn is not None
        return self._drawn

    def advance(self) -> None:
        """The step on the device alone: from the pending tokens to the next ones. Reads no value on the host."""
        streams = self._model.forward(self._batch, self._cache)
        drawn = self._sampler.draw(self._model, self._model.logits(streams))
        if self._drawn is None:
            self._drawn = drawn
        else:
            for kept, new in zip(self._drawn, drawn, strict=True):
                kept.copy_(new)
        # the next step feeds what this one drew
        self._model.ops[o.feed](self._drawn[0], self._batch.token_ids, self._batch.positions)

    def run(self) -> list[TokenLogprob]:
        """Advance every sequence by one token and append what was drawn."""
        self._sampler.prepare()
        self._replay()
        self.steps_left -= 1
        tokens = self._sampler.read(self.drawn)
        for state, token in zip(self._states, tokens, strict=True):
            state.num_cached += 1
            state.ids.append(token.id)
        return tokens
