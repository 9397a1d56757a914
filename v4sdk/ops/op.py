"""What an op is: contract, reference, inputs, tolerance and cost in one object; and the table a model takes its functions from.

Dimension letters used in every op docstring: `T` tokens, `B` sequences, `S` KV rows, `H` heads, `D` head_dim, `N` hidden size,
`M` hc_mult, `E` experts, `K` chosen experts or picks, `V` vocabulary, `R` query LoRA rank, `P` pages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Cost:
    """What one call must move and compute, independent of the implementation.

    Attributes:
        read_bytes, write_bytes: at stored width; flops: 2 per multiply-add.
    """

    read_bytes: int
    write_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        """Read plus written."""
        return self.read_bytes + self.write_bytes


@dataclass(frozen=True)
class Case:
    """One named set of arguments for an op.

    Attributes:
        label: how reports call it; make: builds the arguments on a device, deterministic in the label.
        scale: `tiny`, `odd`, `edge`, `flash` or `pro`; the real shapes run in benchmarks, not in the default tests.
    """

    label: str
    make: Callable[[torch.device], dict[str, Any]]
    scale: str = "tiny"


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference to the reference: |a - b| <= atol + rtol * |b|, and why that much."""

    atol: float
    rtol: float
    reason: str


# what a correct kernel may differ by when it only adds in another order
ROUNDING: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(2e-5, 2e-5, "float32 sums of up to 16k terms in any order"),
    torch.bfloat16: Tolerance(
        2**-8, 2**-6, "one BF16 step of a value that fell on the other side of a rounding"
    ),
    torch.uint8: Tolerance(
        0.0, 0.01, "share of stored bytes that may differ: FP8 and FP4 roundings at a boundary"
    ),
    torch.int32: Tolerance(0.0, 0.01, "share of rows whose choice may differ: scores closer than a rounding"),
}


class OpTable:
    """Functions by op: a kernel, the parts of a fused op, or the reference. `table[op]` has the op's own type.

    Attributes:
        rope: rotates inside ops that are built over this table, as `v4sdk.ops.rope.rope` does; None: that function.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = dict(functions)
        self.rope: Callable[[Tensor, Tensor, bool], Tensor] | None = None

    def rotating(self, rope: Callable[[Tensor, Tensor, bool], Tensor]) -> OpTable:
        """The same functions, whatever is set later included, with another rotation."""
        other = OpTable({})
        other._functions, other.rope = self._functions, rope
        return other

    def set(self, name: str, function: Callable[..., Any]) -> None:
        """Choose the function of one op; done while binding, before any run."""
        self._functions[name] = function

    def __getitem__(self, op: Op[P, R]) -> Callable[P, R]:
        # the type as a string: evaluating it on every call would cost 7% of a decode step
        return cast("Callable[P, R]", self._functions.get(op.name, op))


REFERENCES = OpTable({})


@dataclass(frozen=True, eq=False)
class Op(Generic[P, R]):
    """One op of the vocabulary. Calling it runs the reference.

    Attributes:
        name: the vocabulary name; a kernel has the same.
        build: gives the reference with its parts taken from a table.
        signature: parameters a kernel must have, same names, same order.
        parts: the smaller ops a fused one is made of.
        mutates: parameters written in place.
        sensitivity: what a rounding difference does here (`low`, `selection`: it may flip a discrete choice).
        inputs, tolerances, cost: the single source for tests, conformance and benchmarks.
        kept_roundings: tolerances in numerics that may leave out the BF16 roundings between the parts (`fast`), for ops whose
            kernels may keep them.
    """

    name: str
    build: Callable[[OpTable], Callable[P, R]]
    signature: inspect.Signature
    doc: str
    parts: tuple[Any, ...] = ()
    mutates: tuple[str, ...] = ()
    sensitivity: str = "low"
    inputs: Callable[[], Iterator[Case]] | None = None
    tolerances: Mapping[torch.dtype, Tolerance] = field(default_factory=dict)
    cost: Callable[..., Cost] | None = None
    kept_roundings: Mapping[torch.dtype, Tolerance] = field(default_factory=dict)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # every op also takes `out=`, a tensor (or tuple) that receives the result
        out = kwargs.pop("out", None)
        result = self.build(REFERENCES)(*args, **kwargs)
        return result if out is None else cast(R, copy_out(out, result))


def op(
    *,
    parts: tuple[Any, ...] = (),
    mutates: tuple[str, ...] = (),
    sensitivity: str = "low",
    inputs: Callable[[], Iterator[Case]] | None = None,
    tolerances: Mapping[torch.dtype, Tolerance] | None = None,
    cost: Callable[..., Cost] | None = None,
    kept_roundings: Mapping[torch.dtype, Tolerance] | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare a plain function as an op's contract and reference."""

    def declare(fn: Callable[P, R]) -> Op[P, R]:
        return Op(fn.__name__, lambda table: fn, inspect.signature(fn), fn.__doc__ or "", parts, mutates, sensitivity,
                  inputs, tolerances or {}, cost, kept_roundings or {})  # fmt: skip

    return declare


def fused_op(
    *,
    parts: tuple[Any, ...],
    mutates: tuple[str, ...] = (),
    sensitivity: str = "low",
    inputs: Callable[[], Iterator[Case]] | None = None,
    tolerances: Mapping[torch.dtype, Tolerance] | None = None,
    cost: Callable[..., Cost] | None = None,
    kept_roundings: Mapping[torch.dtype, Tolerance] | None = None,
) -> Callable[[Callable[Concatenate[OpTable, P], R]], Op[P, R]]:
    """Declare an op that is made of smaller ones; its function takes the table of parts first.

    A backend without a kernel for it gets this function over the backend's own table, so its small kernels are still used.
    """

    def declare(fn: Callable[Concatenate[OpTable, P], R]) -> Op[P, R]:
        def build(table: OpTable) -> Callable[P, R]:
            def run(*args: P.args, **kwargs: P.kwargs) -> R:
                return fn(table, *args, **kwargs)

            return run

        full = inspect.signature(fn)
        signature = full.replace(parameters=list(full.parameters.values())[1:])
        return Op(
            fn.__name__,
            build,
            signature,
            fn.__doc__ or "",
            parts,
            mutates,
            sensitivity,
            inputs,
            tolerances or {},
            cost,
            kept_roundings or {},
        )

    return declare


def copy_out(out: Any, result: Any) -> Any:
    """Copy an op's result into the caller's tensor (or tuple of tensors) and give that back."""
    if isinstance(result, tuple):
        return tuple(copy_out(o, r) for o, r in zip(out, result, strict=True))
    if isinstance(out, Tensor):
        return out.copy_(result)
    return result
