"""Vendors' libraries by their published definitions, in torch: what an adapter is held against without a GPU."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def flash_mla_sparse_fwd(
    q: Tensor, kv: Tensor, indices: Tensor, sm_scale: float, d_v: int, attn_sink: Tensor, use_legacy: bool
) -> tuple[Tensor, None, None]:
    """FlashMLA's sparse forward pass."""
    assert use_legacy
    assert q.dtype == kv.dtype == torch.bfloat16
    assert indices.dtype == torch.int32
    assert indices.shape[2] % 128 == 0
    assert int(indices.max()) < kv.shape[0]
    seen = indices[:, 0] >= 0
    rows = kv[indices[:, 0].clamp_min(0).long(), 0].float()
    logits = torch.einsum("thd,tnd->thn", q.float(), rows) * sm_scale
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    top = logits.amax(-1, keepdim=True)
    p = torch.exp(logits - top)
    total = p.sum(-1, keepdim=True) + torch.exp(attn_sink[None, :, None] - top)
    return ((p @ rows) / total).to(q.dtype)[..., :d_v], None, None


# distribution -> where the library keeps the function, and the function
PUBLISHED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "sgl-flash-mla": ("flash_mla", "flash_mla_sparse_fwd", flash_mla_sparse_fwd),
}


def install(
    monkeypatch: pytest.MonkeyPatch, distribution: str, function: Callable[..., Any] | None = None
) -> ModuleType:
    """Make a library importable, with its own function or another in its place; the module that holds it."""
    path, name, published = PUBLISHED[distribution]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.0")
    for imported in {path.partition(".")[0], path}:
        module = ModuleType(imported)
        module.__spec__ = ModuleSpec(imported, None)
        monkeypatch.setitem(sys.modules, imported, module)
    holder = sys.modules[path]
    setattr(holder, name, function or published)
    return holder
