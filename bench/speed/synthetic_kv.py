"""Cache rows nobody computed: random, but such as the model itself could have written, at the cost of writing them.

A decode step reads them as it would read real ones, so its time at a million tokens can be measured without reading a million.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.kv_cache import CacheRows, KVCache
from v4sdk.ops.rows import store_index, store_kv
from v4sdk.quant import q4_round, q8_round

# rows that are really drawn; a longer context repeats them in random order
_DISTINCT = 4096


def random_rows(config: ModelConfig, name: str, like: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Valid rows of one cache tensor.

    Args:
        name: `window`, `entries` or `index_keys`. like: gives dtype and device.

    Shapes:
        -> [count, row] in the dtype of `like`
    """
    packed = like.dtype == torch.uint8
    if name == "index_keys":
        keys = torch.randn(count, config.index_head_dim, generator=random)
        return store_index(q4_round(keys) if packed else keys, like).to(like.device)
    rows = torch.randn(count, config.head_dim, generator=random)
    if packed:
        plain = config.head_dim - config.qk_rope_head_dim
        rows = torch.cat((q8_round(rows[..., :plain], 64), rows[..., plain:].bfloat16().float()), -1)
    return store_kv(rows, like, config.qk_rope_head_dim).to(like.device)


def fill(cache: KVCache, rows: CacheRows, num_tokens: int, seed: int = 0) -> None:
    """Give a sequence the state of `num_tokens` tokens that were never read.

    Raises:
        MemoryRefused: if the pages do not fit; nothing is changed then.
    """
    random = torch.Generator().manual_seed(seed)
    cache.reserve(rows, num_tokens)
    for layer in cache.layers:
        for name, tensor in layer.fixed().items():
            if name == "window":
                tensor[rows.slot] = random_rows(cache.config, name, tensor, tensor.shape[1], random)
            else:
                # open blocks hold projections, of unit size in a working model
                tensor[rows.slot] = torch.randn(tensor.shape[1:], generator=random).to(tensor.device)
        for name, tensor in layer.paged().items():
            distinct = random_rows(cache.config, name, tensor, _DISTINCT, random)
            for page in rows.pages:
                at = torch.randint(_DISTINCT, (tensor.shape[1],), generator=random)
                tensor[page] = distinct[at.to(tensor.device)]
