"""Indices checked on the host before every kernel, for finding what on a GPU would be silent corruption or a sticky error.

On with V4SDK_CUDA_DEBUG=1. Every check reads a tensor's values, so decode steps are not captured, and slow.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from v4sdk.backend import Kernel
from v4sdk.errors import V4Error

DEBUG_VARIABLE = "V4SDK_CUDA_DEBUG"

# what to look at, the tensor, its lowest value, and one more than its highest
Index = tuple[str, Tensor, int, int]
Arguments = Mapping[str, Any]


class IndexOutOfRange(V4Error):
    """A kernel was about to be given an index outside its tensor."""

    way_out = "the op before it, or whoever called this one, made the index; no kernel was started"


def is_debugging() -> bool:
    """Whether the environment asks for checks."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def checked(rows: Sequence[Kernel[Any, Any]]) -> Sequence[Kernel[Any, Any]]:
    """The same kernels, each behind the checks of its op."""
    return tuple(replace(row, function=_guarded(row.op.name, row.function)) for row in rows)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    indices = _INDICES.get(name)
    if indices is None:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        for what, tensor, low, end in indices(signature.bind(*args, **kwargs).arguments):
            _check(name, what, tensor, low, end)
        return function(*args, **kwargs)

    return run


def _check(op: str, what: str, tensor: Tensor, low: int, end: int) -> None:
    flat = tensor.detach().reshape(-1)
    wrong = ((flat < low) | (flat >= end)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise IndexOutOfRange(
            f"op `{op}` got {what} {int(flat[at])} at place {at} of {list(tensor.shape)}, expected {low} to {end - 1}"
        )


def _batch(given: Arguments, state: str, paged: str | None) -> Iterator[Index]:
    batch = given["batch"]
    if given.get(state) is not None:
        # the last slot belongs to nobody
        yield "slot", batch.slots, 0, given[state].shape[0] - 1
    if paged is not None and given.get(paged) is not None:
        yield "page", batch.block_table, -1, given[paged].shape[0] - 1


def _attention(given: Arguments) -> Iterator[Index]:
    yield from _batch(given, "window", "entries")
    entries, picks = given["entries"], given["picks"]
    if entries is not None and picks is not None:
        yield "entry", picks, -1, given["batch"].block_table.shape[1] * entries.shape[1]


def _experts(given: Arguments) -> Iterator[Index]:
    yield "expert", given["ids"], 0, given["experts"].num_experts


_INDICES: Mapping[str, Callable[[Arguments], Iterator[Index]]] = {
    "embed": lambda given: iter([("token id", given["token_ids"], 0, given["weight"].shape[0])]),
    "route_hash": lambda given: iter([("token id", given["token_ids"], 0, given["tid2eid"].shape[0])]),
    "routed_experts": _experts,
    "kv_project_store": lambda given: _batch(given, "window", None),
    "compress": lambda given: _batch(given, "state", "entries"),
    "index_topk": lambda given: _batch(given, "", "keys"),
    "sparse_attn": _attention,
}
