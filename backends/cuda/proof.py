"""Small kernels whose results torch knows exactly: what an interpreter must get right before anything else is believed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _convert(x: Any, y: Any, n: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n).to(y.dtype.element_ty), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def _add(x: Any, y: Any, z: Any, n: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(x: Any, y: Any, z: Any, SIZE: tl.constexpr) -> None:
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def differences() -> list[str]:
    """What the interpreter gets wrong, in words; empty if nothing."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=g) * torch.exp2(torch.randint(-14, 9, (4096,), generator=g).float())
    wrong = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        limit = 448.0 if dtype == torch.float8_e4m3fn else float("inf")
        expected = x.clamp(-limit, limit).to(dtype)
        if not _same(_run(_convert, x, torch.empty_like(expected)), expected):
            wrong.append(f"rounding to {dtype}")
        bits, count = (torch.int16, 1 << 16) if dtype == torch.bfloat16 else (torch.int8, 256)
        codes = torch.arange(count).to(bits).view(dtype)
        if not _same(_run(_convert, codes, torch.empty(codes.shape)), codes.float()):
            wrong.append(f"values of {dtype}")
    a, b = x[:1024].bfloat16(), x[1024:2048].bfloat16()
    if not _same(_run(_add, a, b, torch.empty_like(a)), a + b):
        wrong.append("sums of bfloat16")
    m, n = (torch.randn(32, 32, generator=g).bfloat16() for _ in range(2))
    product = torch.empty(32, 32)
    _dot[(1,)](m, n, product, SIZE=32)
    if not torch.allclose(product, m.float() @ n.float(), rtol=1e-5, atol=1e-5):
        wrong.append("products of bfloat16")
    return wrong


def _run(kernel: Any, *tensors: Tensor) -> Tensor:
    n, block = tensors[0].numel(), 1024
    kernel[(triton.cdiv(n, block),)](*tensors, n, BLOCK=block)
    return tensors[-1]


def _same(a: Tensor, b: Tensor) -> bool:
    x, y = a.float(), b.float()
    return bool(((x == y) | (x.isnan() & y.isnan())).all())
