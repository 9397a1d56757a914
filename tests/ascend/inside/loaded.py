"""What tests of the emulated kernels share: the vendor's wheel loaded, the emulators installed, tensors by hand."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    # the vendor's files warn while they are compiled, and warnings are errors in tests
    warnings.simplefilter("ignore")
    importlib.import_module("v4sdk_ascend.probe").load()
emulators = importlib.import_module("v4sdk_ascend.testing.emulators")
KEYS = emulators.install()
FAMILY = emulators.family()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
T, C, S = torch.ops.cann_ops_transformer, torch.ops._C_ascend, torch.ops.npu
ALL, A2_A3, A5 = ("910B", "910C", "950"), ("910B", "910C"), ("950",)


def by_hand(*keys: str, on: tuple[str, ...] = ALL) -> Callable[[Any], Any]:
    """Marks a test as the one of these kernels; it is collected on the families whose documents list them."""
    return pytest.mark.families(*on)


def i32(*values: Any) -> Tensor:
    """An int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


def close(got: Tensor, want: Any, atol: float = 1e-6) -> None:
    """Values are what was worked out, spread over the shape."""
    want = torch.as_tensor(want, dtype=F32)
    torch.testing.assert_close(got.float(), want.expand(got.shape), atol=atol, rtol=1e-5)


def rows(count: int, width: int, dtype: torch.dtype = BF16, **channels: dict[int, float]) -> Tensor:
    """Zeros but for c0, c1, ..: what rows hold in a channel, by row."""
    x = torch.zeros(count, width)
    for name, values in channels.items():
        for row, value in values.items():
            x[row, int(name[1:])] = value
    return x.to(dtype)
