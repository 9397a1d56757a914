"""A decode step reads no value on the host and keeps its buffers, so that a backend may record and replay it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from v4sdk import plugins
from v4sdk.config import ModelConfig
from v4sdk.convert import TORCH_DTYPES
from v4sdk.decode import DecodeStep, Sampler
from v4sdk.engine import Engine
from v4sdk.kv_cache import KVCache
from v4sdk.loading import LoadOptions, open_model
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import KVFormat, numerics
from v4sdk.progress import silent
from v4sdk.sampling import PLAIN, SamplingParams
from v4sdk.sequence import SequenceState
from v4sdk.tensors import expected_tensors
from v4sdk.weights import ExpertWeights, WeightSource, stack

DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=1, logit_bias={5: 1.0}, top_logprobs=2).over(PLAIN)


def _packed(role: str, experts: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))


@pytest.mark.parametrize(
    ("folder", "name", "fmt", "params"),
    [
        ("tiny-fp32", "exact", "float32", DRAWN),
        ("tiny-quant", "reference", "native", SamplingParams(temperature=0).over(PLAIN)),
        ("tiny-quant", "fast", "bf16", DRAWN),
    ],
)
def test_decode_step_reads_nothing_on_the_host(
    golden: Path, folder: str, name: str, fmt: KVFormat, params: SamplingParams
) -> None:
    config = ModelConfig.from_folder(golden / folder)
    with torch.no_grad(), FakeTensorMode():
        tensors = {
            s.name: torch.empty(s.shape, dtype=TORCH_DTYPES[s.dtypes[0]]) for s in expected_tensors(config)
        }
        model = V4Model(Binder(config, WeightSource(tensors), prepare_experts=_packed), numerics(name))
        cache = KVCache(config, fmt)
        states = [SequenceState(cache.allocate(), [3] * (n + 1), n) for n in (5, 130, 260)]
        sampler = Sampler([params] * 3, states, [None] * 3, config.vocab_size, torch.device("cpu"))
        step = DecodeStep(model, cache, plugins.select("cpu"), states, sampler)
        for _ in range(2):
            step.advance()
        assert tuple(step.batch.token_ids.shape) == (3,)


def test_buffers_keep_their_addresses(golden: Path) -> None:
    loaded = open_model(golden / "tiny-fp32", LoadOptions("cpu", "exact"), silent)
    engine = Engine(loaded.model, loaded.cache, loaded.backend, 1024, 1 << 20)
    states = [engine.new_state() for _ in range(2)]
    for n, state in enumerate(states):
        state.ids = list(range(3, 9 + n))
    sampler = Sampler([DRAWN] * 2, states, [None] * 2, loaded.config.vocab_size, torch.device("cpu"))
    engine.first_tokens(sampler, states, engine.advance(states))
    step = engine.decode_step(states, sampler)
    addresses = set()
    for _ in range(4):
        engine.decode(step, states)
        buffers = (step.batch.token_ids, step.batch.positions, *step.drawn)
        addresses.add(tuple(t.data_ptr() for t in buffers))
        assert step.batch.positions.tolist() == [s.num_cached for s in states]
        assert step.batch.token_ids.tolist() == [s.ids[-1] for s in states]
    assert len(addresses) == 1


def test_step_is_renewed_where_a_page_is_full(golden: Path) -> None:
    loaded = open_model(golden / "tiny-fp32", LoadOptions("cpu", "exact"), silent)
    cache = KVCache(loaded.config, "float32", page_tokens=128)
    engine = Engine(loaded.model, cache, loaded.backend, 1024, 1 << 20)
    state = engine.new_state()
    state.ids = [7] * 126
    greedy = SamplingParams(temperature=0).over(PLAIN)
    sampler = Sampler([greedy], [state], [None], loaded.config.vocab_size, torch.device("cpu"))
    engine.first_tokens(sampler, [state], engine.advance([state]))
    step = engine.decode_step([state], sampler)
    assert step.steps_left == 2
    engine.decode(step, [state])
    engine.decode(step, [state])
    assert step.steps_left == 0
    assert engine.decode_step([state], sampler).steps_left == 128
