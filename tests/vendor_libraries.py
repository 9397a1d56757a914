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

Pair = tuple[Tensor, Tensor]


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


def fp8_gemm_nt(a: Pair, b: Pair, d: Tensor, c: Tensor | None = None) -> None:
    """DeepGEMM's dense product, d = a @ b.T, with its default recipe of scales: 1 x 128 of a, 128 x 128 of b.

    Source: README, "Interfaces"; csrc/apis/gemm.hpp and layout.hpp
    """
    (left, left_scale), (right, right_scale) = a, b
    (m, k), n = left.shape, right.shape[0]
    assert c is None
    assert left.dtype == right.dtype == torch.float8_e4m3fn
    assert left_scale.dtype == right_scale.dtype == torch.float32
    assert d.dtype == torch.bfloat16
    assert tuple(d.shape) == (m, n)
    assert right.shape[1] == k
    assert tuple(left_scale.shape) == (m, -(-k // 128))
    assert tuple(right_scale.shape) == (-(-n // 128), -(-k // 128))
    assert all(tensor.is_contiguous() for tensor in (left, right, right_scale))
    # compute capability 10.0 keeps the exponents of scales alone
    assert all(bool((scale.view(torch.int32) & 0x7FFFFF == 0).all()) for scale in (left_scale, right_scale))
    total = torch.zeros(m, n)
    for at in range(0, k, 128):
        part = left[:, at : at + 128].float() @ right[:, at : at + 128].float().T
        by_column = right_scale[:, at // 128][torch.arange(n) // 128]
        total += part * left_scale[:, at // 128, None] * by_column
    d.copy_(total)


def mhc_post_fwd(
    x: Tensor, residual: Tensor, post_layer_mix: Tensor, comb_res_mix: Tensor, out: Tensor | None = None
) -> Tensor:
    """TileKernels' way back into the streams.

    Source: mhc/post_kernel.py, `mhc_post_fwd`; torch/mhc.py, `mhc_post_ref`
    """
    sequences, tokens, streams, hidden = residual.shape
    assert x.dtype == residual.dtype == torch.bfloat16
    assert post_layer_mix.dtype == comb_res_mix.dtype == torch.float32
    assert tuple(x.shape) == (sequences, tokens, hidden)
    assert tuple(post_layer_mix.shape) == (sequences, tokens, streams, 1)
    assert tuple(comb_res_mix.shape) == (sequences, tokens, streams, streams)
    assert all(tensor.is_contiguous() for tensor in (x, post_layer_mix, comb_res_mix))
    made = torch.empty_like(residual) if out is None else out
    for target in range(streams):
        row = post_layer_mix[:, :, target] * x.float()
        for source in range(streams):
            row = row + comb_res_mix[:, :, source, target, None] * residual[:, :, source].float()
        made[:, :, target] = row
    return made


# distribution -> where the library keeps the function, and the function
PUBLISHED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "sgl-flash-mla": ("flash_mla", "flash_mla_sparse_fwd", flash_mla_sparse_fwd),
    "sgl-deep-gemm": ("deep_gemm", "fp8_gemm_nt", fp8_gemm_nt),
    "tile-kernels": ("tile_kernels.modeling.mhc.ops", "mhc_post_fwd", mhc_post_fwd),
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
