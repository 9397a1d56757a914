"""An op's arguments as trees: copied, moved to a device, prepared by a backend, and made comparable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from v4sdk.backend import Backend
from v4sdk.ops.rows import load_index, load_kv
from v4sdk.weights import ExpertWeights, Weight, stack


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild a tree of tuples, lists, dicts and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init
        }
        return dataclasses.replace(value, **changed)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a tree, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    yield from found


def clone(value: Any) -> Any:
    """Copy every tensor of a tree."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def on_backend(args: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Copies of CPU arguments as the backend's kernels get them: weights prepared, everything else moved."""
    return {name: _placed(name, clone(value), backend) for name, value in args.items()}


def _placed(name: str, value: Any, backend: Backend) -> Any:
    if isinstance(value, Weight):
        return backend.prepare_weight(name, value)
    if isinstance(value, ExpertWeights):
        return backend.prepare_experts(name, value)
    return map_tensors(value, backend.place)


def as_kept(op_name: str, args: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Arguments as a run of this backend has them: matrices as folders made for it store them, cache rows in its format."""
    return {name: _kept(op_name, name, value, args, backend) for name, value in args.items()}


def _kept(op_name: str, name: str, value: Any, args: dict[str, Any], backend: Backend) -> Any:
    if isinstance(value, Weight):
        return backend.converted(name, value)
    if isinstance(value, ExpertWeights):
        return _kept_experts(value, backend)
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and "native" not in backend.kv_formats:
        dtype = torch.bfloat16 if backend.kv_formats[0] == "bf16" else torch.float32
        return _decoded(op_name, name, value, args).to(dtype)
    return value


def _kept_experts(experts: ExpertWeights, backend: Backend) -> ExpertWeights:
    each = [experts.expert(e) for e in range(experts.num_experts)]
    w1, w2, w3 = (tuple(backend.converted("experts", one[i]) for one in each) for i in range(3))
    packed = (stack(w1), stack(w2), stack(w3)) if experts.packed is not None else None
    return ExpertWeights(w1, w2, w3, packed) if experts.w1 else ExpertWeights(packed=packed)


def is_bit_equal(actual: Tensor, expected: Tensor) -> bool:
    """Same shape, dtype and bytes."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    a, e = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    return bool(torch.equal(a, e))


def readable(op_name: str, argument: str, tensor: Tensor, args: dict[str, Any]) -> Tensor:
    """A cache tensor as numbers, without its scratch row, which belongs to nobody and may hold anything."""
    kept = tensor[:-1]
    return _decoded(op_name, argument, kept, args) if kept.dtype == torch.uint8 else kept


def _decoded(op_name: str, argument: str, rows: Tensor, args: dict[str, Any]) -> Tensor:
    """Packed cache rows as float32; what is no cache of the op stays as it is."""
    if op_name == "compress" and argument == "entries" and args["is_index"]:
        return load_index(rows, args["norm"].shape[0])
    if op_name == "compress" and argument == "entries":
        return load_kv(rows, args["norm"].shape[0], 2 * args["inv_freq"].shape[0])
    if op_name == "kv_project_store" and argument == "window":
        return load_kv(rows, args["kv_norm"].shape[0], args["rope_table"].shape[-1])
    if op_name == "index_topk" and argument == "keys":
        return load_index(rows, args["q"].shape[-1])
    if op_name == "sparse_attn" and argument in ("window", "entries"):
        return load_kv(rows, args["q"].shape[-1], args["rope_dim"])
    return rows
