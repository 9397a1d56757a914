"""The lightning indexer by torch_npu; and why those of the other packs are passed over."""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.backend import EngineConfig
from v4sdk.config import ModelConfig
from v4sdk.numerics import Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.compressor import index_topk as index_topk_op

from ..chip import Family
from . import Calls, bf16_rows

_LAST = torch.iinfo(torch.int32).max
_HEADS_950 = (8, 16, 24, 32, 64)


def index_topk(
    to: Calls, q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, numerics: Numerics
) -> Tensor:
    """As the op, except that equal scores may be picked in another order.

    The kernel knows no compression ratio, so its own causal mask would be wrong. Every token is a sequence of its own here,
    whose length is what it may see: one call, and nothing to mask.
    """
    if keys.shape[1] % 16 or keys.shape[1] > 1024:
        return index_topk_op(q, w, keys, batch, topk, ratio, numerics)
    table = batch.block_table if batch.is_decode else batch.block_table[batch.seq_ids]
    found = to(
        "npu.npu_lightning_indexer", q.contiguous(), keys.unsqueeze(2), w.to(q.dtype).contiguous(),
        actual_seq_lengths_query=torch.arange(1, len(q) + 1, dtype=torch.int32, device=q.device),
        actual_seq_lengths_key=(batch.positions + 1) // ratio,
        # what no query reads may be any page
        block_table=table.clamp_min(0).to(torch.int32).contiguous(),
        layout_query="TND", layout_key="PA_BSND", sparse_count=topk, sparse_mode=0,
    )[0][:, 0]  # fmt: skip
    ascending = torch.where(found < 0, _LAST, found).sort(-1).values
    return torch.where(ascending == _LAST, -1, ascending)


def unless(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Keys of 128 in BF16, at most 64 heads, and scores in the kernel's own precision."""
    heads = config.index_n_heads
    if config.index_head_dim != 128:
        return f"index head dim {config.index_head_dim}, and its document knows 128"
    if heads > 64 or (family == "950" and heads not in _HEADS_950):
        known = ", ".join(map(str, _HEADS_950)) if family == "950" else "1 to 64"
        return f"{heads} index heads, and its document knows {known}"
    if config.index_topk > 2048:
        return f"top-k {config.index_topk}, and every chip's document knows 1 to 2048"
    if engine.numerics.bf16_index_scores:
        return f"numerics `{engine.numerics.name}` rounds scores to BF16 at three places, and it does not"
    return bf16_rows(config, engine, family)


def quantised(config: ModelConfig, engine: EngineConfig, family: Family) -> str | None:
    """Why the quantised indexers serve nothing yet: their keys are stored otherwise."""
    return (
        "it reads int8 or MX keys with scales in a tensor of their own; index keys lie in the cache as "
        f"`{engine.kv_format}` rows, and to quantise them would read every key of the context once more each step"
    )
