"""One loaded model: is it right, how fast are batches, what is a step made of, and which of two numerics is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from v4sdk import Session
from v4sdk.engine import Engine
from v4sdk.ops.op import Cost
from v4sdk.sequence import SequenceState
from v4sdk_bench.parity.metrics import agreement, relative_l2
from v4sdk_bench.speed.frontier import Probe, engine_of, probe, random_ids
from v4sdk_bench.speed.op_counts import LibraryCalls, counted

# in exact numerics only the order of summation differs; in the others a rounding may fall to its other side
EXACT_LIMIT, KL_LIMIT = 1e-4, 2e-3
_READ, _DECODED = 32, 8


@dataclass(frozen=True)
class Gate:
    """Decoding against reading the same tokens at once.

    Attributes:
        exact: relative L2 of the logits in exact numerics. kl_mean: in the numerics that are timed. finite: all are numbers.
    """

    exact: float
    kl_mean: float
    finite: bool


def gate(exact: Session, timed: Session, seed: int = 0) -> Gate:
    """Read 40 tokens at once, and 32 with 8 decoded after them; the last 8 rows of logits are compared."""
    whole, steps = _both_ways(exact, seed)
    rounded, decoded = _both_ways(timed, seed)
    finite = all(bool(torch.isfinite(t).all()) for t in (whole, steps, rounded, decoded))
    return Gate(relative_l2(steps, whole), agreement(rounded, decoded).kl_mean, finite)


def _both_ways(session: Session, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(session, _READ + _DECODED, seed)
    whole = session.logits(ids, range(_READ, len(ids)))
    engine = engine_of(session)
    state = engine.new_state()
    try:
        state.ids = ids[:_READ]
        engine.advance([state])
        rows = []
        for token in ids[_READ:]:
            state.ids.append(token)
            rows.append(engine.advance([state])[0])
        return whole, torch.stack(rows)
    finally:
        engine.free(state)


@dataclass(frozen=True)
class Batch:
    """Steps that decode one token of each of `size` sequences."""

    size: int
    probe: Probe


def batch(session: Session, size: int, context: int, steps: int, seed: int = 0) -> Batch:
    """Decode several sequences of `context` tokens at once, each forked from the same prompt."""
    engine = engine_of(session)
    states = [_read(engine, session, context, seed)]
    try:
        while len(states) < size:
            states.append(engine.fork(states[0]))
        probe(engine, states, 2)
        return Batch(size, probe(engine, states, steps))
    finally:
        for state in states:
            engine.free(state)


@dataclass(frozen=True)
class Calls:
    """One decode step of one sequence: op calls by name, calls of torch below them, and the sum of the ops' costs."""

    ops: dict[str, int]
    torch_calls: int
    cost: Cost


def calls(session: Session, context: int, seed: int = 0) -> Calls:
    """Count what one decoded token takes."""
    step = decode_step(session, context, seed)
    with counted(session.loaded.model, costs=True) as table:
        step()
    with LibraryCalls() as library:
        step()
    return Calls(dict(table.calls), sum(library.calls.values()), table.cost)


def decode_step(session: Session, context: int, seed: int = 0) -> Callable[[], object]:
    """A step that decodes the same token at the same place whenever it is called; what it writes, it writes again."""
    engine = engine_of(session)
    state = _read(engine, session, context, seed)
    model, cache = session.loaded.model, session.loaded.cache
    with torch.inference_mode():
        packed = cache.batch([state.rows], [[state.ids[-1]]], [state.num_cached])

    def step() -> object:
        with torch.inference_mode():
            logits = model.logits(model.forward(packed, cache))
            engine.backend.synchronize()
            return logits

    return step


def _read(engine: Engine, session: Session, context: int, seed: int) -> SequenceState:
    """A sequence of `context` tokens with one more pending."""
    state = engine.new_state()
    state.ids = random_ids(session, context, seed)
    engine.advance([state])
    state.ids.append(0)
    return state


def aggregate(size: int, steps: Sequence[float]) -> float:
    """Tokens per second of all sequences together."""
    return size / statistics.median(steps)
