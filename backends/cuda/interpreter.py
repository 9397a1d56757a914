"""Triton's CPU interpreter made honest: BF16 and FP8 that round as a GPU does, and every address checked.

Out of the box the interpreter adds and multiplies BF16 as 16-bit integers, truncates where a GPU rounds, and reads whatever an
address points at. What is replaced here are private functions of one version of Triton; `install` proves that the
replacement works on the version at hand, and fails loudly where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v4sdk.errors import V4Error

# the versions whose private names are known to be those below
KNOWN_VERSIONS = ("3.6", "3.8", "3.9")

Array = NDArray[Any]
_installed = False


class Unreliable(V4Error):
    """The interpreter does not compute what a GPU would."""


class OutOfBounds(IndexError):
    """A kernel touched memory outside of all of its tensor arguments."""


def install() -> None:
    """Replace the interpreter's conversions and memory accesses, once per process.

    Raises:
        Unreliable: kernels were already imported for a device, or the replacement does not do on this version of Triton
            what it must.
    """
    global _installed
    if _installed:
        return
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise Unreliable(
            "kernels are not interpreted in this process", hint="set TRITON_INTERPRET=1 before it starts"
        )
    try:
        _replace_arithmetic(interpreter)
        _replace_memory(interpreter)
        _patch_once(interpreter)
    except AttributeError as exc:
        raise Unreliable(
            f"Triton {triton.__version__} has another interpreter than those this was written for: {exc}",
            hint=f"pip install 'triton=={KNOWN_VERSIONS[-1]}.*'",
        ) from exc
    prove()
    _installed = True


def prove() -> None:
    """Compare what the interpreter computes with torch: rounding, all codes of the narrow types, and products.

    Raises:
        Unreliable: naming what differs.
    """
    from . import proof

    wrong = proof.differences()
    if wrong:
        import triton

        raise Unreliable(
            f"the interpreter of Triton {triton.__version__} is wrong about {', '.join(wrong)}",
            hint=f"pip install 'triton=={KNOWN_VERSIONS[-1]}.*'",
        )


def _types() -> dict[Any, torch.dtype]:
    import triton.language as tl

    return {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
    }


def _converter(interpreter: Any) -> Callable[..., Array]:
    """A replacement of `_convert_float` that rounds to nearest even, by torch."""
    torch_type = _types()
    original = interpreter._convert_float

    def convert(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source not in torch_type or target not in torch_type:
            result: Array = original(values, source, target, rounding)
            return result
        packed = np.ascontiguousarray(values)
        bits = torch.from_numpy(packed.view(f"i{packed.dtype.itemsize}").copy()) if packed.size else None
        unsigned = np.dtype(f"u{target.primitive_bitwidth // 8}")
        if bits is None:
            return np.empty(packed.shape, unsigned)
        wide = bits.view(torch_type[source])
        wide = wide if source.primitive_bitwidth == 64 else wide.float()
        if target.name == "fp8e4nv":
            # the conversion instruction saturates
            wide = wide.clamp(-448.0, 448.0)
        narrow = wide.to(torch_type[target])
        signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[unsigned.itemsize]
        return narrow.view(signed).numpy().view(unsigned).reshape(packed.shape)

    return convert


def _replace_arithmetic(interpreter: Any) -> None:
    import triton.language as tl

    low = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    torch_type = _types()
    convert = _converter(interpreter)
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    numpy_type = interpreter._get_np_dtype
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
    # selection moves values and computes nothing: it stays, as long as it is a function of its own
    binary, unary, _selection = builder.binary_op, builder.unary_op, builder.ternary_op
    cast, dot, fma = builder.cast_impl, builder.create_dot, builder.create_fma

    def widened(value: Any) -> Any:
        dtype = value.dtype.scalar
        if dtype not in low:
            return value
        return handle(convert(value.data, dtype, tl.float32, None).view(np.float32), tl.float32)

    def narrowed(value: Any, dtype: Any) -> Any:
        if dtype not in low or value.data.dtype == np.bool_:
            return value
        data = convert(value.data.astype(np.float32), tl.float32, dtype, None)
        return handle(data.view(numpy_type(dtype)), dtype)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        given, wanted = source.dtype.scalar, target.scalar
        if given not in low and wanted not in low:
            return cast(self, source, target)
        if given in torch_type and wanted in torch_type:
            return handle(convert(source.data, given, wanted, None).view(numpy_type(wanted)), wanted)
        if given in low:
            return cast(self, widened(source), target)
        return narrowed(handle(source.data.astype(np.float32), tl.float32), wanted)

    def binary_op(self: Any, left: Any, right: Any, function: Any) -> Any:
        dtype = left.dtype.scalar
        if dtype not in low or function in bitwise:
            return binary(self, left, right, function)
        found = function(widened(left).data, widened(right).data)
        if found.dtype == np.bool_:
            return handle(found, tl.int1)
        return narrowed(handle(found, tl.float32), dtype)

    def unary_op(self: Any, value: Any, function: Any) -> Any:
        dtype = value.dtype.scalar
        if dtype not in low:
            return unary(self, value, function)
        return narrowed(unary(self, widened(value), function), dtype)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, most_imprecise: Any) -> Any:
        return dot(self, widened(a), widened(b), acc, precision, most_imprecise)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        dtype = z.dtype.scalar
        if dtype not in low:
            return fma(self, x, y, z)
        return narrowed(fma(self, widened(x), widened(y), widened(z)), dtype)

    reduce = interpreter.ReduceOps
    for name in ("sum", "min_max"):
        setattr(reduce, name, _refusing(getattr(reduce, name), low, name))
    interpreter._convert_float = convert
    builder.cast_impl, builder.binary_op, builder.unary_op = cast_impl, binary_op, unary_op
    builder.create_dot, builder.create_fma = create_dot, create_fma


def _refusing(function: Callable[..., Any], low: tuple[Any, ...], name: str) -> Callable[..., Any]:
    """Reductions of narrow types would work on bit patterns: kernels widen before they reduce."""

    def reduce(self: Any, value: Any, **how: Any) -> Any:
        first = value[0] if isinstance(value, tuple) else value
        if first.dtype.scalar in low:
            raise TypeError(f"reduction `{name}` of {first.dtype.scalar}: widen to float32 first")
        return function(self, value, **how)

    return reduce


def _replace_memory(interpreter: Any) -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    spans: list[tuple[int, int, int, int]] = []
    arguments, restore = executor._init_args_hst, executor._restore_args_dev
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def noting(self: Any, args: Any, kwargs: Any) -> Any:
        found = arguments(self, args, kwargs)
        spans[:] = [
            _span(t) for t in (*found[0], *found[1].values()) if isinstance(t, torch.Tensor) and t.numel()
        ]
        return found

    def restoring(self: Any, args: Any, here: Any, kwargs: Any, kwargs_here: Any) -> None:
        # tensors of the CPU were used in place: copying each storage onto itself would take longer than small kernels
        if all(t.device.type == "cpu" for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)):
            return
        restore(self, args, here, kwargs, kwargs_here)

    def checked(pointers: Any, mask: Any, what: str) -> None:
        at = (
            pointers.data
            if mask is None
            else pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        )
        if not at.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.asarray(at).ravel()
        inside = np.zeros(at.shape, bool)
        for first, end, step, width in spans:
            offset = at - np.uint64(first)
            within = (at >= first) & (at + np.uint64(size) <= end)
            inside |= within if not step else within & (offset % np.uint64(step) < np.uint64(width))
        if not inside.all():
            raise OutOfBounds(
                f"{what}: {int((~inside).sum())} of {at.size} lanes lie outside every tensor argument"
            )

    def checked_load(self: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        checked(pointers, mask, "load")
        return load(self, pointers, mask, other, *how)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        checked(pointers, mask, "store")
        return store(self, pointers, value, mask, *how)

    def checked_atomic(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        checked(pointers, mask, "atomic")
        return atomic(self, kind, pointers, value, mask, *how)

    executor._init_args_hst, executor._restore_args_dev = noting, restoring
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_atomic


def _patch_once(interpreter: Any) -> None:
    """Make the language the interpreter's once per launch, not again for every function that a kernel calls.

    That took a quarter of the time of kernels made of many functions.
    """
    import triton.language as tl

    function, patch = interpreter.InterpretedFunction, interpreter._patch_lang
    # functions see the language as one of these modules
    seen = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    assert callable(function.__call__)
    function.__call__ = call
    interpreter._patch_lang = lambda fn: patch(seen)


def _span(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last byte a view may touch, and for rows with gaps between them: their step and width, else 0."""
    first = tensor.data_ptr()
    last = (
        first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize
    )
    if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]:
        return (
            first,
            last + tensor.itemsize,
            tensor.stride(0) * tensor.itemsize,
            tensor.shape[1] * tensor.itemsize,
        )
    return first, last + tensor.itemsize, 0, 0
