"""The vocabulary: every op by name. Tests, conformance, benchmarks and tables iterate `OPS`."""

from __future__ import annotations

from typing import Any

from v4sdk.ops.attention import grouped_out, kv_project_store, q_project, sparse_attn
from v4sdk.ops.batch import Batch, make_batch
from v4sdk.ops.compressor import compress, index_query, index_topk
from v4sdk.ops.embedding import embed, logits
from v4sdk.ops.hyper_connection import hc_head, hc_post, hc_post_pre, hc_pre
from v4sdk.ops.linear import linear
from v4sdk.ops.moe import route, route_hash, routed_experts, shared_expert
from v4sdk.ops.norm import rms_norm
from v4sdk.ops.op import REFERENCES, Case, Cost, Op, OpTable, Tolerance
from v4sdk.ops.rope import rope_table
from v4sdk.ops.sample import feed, sample

_ALL: tuple[Op[Any, Any], ...] = (
    embed, rope_table, hc_pre, hc_post, hc_post_pre, hc_head, rms_norm, linear, q_project, kv_project_store, compress,
    index_query, index_topk, sparse_attn, grouped_out, route, route_hash, routed_experts, shared_expert, logits, sample,
    feed,
)  # fmt: skip
OPS: dict[str, Op[Any, Any]] = {op.name: op for op in _ALL}

__all__ = [
    "OPS", "REFERENCES", "Batch", "Case", "Cost", "Op", "OpTable", "Tolerance", "compress", "embed", "feed", "grouped_out",
    "hc_head", "hc_post", "hc_post_pre", "hc_pre", "index_query", "index_topk", "kv_project_store", "linear", "logits",
    "make_batch", "q_project", "rms_norm", "rope_table", "route", "route_hash", "routed_experts", "sample",
    "shared_expert", "sparse_attn",
]  # fmt: skip
