"""A recorded decode step gives what the step itself gives, in few native calls and without a tensor call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from v4sdk import Session, plugins
from v4sdk.decode import DecodeStep, Sampler
from v4sdk.loading import Loaded, LoadOptions, open_model
from v4sdk.progress import silent
from v4sdk.sampling import PLAIN, SamplingParams
from v4sdk.sequence import SequenceState

MOST_CALLS_PER_LAYER = 20


class Calls(TorchDispatchMode):
    """Every tensor call by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def native() -> Any:
    backend = plugins.select("cpu")
    if backend.hollow() is None:
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    return backend


def decode_step(loaded: Loaded, params: SamplingParams, lengths: tuple[int, ...] = (3,)) -> DecodeStep:
    states = [SequenceState(loaded.cache.allocate(), [5] * (n + 1), n, seed=1) for n in lengths]
    sampler = Sampler(
        [params] * len(states), states, [None] * len(states), loaded.config.vocab_size, torch.device("cpu")
    )
    return DecodeStep(loaded.model, loaded.cache, loaded.backend, states, sampler)


@pytest.fixture
def loaded(native: Any) -> Iterator[Loaded]:
    with torch.inference_mode():
        yield open_model(None, LoadOptions(native), silent)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replay_equals_the_step(loaded: Loaded, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_logprobs=2).over(PLAIN)
    recorded, plain = decode_step(loaded, params, (3, 150)), decode_step(loaded, params, (3, 150))
    found = []
    for _ in range(12):
        recorded.run()
        found.append([t.clone() for t in recorded.drawn])
    for drawn in found:
        plain._sampler.prepare()
        plain.advance()
        for state, token in zip(plain._states, plain.drawn[0].tolist(), strict=True):
            state.ids.append(token)
        assert all(torch.equal(a, b) for a, b in zip(plain.drawn, drawn, strict=True))


def test_a_step_has_few_native_calls_and_no_tensor_call(loaded: Loaded) -> None:
    step = decode_step(loaded, SamplingParams(temperature=0).over(PLAIN))
    step.run()
    replay: Any = step.replay
    assert replay.outside == ()
    assert replay.num_calls <= MOST_CALLS_PER_LAYER * loaded.config.num_hidden_layers
    with Calls() as calls:
        step.replay()
    assert calls.names == []


def test_a_step_that_computes_outside_the_kernels_is_not_replayed(native: Any) -> None:
    x = torch.zeros(1)
    step = native.record(lambda: x.add_(1))
    for _ in range(3):
        step()
    assert step.num_calls is None
    assert step.outside == ("add_",)
    assert x.item() == 3


def test_a_moved_cache_ends_a_recorded_step(loaded: Loaded) -> None:
    step = decode_step(loaded, SamplingParams(temperature=0).over(PLAIN))
    step.run()
    assert not step.is_spent
    rows = loaded.cache.allocate()
    loaded.cache.reserve(rows, 20 * loaded.cache.page_tokens)
    assert step.is_spent


def test_two_streams_in_turns_answer_as_alone(native: Any, tmp_path: Path) -> None:
    """The second stream grows the cache while the first is being replayed."""
    params = SamplingParams(temperature=0, max_tokens=16)
    with Session.load(backend=native) as session:
        alone = [session.generate(p, params).ids for p in ("copy: 'red'", "sort: b a c")]
    with Session.load(backend=native) as session:
        first, second = (session.stream(p, params) for p in ("copy: 'red'", "sort: b a c"))
        found: list[list[int]] = [[], []]
        streams = [first, second]
        while any(streams):
            for i, stream in enumerate(streams):
                piece = next(stream, None) if stream else None
                if piece is None:
                    streams[i] = None  # type: ignore[call-overload]
                else:
                    found[i] += piece.ids
    assert [tuple(ids) for ids in found] == alone
