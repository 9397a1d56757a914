"""What a decode step costs the host: the whole step with kernels that do nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from v4sdk.backend import Backend, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.decode import DecodeStep, Sampler
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.presets import PRESETS, shrunk
from v4sdk.sampling import PLAIN, SamplingParams
from v4sdk.sequence import SequenceState
from v4sdk.weights import WeightSource
from v4sdk_bench.parity.tiny import draw

_WARM = 3


@dataclass(frozen=True)
class StepOverhead:
    """Host seconds of single tokens, native calls of a step (None: not recorded), and the layers of the schedule."""

    seconds: tuple[float, ...]
    calls: int | None
    layers: int


def step_overhead(backend: Backend, tokens: int = 200) -> StepOverhead | None:
    """Decode tokens of a model with Flash's 43-layer schedule and small matrices while the kernels do nothing.

    Returns:
        None where the backend has no such kernels.
    """
    hollow = backend.hollow()
    if hollow is None:
        return None
    config = flash_schedule()
    with hollow, torch.inference_mode():
        table = bind(backend, config, EngineConfig(FAST, "native", backend.capability())).table
        binder = Binder(
            config,
            WeightSource(draw(config, 0)),
            backend.prepare_weight,
            backend.prepare_experts,
            backend.place,
        )
        model = V4Model(binder, FAST, table)
        cache = KVCache(config, "native", backend.device)
        state = SequenceState(cache.allocate(), [3], 0)
        params = SamplingParams(temperature=0.7, seed=1).over(PLAIN)
        sampler = Sampler([params], [state], [None], config.vocab_size, backend.device)
        step = DecodeStep(model, cache, backend, [state], sampler)
        # what empty kernels draw is whatever lay in memory: it must only be an id
        step_ids = step.batch.token_ids
        seconds = tuple(_timed(step, step_ids, tokens))
        return StepOverhead(seconds, getattr(step.replay, "num_calls", None), config.num_hidden_layers)


def _timed(step: DecodeStep, ids: torch.Tensor, tokens: int) -> Iterator[float]:
    for at in range(_WARM + tokens):
        ids.zero_()
        start = time.perf_counter()
        step.run()
        if at >= _WARM:
            yield time.perf_counter() - start


def flash_schedule() -> ModelConfig:
    """V4-Flash's layers, in their order, at a small width."""
    flash = PRESETS["v4-flash"]
    small = shrunk(
        flash, tuple(layer.ratio for layer in flash.layers), hidden_size=64, num_attention_heads=2, head_dim=64,
        qk_rope_head_dim=32, q_lora_rank=32, o_lora_rank=32, o_groups=2, index_n_heads=2, index_head_dim=32,
        index_topk=8, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=256,
    )  # fmt: skip
    return replace(small, quantization=None, expert_dtype=None)
