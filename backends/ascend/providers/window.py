"""Attention by the packs that know this model: a window, alone or with compressed rows, whole or picked.

Decode reads the caches where they lie. The window ring of a sequence is a page of 128 rows that stands for every logical
page: position p is at row p % 128 of it, and the kernels read no position beyond the window. Prefill lays the rows of a
chunk, and the 127 before it, out in pages of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch

from ..chip import Family
from . import Calls, bf16_rows
from .selected import valid_first

_BLOCK = 128
_MAX_BLOCK = 1024
_BAND, _CAUSAL = 4, 3


@dataclass(frozen=True)
class Paged:
    """Rows of a batch in pages.

    Attributes:
        rows: [pages, block, 1, D]. table: [B, n] int32. longest: no sequence has more rows.
    """

    rows: Tensor
    table: Tensor
    longest: int


def ring_pages(window: Tensor, batch: Batch) -> Paged:
    """The window rings of a decode step, seen as pages; only shapes and addresses."""
    longest = batch.block_table.shape[1] * batch.page_tokens
    slots = batch.slots.to(torch.int32)[:, None]
    return Paged(window.unsqueeze(2), slots.expand(-1, max(1, longest // _BLOCK)).contiguous(), longest)


def chunk_pages(kv: Tensor, batch: Batch) -> Paged:
    """The rows that a prefill's queries may see, copied into pages at their own positions.

    Shapes:
        kv [B * 128 + T, D]: the rings as they stood before, then the new rows
    """
    bounds, positions = batch.cu_seqlens.tolist(), batch.positions.tolist()
    ends = [positions[hi - 1] + 1 for hi in bounds[1:]]
    table = torch.zeros(len(ends), -(-max(ends) // _BLOCK), dtype=torch.int32)
    source, target, pages = [], [], 0
    for b, (lo, hi) in enumerate(pairwise(bounds)):
        start, end = positions[lo], ends[b]
        kept = min(start, _BLOCK - 1)
        first = (start - kept) // _BLOCK
        last = (end - 1) // _BLOCK
        table[b, first : last + 1] = torch.arange(pages, pages + last + 1 - first, dtype=torch.int32)
        ring = torch.arange(start - kept, start) % _BLOCK + b * _BLOCK
        source += [ring, torch.arange(lo, hi) + len(ends) * _BLOCK]
        target.append(torch.arange(start - kept, end) + (pages - first) * _BLOCK)
        pages += last + 1 - first
    rows = kv.new_zeros(pages * _BLOCK, kv.shape[-1])
    rows[torch.cat(target).to(kv.device)] = kv[torch.cat(source).to(kv.device)]
    return Paged(rows.view(pages, _BLOCK, 1, -1), table.to(kv.device), max(ends))


def entry_pages(entries: Tensor, batch: Batch) -> Paged:
    """Compressed entries as pages: where they lie, or copied together where a page holds too few for the kernels.

    Pages of multiples of 16 rows are documented. At ratio 128 a page of 1024 tokens holds 8, so these few rows are copied.
    """
    rows = entries.shape[1]
    longest = batch.block_table.shape[1] * rows
    # what no query reads may be any page
    table = batch.block_table.clamp_min(0)
    if rows % 16 == 0 and rows <= _MAX_BLOCK:
        return Paged(entries.unsqueeze(2), table.to(torch.int32).contiguous(), longest)
    gathered = entries[table.long()].flatten(1, 2)
    n = -(-longest // _BLOCK)
    padded = F.pad(gathered, (0, 0, 0, n * _BLOCK - longest))
    own = torch.arange(table.shape[0] * n, dtype=torch.int32, device=entries.device).view(-1, n)
    return Paged(padded.reshape(-1, _BLOCK, 1, entries.shape[-1]), own, longest)


Kernel = Callable[[Calls, Tensor, Paged, Paged | None, Tensor | None, Tensor, Batch, Tensor, int], Tensor]


def sparse_attn(
    kernel: Kernel, to: Calls, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None,
    batch: Batch, sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics,
) -> Tensor:  # fmt: skip
    """As the op: one call for all sequences."""
    near = ring_pages(window, batch) if batch.is_decode else chunk_pages(kv, batch)
    far = None if entries is None else entry_pages(entries, batch)
    lengths = batch.positions[batch.cu_seqlens[1:].long() - 1] + 1
    chosen = None if picks is None else valid_first(picks)[:, None].contiguous()
    return kernel(
        to,
        q.contiguous(),
        near,
        far,
        chosen,
        lengths,
        batch,
        sink.float(),
        ratio if entries is not None else 1,
    )


def transformer(
    to: Calls, q: Tensor, near: Paged, far: Paged | None, picks: Tensor | None, lengths: Tensor, batch: Batch, sink: Tensor,
    ratio: int,
) -> Tensor:  # fmt: skip
    """By cann_ops_transformer: the compressed length and its remainder are passed apart."""
    masks: dict[str, Any] = {
        "cmp_ratio": ratio, "ori_mask_mode": _BAND, "cmp_mask_mode": 0 if far is None else _CAUSAL,
        "ori_win_left": _BLOCK - 1, "ori_win_right": 0, "layout_q": "TND", "layout_kv": "PA_BBND",
    }  # fmt: skip
    sizes: dict[str, Tensor] = {"cu_seqlens_q": batch.cu_seqlens, "seqused_ori_kv": lengths}
    rows: dict[str, Tensor | None] = {"ori_kv": near.rows, "ori_block_table": near.table}
    if far is not None:
        sizes |= {"seqused_cmp_kv": lengths // ratio, "cmp_residual_kv": lengths % ratio}
        rows |= {"cmp_kv": far.rows, "cmp_block_table": far.table, "cmp_sparse_indices": picks}
    metadata = to(
        "cann_ops_transformer.sparse_flash_mla_metadata", q.shape[1], 1, q.shape[2], **sizes, **masks,
        batch_size=batch.num_sequences, max_seqlen_q=batch.num_tokens - batch.num_sequences + 1,
        max_seqlen_ori_kv=near.longest, max_seqlen_cmp_kv=0 if far is None else far.longest, ori_topk=0,
        cmp_topk=0 if picks is None else picks.shape[-1], has_ori_kv=True, has_cmp_kv=far is not None,
    )  # fmt: skip
    out: Tensor = to(
        "cann_ops_transformer.sparse_flash_mla", q, **rows, **sizes, **masks, sinks=sink, metadata=metadata,
        softmax_scale=q.shape[2] ** -0.5,
    )[0]  # fmt: skip
    return out


def vendorpack(
    to: Calls, q: Tensor, near: Paged, far: Paged | None, picks: Tensor | None, lengths: Tensor, batch: Batch, sink: Tensor,
    ratio: int,
) -> Tensor:  # fmt: skip
    """By vllm-ascend: one length for both parts. Its default window of 128 back is one too many, so 127 is always passed."""
    shared: dict[str, Any] = {
        "cu_seqlens_q": batch.cu_seqlens, "seqused_kv": lengths, "cmp_ratio": ratio, "ori_mask_mode": _BAND,
        "cmp_mask_mode": _CAUSAL, "ori_win_left": _BLOCK - 1, "ori_win_right": 0, "layout_q": "TND", "layout_kv": "PA_ND",
    }  # fmt: skip
    rows: dict[str, Tensor | None] = {"ori_kv": near.rows, "ori_block_table": near.table}
    if far is not None:
        rows |= {"cmp_kv": far.rows, "cmp_block_table": far.table, "cmp_sparse_indices": picks}
    metadata = to(
        "_C_ascend.npu_sparse_attn_sharedkv_metadata", q.shape[1], 1, q.shape[2], **shared, batch_size=batch.num_sequences,
        max_seqlen_q=batch.num_tokens - batch.num_sequences + 1, max_seqlen_kv=near.longest,
        cmp_topk=0 if picks is None else picks.shape[-1], has_ori_kv=True, has_cmp_kv=far is not None,
    )  # fmt: skip
    out: Tensor = to(
        "_C_ascend.npu_sparse_attn_sharedkv", q, **rows, **shared, sinks=sink, metadata=metadata,
        softmax_scale=q.shape[2] ** -0.5,
    )[0]  # fmt: skip
    return out


def transformer_unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Heads of 512, a power of two of them to 128, a window of 128; on 910B and 910C ratios 4 and 128, top-k 512 or 1024."""
    heads = config.num_attention_heads
    if heads > 128 or heads & (heads - 1) or (heads == 1 and family == "950"):
        return f"{heads} heads, and its document knows powers of two to 128"
    if family != "950" and config.index_topk not in (512, 1024):
        return f"top-k {config.index_topk}, and its document knows 512 and 1024 here"
    return _shapes(config, family) or bf16_rows(config, engine, family)


def vendorpack_unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """64 heads of 512, a window of 128, ratios 4 and 128, top-k 512."""
    if config.num_attention_heads != 64:
        return f"{config.num_attention_heads} heads, and its document knows 64"
    if config.index_topk != 512:
        return f"top-k {config.index_topk}, and its document knows 512"
    return _shapes(config, "910C") or bf16_rows(config, engine, family)


def _shapes(config: ModelConfig, family: Family) -> str | None:
    if config.head_dim != 512:
        return f"head dim {config.head_dim}, and its document knows 512"
    if config.sliding_window != _BLOCK:
        return f"a window of {config.sliding_window}, and its document knows {_BLOCK}"
    # at ratio 4 entries are picked, at any other all of them are read
    ratios = {layer.ratio for layer in config.layers if layer.ratio}
    if family != "950" and not ratios <= {4, 128}:
        return f"ratios {sorted(ratios)}, and its document knows 4 and 128 here"
    return None
