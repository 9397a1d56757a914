"""What the context costs a decoded token: rows that attention reads, entries that are kept, picks, and time.

Ops run as the backend binds them, on their own generated inputs at the shape of V4-Flash; whole steps run on the model under
test. A long context is made, not read: rows of the cache are random, which costs what real ones cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from v4sdk import Session
from v4sdk import ops as o
from v4sdk.backend import Backend, EngineConfig, bind
from v4sdk.loading import Loaded
from v4sdk.numerics import FAST, REFERENCE
from v4sdk.ops import inputs
from v4sdk.ops.op import Cost, Op, OpTable
from v4sdk.ops.rows import entry_rows
from v4sdk.presets import V4_FLASH
from v4sdk.testing.arguments import on_backend
from v4sdk_bench.speed.op_counts import counted
from v4sdk_bench.speed.synthetic_kv import fill
from v4sdk_bench.speed.timing import Paired, paired

_HOST = torch.device("cpu")
# the byte no cache row of a working model is full of: NaN in FP8 and in UE8M0
_NAN_BYTE = 0xFF


def op_table(backend: Backend) -> OpTable:
    """The functions a backend would run V4-Flash with."""
    return bind(backend, V4_FLASH, EngineConfig(FAST, "native", backend.capability())).table


def attention_arguments(backend: Backend, num_tokens: int, seed: int) -> dict[str, Any]:
    """Arguments of `sparse_attn` for a CSA layer of V4-Flash that decodes one token at a context of `num_tokens`."""
    layout = inputs.Layout(f"decode-{num_tokens}", (num_tokens - 1,), (1,))
    draw = inputs.Draw(f"context-{num_tokens}-{seed}", _HOST)
    return on_backend(inputs.sparse_attn("csa")(draw, inputs.FLASH, FAST, layout), backend)


def poisoned(arguments: dict[str, Any], keep: int | None = None) -> dict[str, Any]:
    """The same arguments with NaN in every entry that is not picked.

    Args:
        keep: only the first so many picks keep their rows, to see that a poisoned row is noticed.
    """
    entries, picks = arguments["entries"], arguments["picks"]
    rows = entry_rows(arguments["batch"].block_table, picks, entries.shape[1], entries.shape[0])[picks >= 0]
    if keep is not None:
        rows = rows[:keep]
    foul = torch.full_like(entries, _NAN_BYTE)
    foul.flatten(0, 1)[rows] = entries.flatten(0, 1)[rows]
    return arguments | {"entries": foul}


@dataclass(frozen=True)
class Reading:
    """Attention of one decoded token.

    Attributes:
        rows: window rows and picked entries. entries: visible ones. differing: outputs that change when all entries but the
            picked ones are overwritten with NaN.
    """

    rows: int
    entries: int
    differing: int


def attention_reading(backend: Backend, num_tokens: int, seed: int = 0) -> Reading:
    """Count the rows attention is told to read, and check that it reads no other."""
    arguments = attention_arguments(backend, num_tokens, seed)
    attend = op_table(backend)[o.sparse_attn]
    clean, foul = attend(**arguments), attend(**poisoned(arguments))
    picked = int((arguments["picks"] >= 0).sum())
    # NaN is not equal to itself, so it counts
    return Reading(picked + arguments["window"].shape[1], num_tokens // 4, int((clean != foul).sum()))


def attention_growth(
    backend: Backend, short: int, long: int, budget_s: float, seed: int = 0
) -> tuple[Paired, float, float]:
    """Time of that call at a long context and at a short one: (measured, ratio of bytes, ratio of FLOPs)."""
    attend = op_table(backend)[o.sparse_attn]
    deep, near = (attention_arguments(backend, n, seed) for n in (long, short))
    a, b = _cost(o.sparse_attn, deep), _cost(o.sparse_attn, near)
    times = paired(lambda: attend(**deep), lambda: attend(**near), budget_s, sync=backend.synchronize)
    return times, a.bytes / b.bytes, a.flops / b.flops


def score_recall(
    backend: Backend, num_tokens: int, queries: int, seed: int = 0, positive: bool = False
) -> float:
    """Share of the top-k picks with float32 scores that BF16 scores find too, over random queries and keys.

    Args:
        positive: head weights without sign, under which scores lie closer together.
    """
    layout = inputs.Layout("recall", (num_tokens - queries,), (queries,))
    arguments = inputs.index_topk(inputs.Draw(f"recall-{seed}", _HOST), inputs.FLASH, FAST, layout)
    if positive:
        arguments["w"] = arguments["w"].abs()
    arguments = on_backend(arguments, backend)
    pick = op_table(backend)[o.index_topk]
    exact, rounded = (pick(**arguments | {"numerics": numerics}).tolist() for numerics in (FAST, REFERENCE))
    shares = [len(set(x) & set(y)) / len(x) for x, y in zip(exact, rounded, strict=True)]
    return sum(shares) / len(shares)


def experts_per_token(backend: Backend) -> tuple[int, int, int]:
    """Route random tokens at the shape of V4-Flash: (fewest, most distinct experts of a token, experts to choose from)."""
    draw = inputs.Draw("route", _HOST)
    arguments = on_backend(inputs.route(draw, inputs.FLASH, FAST, inputs.PREFILL), backend)
    ids, _ = op_table(backend)[o.route](**arguments)
    distinct = [len(set(row)) for row in ids.tolist()]
    return min(distinct), max(distinct), arguments["gate"].shape[0]


@contextmanager
def opened(backend: Backend, model: str | None) -> Iterator[Loaded]:
    """The parts of the model under test, with native rows."""
    with Session.load(model, backend=backend, numerics="fast", kv_format="native") as session:
        yield session.loaded


def entries_written(loaded: Loaded, num_tokens: int) -> dict[int, list[int]]:
    """Read random tokens and count the cache rows that appear: compression ratio to entries, layer by layer."""
    cache = loaded.cache
    random = torch.Generator().manual_seed(num_tokens)
    with torch.inference_mode():
        rows = cache.allocate()
        try:
            cache.reserve(rows, num_tokens)
            for layer in cache.layers:
                for tensor in layer.paged().values():
                    tensor.fill_(_NAN_BYTE)
            ids = torch.randint(loaded.config.vocab_size, (num_tokens,), generator=random).tolist()
            loaded.model.forward(cache.batch([rows], [ids], [0]), cache)
            found: dict[int, list[int]] = {}
            for spec, layer in zip(cache.specs, cache.layers, strict=True):
                if layer.entries is not None:
                    written = (layer.entries[rows.pages] != _NAN_BYTE).any(-1)
                    found.setdefault(spec.ratio, []).append(int(written.sum()))
        finally:
            cache.release(rows)
    return found


@dataclass(frozen=True)
class Growth:
    """One decode step at a long context over one at a short context.

    Attributes:
        times: measured, long first. bytes, flops: the same ratio of what the ops must move and compute.
    """

    times: Paired
    bytes: float
    flops: float


def decode_growth(loaded: Loaded, short: int, long: int, budget_s: float) -> Growth:
    """Time one decode step behind `long` and behind `short` tokens of context, in turns, and count both."""
    with torch.inference_mode():
        deep, near = _step(loaded, long), _step(loaded, short)
        a, b = _step_cost(loaded, deep), _step_cost(loaded, near)
        times = paired(deep, near, budget_s, sync=loaded.backend.synchronize)
    return Growth(times, a.bytes / b.bytes, a.flops / b.flops)


def _step(loaded: Loaded, context: int) -> Callable[[], object]:
    rows = loaded.cache.allocate()
    fill(loaded.cache, rows, context)
    batch = loaded.cache.batch([rows], [[1]], [context])
    return lambda: loaded.model.logits(loaded.model.forward(batch, loaded.cache))


def _step_cost(loaded: Loaded, step: Callable[[], object]) -> Cost:
    with counted(loaded.model, costs=True) as table:
        step()
    total: Cost = table.cost
    return total


def _cost(op: Op[Any, Any], arguments: dict[str, Any]) -> Cost:
    assert op.cost is not None
    return op.cost(**arguments)
