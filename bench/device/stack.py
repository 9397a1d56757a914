"""Decode steps of a stack of real layers on one device: as many of the model's layers as fit, with weights and context made up.

A step's time is that of its layers; nothing is extrapolated to the layers that are not there.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.backend import Backend, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache, kv_bytes
from v4sdk.loading import bundled_folder
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.ops.batch import Batch
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.tensors import expected_tensors
from v4sdk.weights import WeightSource
from v4sdk_bench.device.drawn import DrawnTensors
from v4sdk_bench.device.replayed import Subject, evidence_of, is_timed, row, unrecorded
from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.speed.ceilings import free_bytes
from v4sdk_bench.speed.op_counts import counted
from v4sdk_bench.speed.synthetic_kv import fill
from v4sdk_bench.stage import OUT_OF_TIME, Bench

BATCHES, CONTEXTS = (1, 8, 32), (8192, 131_072, 1_048_576)
_QUICK_CONTEXTS = (8192,)
_TOYS = ((1, 300), (2, 40))
_QUICK_LAYERS = 4
# besides weights: caches, workspaces, the step's activations
_KEPT_FREE_BYTES = 14_000_000_000
_USABLE = 0.94
_BUDGET_S = {True: 0.5, False: 3.0}


@dataclass
class Stack:
    """A truncated model on the device.

    Attributes:
        layers_of: how many the whole model has. weight_bytes: as stored. without_kernel: ops that run their reference.
    """

    name: str
    config: ModelConfig
    layers_of: int
    model: V4Model
    weight_bytes: int
    without_kernel: tuple[str, ...]

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"{self.name}, {len(self.config.layers)} of {self.layers_of} layers"


def run(bench: Bench) -> Iterator[Row]:
    """Rows `device/stack/<model>/<batch>/<context>`."""
    red = bench.wrong("device/conformance/")
    key = "device/stack/flash" if is_timed(bench) else "device/stack/toy"
    if red is not None:
        yield not_run(
            key, "a stack of layers, decoding", f"no time: {red.key} failed", command=bench.command(key)
        )
        return
    with torch.inference_mode():
        stack = build(bench)
        for batch, context in _settings(bench):
            where = f"{key}/{batch}/{context}"
            if not bench.wants(where):
                continue
            what = f"{stack.words}: a decode step of {batch} at {context:,} tokens"
            kv, free = batch * kv_bytes(stack.config, context, "native"), free_bytes(bench.backend)
            if bench.left() < 20:
                yield not_run(where, what, OUT_OF_TIME, command=bench.command(where))
            elif free is not None and 1.4 * kv > free:
                yield not_run(
                    where,
                    what,
                    f"the caches take {kv:,} bytes, {free:,} are free",
                    command=bench.command(where),
                )
            else:
                bench.say(what)
                yield _step_row(bench, stack, where, what, batch, context)
                gc.collect()


def _settings(bench: Bench) -> Iterator[tuple[int, int]]:
    if not is_timed(bench):
        yield from _TOYS
        return
    for context in _QUICK_CONTEXTS if bench.quick else CONTEXTS:
        for batch in BATCHES:
            yield batch, context


def layers_that_fit(config: ModelConfig, budget: int) -> int:
    """How many of the first layers fit into `budget` bytes beside embedding and head."""
    sizes: dict[int, int] = {}
    for spec in expected_tensors(config):
        if spec.block == "backbone":
            sizes[spec.shard] = sizes.get(spec.shard, 0) + spec.nbytes
    last = config.num_hidden_layers + 2
    left, count = budget - sizes[1] - sizes[last], 0
    for shard in range(2, last):
        left -= sizes[shard]
        if left < 0:
            break
        count += 1
    return count


def build(bench: Bench) -> Stack:
    """Draw a model: Flash as far as it fits on a device, the bundled model's shapes in an emulation."""
    backend = bench.backend
    if is_timed(bench):
        free = free_bytes(backend) or 0
        count = (
            _QUICK_LAYERS
            if bench.quick
            else layers_that_fit(V4_FLASH, int(free * _USABLE) - _KEPT_FREE_BYTES)
        )
        whole, name = V4_FLASH, "flash"
    else:
        whole, name = ModelConfig.from_folder(bundled_folder()), "toy"
        count = len(whole.layers)
    config = shrunk(whole, whole.compress_ratios[:count])
    bench.say(f"stack: drawing {count} of {whole.num_hidden_layers} layers of {name}")
    binding = bind(backend, config, EngineConfig(FAST, "native", backend.capability()))
    source = WeightSource(DrawnTensors(config, backend.device, bench.seed))
    binder = Binder(config, source, backend.prepare_weight, backend.prepare_experts, backend.place)
    nbytes = sum(spec.nbytes for spec in expected_tensors(config))
    return Stack(name, config, whole.num_hidden_layers, V4Model(binder, FAST, binding.table), nbytes,
                 tuple(row.op for row in binding.without_kernel))  # fmt: skip


class Step:
    """One decode step over a made-up context; always the same tokens at the same positions."""

    def __init__(self, stack: Stack, backend: Backend, batch: int, context: int, seed: int) -> None:
        self._model = stack.model
        self.cache = KVCache(stack.config, "native", backend.device)
        rows = [self.cache.allocate() for _ in range(batch)]
        for at, one in enumerate(rows):
            fill(self.cache, one, context, seed + at)
        ids = [[(7 * at + 1) % stack.config.vocab_size] for at in range(batch)]
        self.batch: Batch = self.cache.batch(rows, ids, [context - 1] * batch)
        ones = torch.ones(batch, device=backend.device)
        self._sampling = (
            torch.zeros(batch, dtype=torch.int32, device=backend.device),
            ones,
            ones * 0,
            ones * 0.5,
        )
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        """Run it; logits stay in one place, so that a replay can be compared."""
        found = self._model.logits(self._model.forward(self.batch, self.cache))
        self._model.ops[o.sample](found, None, None, *self._sampling, 0)
        if self.logits is None:
            self.logits = found
        else:
            self.logits.copy_(found)


def _step_row(bench: Bench, stack: Stack, key: str, what: str, batch: int, context: int) -> Row:
    backend = bench.backend
    step = Step(stack, backend, batch, context, bench.seed)
    with counted(stack.model, costs=True) as table:
        step()
    assert step.logits is not None
    first = step.logits.clone()
    recorded = backend.record(step)
    # as it is, captured, replayed
    for _ in range(3):
        recorded()
    backend.synchronize()
    same, reason = bool(torch.equal(step.logits, first)), unrecorded(recorded)
    launches = backend.launches(step) or {}
    checked: dict[str, Value] = {
        "replay_differs": float(not same), "not_recorded": float(reason is not None),
        "not_finite": int((~torch.isfinite(first)).sum()), "launches": sum(launches.values()),
        "launches_by_kernel": dict(sorted(launches.items())), "layers": len(stack.config.layers), "of_layers": stack.layers_of,
        "weight_bytes": stack.weight_bytes, "kv_bytes": step.cache.nbytes,
    }  # fmt: skip
    setting: dict[str, Value] = {
        "model": stack.name,
        "layers": len(stack.config.layers),
        "batch": batch,
        "context": context,
    }
    bare = stack.without_kernel
    subject = Subject(
        key, what, table.cost, "bfloat16", setting, checked, {"replay_differs": 0.0, "not_recorded": 0.0, "not_finite": 0.0},
        evidence_of(bench, not bare),
    )  # fmt: skip
    note = "weights and context are drawn; not extrapolated to more layers"
    note += f"; without a kernel: {', '.join(bare)}" if bare else ""
    note += f"; no time: the step was not recorded: {reason}" if reason else ""
    return _with_rates(row(bench, subject, [step], _BUDGET_S[bench.quick], note), batch)


def _with_rates(found: Row, batch: int) -> Row:
    from dataclasses import replace

    seconds = found.values.get("kernel_median_s")
    if not isinstance(seconds, float):
        return found
    values: Mapping[str, Any] = {**found.values, "steps_per_s": 1 / seconds, "tokens_per_s": batch / seconds}
    return replace(found, values=values)
