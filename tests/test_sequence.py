"""Going forward in any cut, and back to any point, gives what a fresh sequence gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from torch import Tensor

from v4sdk.engine import Engine, common_prefix
from v4sdk.errors import Cancelled
from v4sdk.kv_cache import KVCache
from v4sdk.loading import Loaded, LoadOptions, open_model
from v4sdk.progress import silent
from v4sdk.sequence import KEPT_TURNS, SequenceState

IDS = [(i * 37 + i * i * 11) % 120 + 3 for i in range(160)]


@pytest.fixture(scope="module")
def loaded(golden: Path) -> Loaded:
    return open_model(golden / "tiny-fp32", LoadOptions("cpu", "exact"), silent)


@pytest.fixture
def engine(loaded: Loaded) -> Engine:
    return _engine(loaded)


def _engine(loaded: Loaded, prefill_chunk: int = 64, snapshot_interval: int = 1 << 20) -> Engine:
    cache = KVCache(loaded.config, "float32", page_tokens=128)
    return Engine(loaded.model, cache, loaded.backend, prefill_chunk, snapshot_interval)


@pytest.fixture(scope="module")
def whole(loaded: Loaded) -> Tensor:
    """Logits after every token of IDS, from one forward pass."""
    engine = _engine(loaded, prefill_chunk=1000)
    state = _state(engine, IDS)
    return engine.advance([state], select=lambda _, first, last: list(range(first, last)))


def _state(engine: Engine, ids: list[int], keeps: bool = False) -> SequenceState:
    state = engine.new_state()
    state.ids, state.keeps = list(ids), keeps
    return state


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("chunk", [1, 3, 16, 50, 129])
def test_chunks_of_any_size_equal_the_whole(loaded: Loaded, whole: Tensor, chunk: int) -> None:
    engine = _engine(loaded, prefill_chunk=chunk)
    length = 160 if chunk > 3 else 40
    state = _state(engine, IDS[:length])
    assert _error(engine.advance([state])[0], whole[length - 1]) <= 1e-5


def test_packed_prompts_of_unequal_lengths_equal_each_alone(loaded: Loaded, whole: Tensor) -> None:
    engine = _engine(loaded, prefill_chunk=48)
    lengths = (5, 131, 1, 17, 64)
    got = engine.advance([_state(engine, IDS[:n]) for n in lengths])
    for row, n in zip(got, lengths, strict=True):
        assert _error(row, whole[n - 1]) <= 1e-5


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 65, 127, 128, 129, 150])
def test_rewind_equals_fresh(engine: Engine, whole: Tensor, n: int) -> None:
    state = _state(engine, IDS, keeps=True)
    state.marks = {60, 140}
    engine.advance([state])
    assert sorted(state.snapshots) == [60, 140]
    nearest = max(s for s in (0, 60, 140) if s <= n)
    assert engine.rewind(state, n) == n - nearest
    assert (state.ids, state.num_cached) == (IDS[:n], n)
    # go on with the same tokens
    state.ids += IDS[n:]
    got = engine.advance([state], select=lambda _, first, last: list(range(first, last)))
    assert float((got - whole[n:]).abs().max()) <= 1e-4


def test_rewind_then_other_tokens_equals_fresh(engine: Engine) -> None:
    other = [(i * 53 + 7) % 120 + 3 for i in range(40)]
    state = _state(engine, IDS, keeps=True)
    engine.advance([state])
    engine.rewind(state, 70)
    state.ids += other
    got = engine.advance([state])
    fresh = engine.advance([_state(engine, IDS[:70] + other)])
    assert float((got - fresh).abs().max()) <= 1e-4


def test_fork_goes_its_own_way(engine: Engine, whole: Tensor) -> None:
    state = _state(engine, IDS[:100], keeps=True)
    engine.advance([state])
    twin = engine.fork(state)
    twin.ids += [9] * 40
    engine.advance([twin])
    state.ids += IDS[100:]
    assert _error(engine.advance([state])[0], whole[-1]) <= 1e-5
    fresh = engine.advance([_state(engine, IDS[:100] + [9] * 40)])
    again = engine.fork(state)
    engine.rewind(again, 100)
    again.ids += [9] * 40
    assert float((engine.advance([again]) - fresh).abs().max()) <= 1e-4


def test_snapshots_are_taken_by_interval_and_old_turns_make_room(loaded: Loaded) -> None:
    engine = _engine(loaded, prefill_chunk=16, snapshot_interval=50)
    state = _state(engine, IDS, keeps=True)
    engine.advance([state])
    assert sorted(state.snapshots) == [64, 128]
    for n in range(130, 130 + 3 * KEPT_TURNS, 3):
        engine.rewind(state, n)
        engine.remember(state)
        state.ids += IDS[:20]
        engine.advance([state])
    assert [n for n in (64, 128) if n in state.snapshots] == [64, 128]
    assert len(state.turns) <= KEPT_TURNS


def test_frequent_turn_ends_do_not_stand_in_for_the_interval(loaded: Loaded) -> None:
    engine = _engine(loaded, prefill_chunk=16, snapshot_interval=50)
    state = _state(engine, [], keeps=True)
    for first in range(0, 160, 10):
        state.ids += IDS[first : first + 10]
        engine.advance([state])
        engine.remember(state)
    # turn ends made room for later ones, so going far back still needs a snapshot of its own
    lasting = sorted(set(state.snapshots) - set(state.turns))
    assert lasting[0] <= 60
    assert all(b - a <= 60 for a, b in pairwise(lasting))
    assert engine.rewind(state, 75) <= 50


def test_nobody_holds_it_nothing_is_kept(engine: Engine) -> None:
    state = _state(engine, IDS)
    state.marks = {40}
    engine.advance([state])
    engine.remember(state)
    assert state.snapshots == {}


def test_exception_in_a_chunk_leaves_the_sequences_at_the_last_one(loaded: Loaded, whole: Tensor) -> None:
    engine = _engine(loaded, prefill_chunk=40)
    first, second = _state(engine, IDS), _state(engine, IDS[:30])
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 6 + 4:  # one before the chunk, one per layer: in the middle of the second chunk
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        engine.advance([first, second], check)
    assert (first.num_cached, second.num_cached) == (40, 0)
    got = engine.advance([first, second])
    assert float((got[0] - whole[159]).abs().max()) <= 1e-4
    assert float((got[1] - whole[29]).abs().max()) <= 1e-4


def test_freed_rows_are_used_again(engine: Engine) -> None:
    state = _state(engine, IDS)
    engine.advance([state])
    size = engine.cache.nbytes
    engine.free(state)
    for _ in range(3):
        state = _state(engine, IDS)
        engine.advance([state])
        engine.free(state)
    assert engine.cache.nbytes == size


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1], [1, 2]) == 1
    assert common_prefix([], [1]) == 0
