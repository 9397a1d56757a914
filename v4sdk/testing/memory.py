"""Fresh memory filled with the worst values, so an output that nobody wrote cannot pass for a right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_FACTORIES = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make `torch.empty` and its kin give NaN, the largest integer, or True instead of whatever memory holds."""
    functions = {name: getattr(torch, name) for name in _FACTORIES}
    methods = {name: getattr(Tensor, name) for name in _METHODS}
    try:
        for name, original in functions.items():
            setattr(torch, name, _poisoning(original))
        for name, original in methods.items():
            setattr(Tensor, name, _poisoning(original))
        yield
    finally:
        for name, original in functions.items():
            setattr(torch, name, original)
        for name in methods:
            # inherited from the C base class: what we set only hid it
            delattr(Tensor, name)


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor in place with NaN, or with the largest integer, or with True."""
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    if tensor.dtype.itemsize == 1 and (tensor.dtype.is_floating_point or tensor.dtype == torch.uint8):
        # all ones is NaN in every FP8 format, and an implausible byte
        tensor.view(torch.uint8).fill_(255)
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoning(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return poison(factory(*args, **kwargs))

    return make
