"""Tensors, weights and caches as the kernels see them: the structures of `native/arguments.h`, field by field."""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

import torch
from torch import Tensor

from v4sdk.errors import ShapeError
from v4sdk.ops.batch import Batch
from v4sdk.weights import INTEGERS, Weight

T = TypeVar("T")

_FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_FP8, _FP4 = 2, 3
_NO_SCALE, _UE8M0, _SCALE_FLOAT32 = 0, 1, 2
_CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """Make an argument block from fields in order.

    Args:
        fields: (names separated by spaces, type): `("positions table", pointer)`.
    """
    listed = [(one, kind) for names, kind in fields for one in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


pointer, int64, int32, float32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

Matrix = structure(
    "Matrix",
    ("data scale", pointer),
    ("rows cols row_bytes scale_row_bytes", int64),
    ("tile_rows tile_cols encoding scale_kind", int32),
)
Rows = structure("Rows", ("data", pointer), ("stride", int64), ("dtype unused", int32))
Step = structure(
    "Step",
    ("token_ids seq_ids positions cu_seqlens slots block_table", pointer),
    ("tokens sequences pages page_tokens", int64),
)
Cache = structure("Cache", ("data", pointer), ("outer rows row_bytes", int64), ("format unused", int32))


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor begins; None for a missing one."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


def rows(tensor: Tensor | None) -> Any:
    """Activations [T, n], or one row [n], float32 or BF16, elements side by side."""
    if tensor is None:
        return Rows(None, 0, 0, 0)
    assert tensor.stride(-1) == 1 or tensor.shape[-1] <= 1, tensor.stride()
    stride = tensor.stride(0) if tensor.dim() > 1 else tensor.shape[0]
    return Rows(tensor.data_ptr(), stride, _FLOATS[tensor.dtype], 0)


def matrix(weight: Weight) -> Any:
    """A stored matrix [out, in].

    Raises:
        ShapeError: if its encoding is none that kernels read; the table declines such models before.
    """
    if weight.encoding in INTEGERS:
        raise ShapeError(f"no kernel reads a matrix of {weight.encoding}, expected float, fp8 or fp4")
    data, scale = weight.data, weight.scale
    encoding = {"fp8": _FP8, "fp4": _FP4}.get(weight.encoding) or _FLOATS[data.dtype]
    kind = _NO_SCALE if scale is None else _SCALE_FLOAT32 if scale.dtype == torch.float32 else _UE8M0
    scale_bytes = 0 if scale is None else scale.stride(-2) * scale.itemsize
    return Matrix(
        data.data_ptr(), None if scale is None else scale.data_ptr(), weight.out_features, weight.in_features,
        data.stride(-2) * data.itemsize, scale_bytes, *weight.block, encoding, kind,
    )  # fmt: skip


def step(batch: Batch) -> Any:
    """The packed step."""
    return Step(
        address(batch.token_ids), address(batch.seq_ids), address(batch.positions), address(batch.cu_seqlens),
        address(batch.slots), address(batch.block_table), batch.num_tokens, batch.num_sequences,
        batch.block_table.shape[1], batch.page_tokens,
    )  # fmt: skip


def cache(tensor: Tensor | None) -> Any:
    """Cache rows [outer, rows, row] in whichever format."""
    if tensor is None:
        return Cache(None, 0, 0, 0, 0, 0)
    outer, per, width = tensor.shape
    return Cache(address(tensor), outer, per, width * tensor.itemsize, _CACHE_FORMATS[tensor.dtype], 0)


def result(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The caller's tensor if a kernel can write to it as it is, else a new one."""
    if out is not None and out.is_contiguous() and out.shape == shape and out.dtype == dtype:
        return out
    return torch.empty(shape, dtype=dtype)


def deliver(out: Any, made: T) -> T:
    """Give `made`, or `out` (a tensor or a tuple of them) after copying what is not there already."""
    filled: T = made if out is None else _fill(out, made)
    return filled


def _fill(out: Any, made: Any) -> Any:
    if isinstance(made, tuple):
        return tuple(_fill(o, m) for o, m in zip(out, made, strict=True))
    return out if out is made else out.copy_(made)
