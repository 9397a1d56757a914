"""onnxruntime as a third numerical witness: the same weights through another runtime's arithmetic, in `exact` numerics.

What is exported is traced from the references, what is compared with it runs on the backend under test, so a kernel that
computes something else shows here. What both share, the equations of the references, is for the comparison with
transformers to judge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from v4sdk.backend import Backend, EngineConfig, bind
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.errors import V4Error
from v4sdk.kv_cache import KVCache
from v4sdk.loading import bundled_folder
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT
from v4sdk.ops.op import REFERENCES
from v4sdk.weights import WeightSource
from v4sdk_bench.export.trace import (
    Source,
    Traced,
    boundary_tokens,
    chain,
    layers_of_each_kind,
    observed,
    reweighted,
    trace,
)
from v4sdk_bench.export.write import (
    PROVIDER,
    Part,
    block_parts,
    check_size,
    evaluate,
    model_of,
    prefill_part,
    require,
    write,
)
from v4sdk_bench.parity.golden import same_sets
from v4sdk_bench.parity.metrics import agreement, by_bucket, relative_l2
from v4sdk_bench.parity.tiny import draw
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.stage import Bench, BenchError, Stage, now

BLOCK_MAX_ABS = 1e-5
LOGITS_RELATIVE = 1e-5
LOGITS_MAX_ABS = 1e-4
_PREFIX = "parity/onnx"
_WHAT = "v4sdk `exact` against onnxruntime"
_SETS = {">=index_sets_equal": 1.0, ">=route_sets_equal": 1.0}
# of the bundled model's streams up to 2,600 are seen, where one float32 step is 2e-4
_LIMITS_OF_LARGEST = {"max_abs_over_largest": BLOCK_MAX_ABS}


@dataclass(frozen=True)
class Compared:
    """One file's outputs beside ours.

    Attributes:
        values: `max_abs`, `relative_l2`, `largest` (element of ours), `max_abs_over_largest`, and the share of tokens with
            equal sets, `index_sets_equal` and `route_sets_equal`, where there is something to choose.
        theirs: what onnxruntime gave.
    """

    values: dict[str, Value]
    theirs: Mapping[str, Tensor]


def ours(
    config: ModelConfig, tensors: Mapping[str, Tensor], token_ids: Tensor, backend: Backend | None = None
) -> dict[str, Tensor]:
    """Run a prompt through a model on a backend, or on the references, and keep everything a graph shows, on the CPU."""
    block = config.quantization.block if config.quantization else (128, 128)
    source = WeightSource(tensors, block)
    if backend is None:
        binder, table, device = Binder(config, source), REFERENCES, torch.device("cpu")
    else:
        binder = Binder(config, source, backend.prepare_weight, backend.prepare_experts, backend.place)
        engine = EngineConfig(EXACT, "float32", backend.capability())
        table, device = bind(backend, config, engine).table, backend.device
    with torch.inference_mode():
        model = V4Model(binder, EXACT, table)
        cache = KVCache(config, "float32", device)
        batch = cache.batch([cache.allocate()], [token_ids.tolist()], [0])
        found = {name: tensor.cpu() for name, tensor in observed(model, batch, cache.layers).items()}
    return found | {"token_ids": token_ids}


def random_ids(config: ModelConfig, tokens: int, seed: int) -> Tensor:
    """Ids [T] of no text, the same for a seed."""
    return torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))


def compare(path: Path, part: Part, found: Mapping[str, Tensor]) -> Compared:
    """Run a file on what `ours` found in front of it, and compare what comes out."""
    theirs = evaluate(path, found)
    wide = next(name for name in part.outputs if found[name].is_floating_point())
    a, b = theirs[wide], found[wide]
    largest = float(b.abs().max())
    max_abs = float((a.double() - b.double()).abs().max())
    values: dict[str, Value] = {
        "max_abs": max_abs,
        "relative_l2": relative_l2(a, b),
        "largest": largest,
        # streams near 1 are judged as they are
        "max_abs_over_largest": max_abs / max(1.0, largest),
    }
    for kind, name in (("index_topk", "index_sets_equal"), ("route_ids", "route_sets_equal")):
        rows = [same_sets(theirs[n], found[n]) for n in part.outputs if n.startswith(kind)]
        if rows:
            values[name] = float(torch.cat(rows).double().mean())
    return Compared(values, theirs)


def run(bench: Bench) -> Iterator[Row]:
    """Compare the prefill, one block of every kind, and the same blocks with drawn weights."""
    if not bench.wants(_PREFIX):
        return
    try:
        if bench.left() <= 0:
            raise BenchError("the stage's time is up", hint="give it more, without --quick")
        require()
        folder = bench.model or bundled_folder()
        config = ModelConfig.from_folder(folder)
        check_size(
            folder.name, chain(config, range(config.num_hidden_layers)), bench.scratch / "prefill.onnx"
        )
    except V4Error as exc:
        why = f"{exc.message}; {exc.hint}"
        yield not_run(f"{_PREFIX}/prefill", _WHAT, why, command=bench.command(_PREFIX), date=now())
        return
    name = "v4-nano" if bench.model is None else folder.name
    with Checkpoint(folder) as checkpoint:
        source = Source.read(name, checkpoint.fingerprint(), config, checkpoint)
        # a fixed length is traced in half the time; full runs show that a file serves any
        tokens = boundary_tokens(config)
        # nearly all of the time goes here, so the clock is not looked at again
        traced = trace(source, tokens if bench.quick else None, bench.say)
        ids = random_ids(config, tokens, bench.seed)
        bench.say("running both")
        found = ours(config, checkpoint, ids, bench.backend)
    if bench.wants(f"{_PREFIX}/prefill"):
        yield prefill_row(bench, traced, found)
    kinds = layers_of_each_kind(config)
    yield from block_rows(bench, traced, found, kinds, "block", _LIMITS_OF_LARGEST)
    # weights of unit gain keep streams near 1, where the plain difference can be judged
    drawn = replace(source, name=f"{name} with drawn weights", tensors=draw(source.config, bench.seed))
    found = ours(drawn.config, drawn.tensors, ids, bench.backend)
    yield from block_rows(
        bench, reweighted(traced, drawn), found, kinds, "drawn-block", {"max_abs": BLOCK_MAX_ABS}
    )


def prefill_row(bench: Bench, traced: Traced, found: Mapping[str, Tensor]) -> Row:
    """Judge logits of all positions, and every choice on the way."""
    begin, part = time.monotonic(), prefill_part(traced.source.config, with_choices=True)
    result = compare(_written(bench, traced, part), part, found)
    theirs, mine = result.theirs["logits"], found["logits"]
    buckets = by_bucket(mine, theirs, traced.source.config)
    values = (
        agreement(mine, theirs).values()
        | {name: value for name, value in result.values.items() if name.endswith("_equal")}
        | {"relative_l2_by_position": {name: at.relative_l2 for name, at in buckets.items()}}
    )
    limits = {"relative_l2": LOGITS_RELATIVE, "max_abs": LOGITS_MAX_ABS} | _sets(values)
    return _row(bench, traced, part, f"{_PREFIX}/prefill", values, limits, begin)


def block_rows(
    bench: Bench, traced: Traced, found: Mapping[str, Tensor], layers: tuple[int, ...], label: str,
    limits: Mapping[str, float],
) -> Iterator[Row]:  # fmt: skip
    """Judge the embedding, blocks and the head, each on what ours had in front of it.

    Args:
        layers: places in the chain. label: what the keys begin with. limits: of the streams and logits.
    """
    for part in block_parts(traced.source.config, traced.source.layers, layers):
        key, begin = f"{_PREFIX}/{label}/{part.name}", time.monotonic()
        if not bench.wants(key):
            continue
        values = compare(_written(bench, traced, part), part, found).values
        yield _row(bench, traced, part, key, values, {**limits, **_sets(values)}, begin)


def _sets(values: Mapping[str, object]) -> dict[str, float]:
    return {name: limit for name, limit in _SETS.items() if name.removeprefix(">=") in values}


def _written(bench: Bench, traced: Traced, part: Part) -> Path:
    bench.say(f"{part.name} on onnxruntime")
    path: Path = bench.scratch / f"{part.name}.onnx"
    write(model_of(traced, part), path)
    return path


def _row(
    bench: Bench, traced: Traced, part: Part, key: str, values: Mapping[str, Value], limits: Mapping[str, float],
    begin: float,
) -> Row:  # fmt: skip
    import onnxruntime

    setting: dict[str, Value] = {
        "model": traced.source.name,
        "fingerprint": traced.source.fingerprint,
        "numerics": "exact",
        "kv_format": "float32",
        "tokens": boundary_tokens(traced.source.config),
        "graph": "of this length" if traced.tokens else "of any length",
        "witness": f"onnxruntime {onnxruntime.__version__}, {PROVIDER}",
    }
    return Row(
        key, f"{_WHAT}: {part.what}", judged(values, limits), bench.backend.evidence, values, limits, setting,
        command=bench.command(key), seed=bench.seed, seconds=round(time.monotonic() - begin, 3), date=now(),
    )  # fmt: skip


STAGE = Stage("parity/onnx", run, quick_s=40.0, full_s=180.0)
