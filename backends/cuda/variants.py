"""Which variants of the kernels are compiled without a GPU: the released shapes, through the wrappers that a run takes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk.numerics import EXACT, FAST, REFERENCE, Numerics
from v4sdk.ops import OPS, inputs
from v4sdk.ops.inputs import FLASH, LONG_DECODE, LONG_PREFILL, PRO, Draw, Geometry, Layout
from v4sdk.weights import Weight

from .backend import table, variants
from .compilation import Compiling
from .expected import complaints
from .target import CHIPS, INTERPRET_VARIABLE, described

# shapes, numerics and chips
Plan = tuple[tuple[Geometry, Numerics, tuple[int, ...]], ...]
# on every change: what users run by default, on every chip
PLAN: Plan = ((FLASH, FAST, tuple(CHIPS)),)
# on demand: the larger model, and numerics that need more memory per tile, on the commonest chip and on the smallest
WHOLE_PLAN: Plan = (*PLAN, (PRO, FAST, (90,)), (FLASH, REFERENCE, (120,)), (FLASH, EXACT, (90, 120)))
# a chip that takes the tiles of another one, which sees every variant: of each kernel one is compiled
SEES_ONE: Mapping[int, int] = {89: 120, 103: 100}


def _fp8_experts(draw: Draw, g: Geometry, numerics: Numerics, layout: Layout) -> dict[str, Any]:
    """Experts of Base checkpoints."""
    return inputs.routed_experts(True)(draw, replace(g, routed="fp8"), numerics, layout)


# ops whose arguments come in kinds
_KINDS: dict[str, dict[str, inputs.Make]] = {
    "compress": {
        "csa": inputs.compress(4, False), "hca": inputs.compress(128, False), "index": inputs.compress(4, True)
    },
    "sparse_attn": {kind: inputs.sparse_attn(kind) for kind in ("swa", "csa", "hca")},
    "routed_experts": {"packed": inputs.routed_experts(True), "fp8": _fp8_experts},
}  # fmt: skip
# arguments that are matrices of the model, though no `Weight`
_MATRICES = ("fn", "gate", "weight")


@dataclass(frozen=True)
class Work:
    """One call to compile.

    Attributes:
        label: how reports name it. is_exact: whether its numerics multiply in float32. make: its arguments.
    """

    label: str
    is_exact: bool
    make: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One variant of one kernel, compiled for one chip on behalf of one op.

    Attributes:
        shared: bytes. cases: what it was compiled for. wrong: what `expected` says against it; the others as in `Compiled`.
    """

    op: str
    arch: int
    kernel: str
    variant: str
    registers: int
    shared: int
    tensor_cores: tuple[str, ...]
    widest_load: int
    cases: tuple[str, ...]
    wrong: tuple[str, ...]


def compile_all(
    names: Sequence[str], archs: Sequence[int], jobs: int, plan: Plan = PLAN
) -> tuple[list[Row], list[str]]:
    """Compile ops for chips, in several processes and a cache of their own.

    Returns:
        A row per variant, and what failed before there was one.
    """
    os.environ.pop(INTERPRET_VARIABLE, None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(compile_op, name, arch, plan) for name in names for arch in archs]
            made = [part.result() for part in parts]
    return [row for rows, _ in made for row in rows], [text for _, texts in made for text in texts]


def compile_op(name: str, arch: int, plan: Plan = PLAN) -> tuple[list[Row], list[str]]:
    """Compile what a plan wants of one op for one chip; returns like `compile_all`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    launch = _Noting(arch, sees_one=arch in SEES_ONE and plan == PLAN)
    functions = [row.function for row in table(launch) if row.op.name == name]
    if plan != PLAN:
        # what only benchmarks run is compiled on demand
        functions += variants(launch, name).values()
    rows: dict[tuple[str, str], Row] = {}
    failed = []
    for work in _work(name, arch, plan):
        launch.noted.clear()
        weights: list[Tensor] = []
        try:
            with FakeTensorMode(), torch.no_grad():
                args = {k: _on_cuda(v, weights, k in _MATRICES) for k, v in work.make().items()}
                launch.weights = {_storage(t) for t in weights}
                for function in functions:
                    function(**args)
        except Exception as exc:  # a compiler may raise anything; the other cases still have something to say
            failed.append(f"{name}/{work.label} on {arch}: {type(exc).__name__}: {str(exc)[:500]}")
        for kernel, variant, reads in dict.fromkeys(launch.noted):
            made = launch.found[kernel, variant]
            before = rows.get((kernel, variant))
            cases, wrong = (before.cases, before.wrong) if before else ((), ())
            wrong += tuple(complaints(made, launch.target, reads, work.is_exact))
            rows[kernel, variant] = Row(
                name, arch, kernel, variant, made.registers, made.shared_bytes, made.tensor_cores, made.widest_load,
                (*cases, work.label), tuple(dict.fromkeys(wrong)),
            )  # fmt: skip
    return list(rows.values()), failed


def _work(name: str, arch: int, plan: Plan) -> Iterator[Work]:
    own = getattr(inputs, name, None)
    # what that module only imports makes no arguments
    own = own if getattr(own, "__module__", "") == inputs.__name__ else None
    kinds: dict[str, inputs.Make] = _KINDS.get(name) or ({"": own} if own else {})
    for geometry, numerics, archs in plan:
        for kind, make in kinds.items() if arch in archs else ():
            for layout in (LONG_DECODE, LONG_PREFILL):
                label = "-".join(filter(None, (kind, geometry.name, layout.name, numerics.name)))
                draw = Draw(label, torch.device("cpu"))
                args = (draw, geometry, numerics, layout)
                yield Work(label, numerics is EXACT, lambda make=make, args=args: make(*args))  # type: ignore[misc]
    cases = OPS[name].inputs
    if not kinds and cases is not None:
        for case in cases():
            if any(case.scale == geometry.name and arch in archs for geometry, _, archs in plan):
                yield Work(case.label, False, lambda case=case: case.make(torch.device("cpu")))  # type: ignore[misc]


def _on_cuda(value: Any, weights: list[Tensor], inside: bool) -> Any:
    """A tree of arguments as tensors of a GPU without memory; those of weights are noted."""
    if isinstance(value, Tensor):
        there = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
        weights += [there] if inside else []
        return there
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cuda(item, weights, inside) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        inside = inside or isinstance(value, Weight)
        changed = {f.name: _on_cuda(getattr(value, f.name), weights, inside) for f in fields(value) if f.init}
        return replace(value, **changed)
    return value


class _Noting(Compiling):
    """Compiles, and notes kernel, variant and whether a weight is among the arguments."""

    def __init__(self, arch: int, sees_one: bool) -> None:
        super().__init__(described(arch, "compiled"))
        self._sees_one = sees_one
        self.weights: set[int] = set()
        self.noted: list[tuple[str, str, bool]] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any
    ) -> None:
        """Compile, and note the variant."""
        if self._sees_one and any(name == kernel.fn.__name__ for name, _ in self.found):
            return
        before = len(self.launches)
        super().__call__(kernel, grid, *args, warps=warps, stages=stages, **constants)
        if self.last is not None and len(self.launches) > before:
            reads = any(isinstance(a, Tensor) and _storage(a) in self.weights for a in args)
            self.noted.append((self.last.kernel, self.last.variant, reads))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
