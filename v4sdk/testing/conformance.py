"""Every op, every case, one backend, against the pure references; and the receipt that says what was shown."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk import __version__
from v4sdk.backend import API_VERSION, Backend, Binding, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.numerics import FAST, KVFormat, Numerics
from v4sdk.ops import OPS
from v4sdk.ops.op import Case, Op, Tolerance
from v4sdk.testing.arguments import as_kept, clone, is_bit_equal, map_tensors, on_backend, readable, tensors
from v4sdk.testing.compare import (
    BF16_PRODUCT,
    EXACT,
    FP4_STEP,
    FP8_INPUTS,
    FP8_INPUTS_FP4,
    INT8_INPUTS,
    INT8_INPUTS_FP4,
    PACKED,
    Difference,
    NormLimits,
    by_norm,
    compare,
    compare_on_grid,
    compare_selection,
    describe,
    tolerance_for,
)
from v4sdk.testing.memory import poison, poisoned_memory
from v4sdk.weights import ExpertWeights, Weight

DEFAULT_SCALES = ("tiny", "odd", "edge")
# share of discrete choices that may fall the other way at near ties
_MAX_FLIPPED = 0.01
FAILURES = ("failed", "unexpected pass")


@dataclass(frozen=True)
class CaseResult:
    """One row of the receipt.

    Attributes:
        how: `kernel`, `parts` or `reference`: what ran. evidence: how much a pass here says about a device.
        max_abs, worst: largest difference, plainly and in units of what is accepted.
        status: `passed`, `failed`, `known gap` or `unexpected pass`. detail: what went wrong, or the gap's cause.
        relative_l2, cosine: the worst of any tensor that was compared.
    """

    op: str
    case: str
    how: str
    evidence: str
    status: str
    max_abs: float
    worst: float
    detail: str | None = None
    relative_l2: float = 0.0
    cosine: float = 1.0


@dataclass(frozen=True)
class Report:
    """What a conformance run showed."""

    backend: str
    results: tuple[CaseResult, ...]

    @property
    def ok(self) -> bool:
        """No case failed and no known gap passed."""
        return bool(self.results) and not any(row.status in FAILURES for row in self.results)

    def receipt(self) -> dict[str, Any]:
        """The record: op, case, error and evidence of every comparison, and what it was made with."""
        counts = {s: sum(r.status == s for r in self.results) for s in ("passed", "known gap", *FAILURES)}
        return {
            "v4sdk": __version__,
            "api": API_VERSION,
            "backend": self.backend,
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
            "ok": self.ok,
            "counts": counts,
            "cases": [asdict(row) for row in self.results],
        }


def run_conformance(
    backend: Backend,
    config: ModelConfig,
    scales: Sequence[str] = DEFAULT_SCALES,
    ops: Sequence[str] | None = None,
    on_result: Callable[[CaseResult], None] | None = None,
) -> Report:
    """Compare everything a backend runs with the references.

    Kernels are called on tensors made on the CPU and placed by the backend; arguments an op does not declare as mutated must
    come back unchanged; fresh memory holds NaN; the result must also arrive in a caller's `out=`.

    Args:
        config: what `unless` is asked about; a kernel that declines it is not run.
        scales: sizes of cases; `flash` and `pro` are the real ones and need the memory for it.
        ops: only these.

    Raises:
        KernelMismatch: the backend's table contradicts the vocabulary.
    """
    results = []
    for op in OPS.values():
        if ops is None or op.name in ops:
            for row in _op_results(op, backend, config, scales):
                results.append(row)
                if on_result is not None:
                    on_result(row)
    results += _stale_gaps(backend)
    return Report(backend.name, tuple(results))


def _stale_gaps(backend: Backend) -> list[CaseResult]:
    known = {f"{op.name}/{case.label}" for op in OPS.values() for case in (op.inputs() if op.inputs else ())}
    return [
        CaseResult(
            name, "known_gaps", "reference", "reference", "failed", 0.0, 0.0, "no op has a case of this name"
        )
        for name in sorted(set(backend.known_gaps) - known)
    ]


def _op_results(
    op: Op[..., Any], backend: Backend, config: ModelConfig, scales: Sequence[str]
) -> Iterator[CaseResult]:
    broken = _broken_unless(op, bind(backend, config, EngineConfig(capability=backend.capability())))
    if broken is not None:
        yield CaseResult(op.name, "unless", "reference", "reference", "failed", 0.0, 0.0, broken)
    cases = [case for case in (op.inputs() if op.inputs else ()) if case.scale in scales]
    if not cases:
        detail = "the op has no cases of these scales"
        yield CaseResult(op.name, "inputs", "reference", "reference", "failed", 0.0, 0.0, detail)
    for case in cases:
        yield judge_case(op, case, backend, config)


def _broken_unless(op: Op[..., Any], binding: Binding) -> str | None:
    row = next(row for row in binding.ops if row.op == op.name)
    return row.reason if row.reason is not None and "`unless` failed" in row.reason else None


def judge_case(op: Op[..., Any], case: Case, backend: Backend, config: ModelConfig) -> CaseResult:
    """Compare one case with the reference, as `run_conformance` does, and weigh the outcome against the known gaps."""
    args = as_kept(op.name, case.make(torch.device("cpu")), backend)
    chosen = _numerics(args)
    engine = EngineConfig(kv_format=_format(FAST, backend), capability=backend.capability())
    if chosen is not None:
        engine = EngineConfig(chosen, _format(chosen, backend), backend.capability())
    binding = bind(backend, config, engine)
    how = next(row.how for row in binding.ops if row.op == op.name)
    gap = backend.known_gaps.get(f"{op.name}/{case.label}")
    try:
        found = _worst(_differences(op, args, backend, binding))
    except Exception as exc:  # a kernel may raise anything; one that does has failed this case
        nan = float("nan")
        found = Difference(nan, float("inf"), EXACT, f"{type(exc).__name__}: {exc}", nan, nan)
    status, detail = ("passed", None) if found.ok else ("failed", describe(found))
    if gap is not None:
        status, detail = ("unexpected pass", f"listed as a gap: {gap}") if found.ok else ("known gap", gap)
    bare = {row.op for row in binding.without_kernel}
    evidence = "reference" if op.name in bare else backend.evidence
    return CaseResult(
        op.name, case.label, how, evidence, status, found.max_abs, found.worst, detail, found.relative_l2, found.cosine
    )  # fmt: skip


def _format(chosen: Numerics, backend: Backend) -> KVFormat:
    usual = chosen.default_kv_format
    return usual if usual in backend.kv_formats else backend.kv_formats[0]


def _differences(
    op: Op[..., Any], args: dict[str, Any], backend: Backend, binding: Binding
) -> Iterator[Difference]:
    """Everything that is compared in one case."""
    expected_args = clone(args)
    expected = op(**expected_args)
    has_kernel = op.name not in {row.op for row in binding.without_kernel}
    # a device may round what numerics leave as it is
    step = _grid_step(op.name, args) if has_kernel and backend.bf16_products else None
    limits = _rounded_inputs(args, backend, step) if has_kernel else None
    for with_out in (False, True):
        given = on_backend(args, backend)
        before = clone(given)
        with poisoned_memory():
            extra = (
                {"out": map_tensors(clone(expected), lambda t: poison(backend.place(t)))} if with_out else {}
            )
            result = binding.table[op](**given, **extra)
            backend.synchronize()
        if with_out and expected is not None:
            result = extra["out"]
        for found in _outputs(op, result, expected, _numerics(args), step):
            yield by_norm(found, limits) if limits else found
        for name in given:
            if name in op.mutates:
                for found in _mutated(op, name, given, expected_args, step):
                    yield by_norm(found, limits) if limits else found
            elif not _unchanged(given[name], before[name]):
                yield Difference(float("nan"), float("inf"), EXACT, f"argument `{name}` was changed in place")


def _rounded_inputs(args: dict[str, Any], backend: Backend, step: Tolerance | None) -> NormLimits | None:
    """How far results may lie from the reference's by their length, where a device rounds the inputs of its products."""
    held = [v for v in args.values() if isinstance(v, Weight)]
    held += [w for v in args.values() if isinstance(v, ExpertWeights) for w in v.expert(0)]
    if backend.product_inputs == "float" or all(w.encoding == "float" for w in held):
        return None
    if backend.product_inputs == "int8":
        return INT8_INPUTS_FP4 if step is FP4_STEP else INT8_INPUTS
    return FP8_INPUTS_FP4 if step is FP4_STEP else FP8_INPUTS


def _unchanged(value: Any, before: Any) -> bool:
    return all(is_bit_equal(a, b) for a, b in zip(tensors(value), tensors(before), strict=True))


def _numerics(args: dict[str, Any]) -> Numerics | None:
    return next((v for v in args.values() if isinstance(v, Numerics)), None)


def _grid_step(op: str, args: dict[str, Any]) -> Tolerance | None:
    """One step of the grid that an op rounds its results to at the end; None for one that does not."""
    numerics = _numerics(args)
    if numerics is None:
        return None
    if op == "index_query" or (op == "compress" and args["is_index"]):
        return FP4_STEP if numerics.q4_index else None
    return PACKED if op in ("compress", "kv_project_store") and numerics.q8_kv else None


def _outputs(
    op: Op[..., Any], result: Any, expected: Any, numerics: Numerics | None, step: Tolerance | None = None
) -> Iterator[Difference]:
    got, want = list(tensors(result)), list(tensors(expected))
    if len(got) != len(want):
        yield Difference(
            float("nan"), float("inf"), EXACT, f"returned {len(got)} tensors, expected {len(want)}"
        )
        return
    agree: Tensor | None = None
    for a, e in zip(got, want, strict=True):
        if op.sensitivity == "selection" and not e.dtype.is_floating_point:
            yield compare_selection(a, e, _MAX_FLIPPED)
            if a.shape == e.shape:
                same = a.cpu() == e.cpu()
                agree = same.flatten(1).all(-1) if same.dim() > 1 else same
        elif agree is not None and a.shape == e.shape and a.shape[0] == agree.shape[0]:
            # weights of another choice are another question
            yield compare(a.cpu()[agree], e.cpu()[agree], tolerance_for(op, e.dtype, numerics))
        elif step is not None and e.dtype == torch.float32 and op.name == "index_query":
            # the weights of heads, which are not on the grid
            yield compare(a, e, BF16_PRODUCT)
        elif step is not None:
            yield compare_on_grid(a, e, tolerance_for(op, e.dtype, numerics), step)
        else:
            yield compare(a, e, tolerance_for(op, e.dtype, numerics))


def _mutated(
    op: Op[..., Any], name: str, given: dict[str, Any], expected: dict[str, Any], step: Tolerance | None
) -> Iterator[Difference]:
    for a, e in zip(tensors(given[name]), tensors(expected[name]), strict=True):
        tolerance = PACKED if e.dtype == torch.uint8 else tolerance_for(op, e.dtype)
        got, want = (readable(op.name, name, t, expected) for t in (a.cpu(), e))
        # a state is not on the grid that entries are on
        on_grid = step is not None and name in ("window", "entries")
        yield (
            compare_on_grid(got, want, tolerance, step) if on_grid and step else compare(got, want, tolerance)
        )


def _worst(found: Iterator[Difference]) -> Difference:
    worst, apart, cosine = Difference(0.0, 0.0, EXACT), 0.0, 1.0
    for difference in found:
        if difference.problem is not None:
            return replace(difference, relative_l2=float("nan"), cosine=float("nan"))
        apart, cosine = max(apart, difference.relative_l2), min(cosine, difference.cosine)
        if difference.worst > worst.worst or (worst.worst == 0.0 and difference.max_abs > worst.max_abs):
            worst = difference
    return replace(worst, relative_l2=apart, cosine=cosine)
