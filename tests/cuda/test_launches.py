"""A decode step of Flash, all 43 layers on tensors without memory: how many kernels start, ours and torch's."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from v4sdk import ops as o
from v4sdk.backend import EngineConfig, bind
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.ops.batch import Batch
from v4sdk.ops.op import OpTable
from v4sdk.presets import V4_FLASH
from v4sdk.tensors import expected_tensors
from v4sdk.weights import ExpertWeights, Weight, WeightSource

README = Path(__file__).resolve().parent.parent.parent / "README.md"
# the numbers that users read
CLAIM = re.compile(
    r"a token of V4-Flash takes (\d+) launches: (\d+) in a CSA layer, (\d+) in HCA, (\d+) in a window layer"
)
# what gives memory or another look at it, and starts nothing
NO_LAUNCH = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "prim::device",
}  # fmt: skip
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I8": torch.int8,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}  # fmt: skip


class Tally(TorchDispatchMode):
    """Counts what starts a kernel, by layer, by op of the vocabulary, and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, str, str]] = Counter()
        self.layer, self.op = -1, ""

    def note(self, name: str) -> None:
        self.counts[self.layer, self.op, name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not func.is_view and name not in NO_LAUNCH:
            self.note(name)
        return func(*args, **(kwargs or {}))


class Unlinked(TorchFunctionMode):
    """What torch built without CUDA refuses on fake tensors of a GPU, as the dispatched calls it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is Tensor.__getitem__:
            return _taken(*args)
        if func is Tensor.__setitem__ and isinstance(args[2], Tensor):
            return aten.copy_.default(_taken(*args[:2]), args[2])
        if func is Tensor.copy_:
            return aten.copy_.default(*args)
        if func is Tensor.contiguous:
            return (
                args[0]
                if args[0].is_contiguous()
                else aten.clone.default(args[0], memory_format=torch.contiguous_format)
            )
        return func(*args, **(kwargs or {}))


def _taken(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        missing = x.dim() - sum(i is not None and i is not Ellipsis for i in index)
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    dim, gathered = 0, list[Any]()
    for i in index:
        if isinstance(i, Tensor):
            gathered += [None] * (dim - len(gathered)) + [i]
            dim += 1
        elif i is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1), dim + 1
        else:
            x = x.select(dim, i)
    return torch.ops.aten.index.Tensor(x, gathered) if gathered else x


class Attributed(OpTable):
    """A table that tells the tally which op runs."""

    def __init__(self, table: OpTable, tally: Tally) -> None:
        super().__init__({})
        self._table, self._tally = table, tally

    def __getitem__(self, op: Any) -> Any:
        function = self._table[op]

        def run(*args: Any, **kwargs: Any) -> Any:
            self._tally.op = op.name
            try:
                return function(*args, **kwargs)
            finally:
                self._tally.op = ""

        return run


class Unread(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, without memory; experts of one shape share one, since nobody looks at them."""

    def __init__(self) -> None:
        self._specs = {spec.name: spec for spec in expected_tensors(V4_FLASH)}
        self._shared: dict[Any, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        key = (spec.shape, spec.dtypes[0]) if ".experts." in name else name
        if key not in self._shared:
            self._shared[key] = torch.empty(spec.shape, dtype=DTYPES[spec.dtypes[0]], device="cuda")
        return self._shared[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def stacked(role: str, experts: ExpertWeights) -> ExpertWeights:
    """The experts of one layer as a device gets them."""

    def stack(weights: tuple[Weight, ...]) -> Weight:
        one, count = weights[0], len(weights)
        data = torch.empty((count, *one.data.shape), dtype=torch.uint8, device="cuda")
        assert one.scale is not None
        scale = torch.empty((count, *one.scale.shape), dtype=torch.uint8, device="cuda")
        return Weight(data, scale, one.encoding, one.block, one.quantised)

    return ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))


def counting_backend(tally: Tally) -> Any:
    """The CUDA backend as of an H200, whose launches are only counted."""
    door = importlib.import_module("v4sdk_cuda.launch")
    target = importlib.import_module("v4sdk_cuda.target").described(90, "compiled")

    class Counted(door.Launch):  # type: ignore[misc, name-defined]
        def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **how: Any) -> None:
            if 0 not in grid:
                tally.note(kernel.fn.__name__)

        def counters(self, count: int) -> Tensor:
            # made once, long before a step
            return torch.empty(count, dtype=torch.int32, device="cuda")

    backend = importlib.import_module("v4sdk_cuda.backend").CudaBackend()
    vars(backend).update(target=target, launch=Counted(target, torch.device("cuda")))
    return backend


def empty_batch(cache: KVCache, rows: int) -> Batch:
    """One token of each of several sequences, deep in a context."""
    cache.allocate()
    for _ in range(1, rows):
        cache.allocate()
    pages = 8

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    cache._grow_pages(rows * pages)
    return Batch(
        integers(rows, dtype=torch.int64), integers(rows), integers(rows + 1), integers(rows), integers(rows, pages),
        integers(rows, dtype=torch.int64), cache.page_tokens,
    )  # fmt: skip


def bound(tally: Tally) -> Attributed:
    """The functions of a run on an H200, whose launches are only counted; made before tensors are without memory."""
    engine = EngineConfig(FAST, FAST.default_kv_format, {"arch": 90})
    return Attributed(bind(counting_backend(tally), V4_FLASH, engine).table, tally)


def step(table: Attributed, tally: Tally, rows: int) -> None:
    """Run one decode step, from pending tokens to the next ones."""
    model = V4Model(Binder(V4_FLASH, WeightSource(Unread()), prepare_experts=stacked), FAST, table)
    cache = KVCache(V4_FLASH, FAST.default_kv_format, torch.device("cuda"))
    batch = empty_batch(cache, rows)
    numbers = [torch.empty(rows, device="cuda") for _ in range(3)]
    top_k = torch.empty(rows, dtype=torch.int32, device="cuda")
    with tally:
        tally.layer = -1
        streams = model.forward(batch, cache, on_layer=lambda i: setattr(tally, "layer", i))
        tally.layer = V4_FLASH.num_hidden_layers
        logits = model.logits(streams)
        drawn = table[o.sample](logits, None, numbers[0], top_k, *numbers, 0)
        table[o.feed](drawn[0], batch.token_ids, batch.positions)


def tabulated(tally: Tally) -> str:
    """Launches of a layer of each kind and of what lies around, by op."""
    kinds = {spec.index: spec.kind + ("+hash" if spec.hash_routing else "") for spec in V4_FLASH.layers}
    columns = [*dict.fromkeys(kinds.values()), "around"]
    layers = {kind: [i for i, k in kinds.items() if k == kind] for kind in columns}
    lines = []
    for name in [*dict.fromkeys(op for _, op, _ in tally.counts)]:
        cells = []
        for kind in columns:
            of = {
                i: sum(n for (layer, op, _), n in tally.counts.items() if layer == i and op == name)
                for i in layers[kind]
            }
            outside = sum(n for (i, op, _), n in tally.counts.items() if i not in kinds and op == name)
            cells.append(str(outside) if kind == "around" else "/".join(map(str, sorted(set(of.values())))))
        lines.append(f"{name or '(model)':18}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join([f"{'op':18}" + "".join(f"{kind:>10}" for kind in columns), *lines])


def per_layer(tally: Tally) -> dict[int, int]:
    """Launches of each layer."""
    found: Counter[int] = Counter()
    for (layer, _, _), count in tally.counts.items():
        found[layer] += count
    return {spec.index: found[spec.index] for spec in V4_FLASH.layers}


def without_kernel() -> list[str]:
    """Ops of a decode step that have no kernel yet."""
    served = {row.op.name for row in counting_backend(Tally()).kernels()}
    # parts alone, in fused ops that have kernels
    return sorted(set(o.OPS) - served - {"linear", "rms_norm", "hc_pre", "hc_post"})


def claimed() -> tuple[int, dict[str, int]]:
    """Launches per token, and per layer of each kind, as README states them."""
    found = CLAIM.findall(README.read_text(encoding="utf-8"))
    assert len(found) == 1, f"README states the launches of a token {len(found)} times, expected once"
    total, csa, hca, swa = map(int, found[0])
    return total, {"csa": csa, "hca": hca, "swa": swa}


@pytest.mark.parametrize("rows", [1, 8])
def test_a_decode_step_of_flash_starts_as_many_kernels_as_readme_says(rows: int) -> None:
    missing = without_kernel()
    tally = Tally()
    table = bound(tally)
    with torch.no_grad(), FakeTensorMode(), Unlinked():
        step(table, tally, rows)
    print(tabulated(tally))
    total = sum(tally.counts.values())
    print(f"{total} launches a token at batch {rows}; evidence: meta")
    assert not missing, f"no kernels for {', '.join(missing)}"
    found, (stated, stated_of) = per_layer(tally), claimed()
    # no layer comes after the last one, so its streams are written back by another op
    other = {
        spec.index: found[spec.index]
        for spec in V4_FLASH.layers[:-1]
        if found[spec.index] != stated_of[spec.kind]
    }
    assert not other, tabulated(tally)
    assert total == stated, tabulated(tally)
