"""Every stock call with the shapes of V4-Flash and V4-Pro, on the meta device: what the vendor's own shape functions say of it.

With each comes a wrong input, and what is to happen with it: "refused" by the vendor's check; "shows" in the result, whose shape
or dtype is then another; "unchecked", taken as if it were right, where the vendor's function looks at nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from v4sdk.config import ModelConfig

T = 37
RANKS = 16
PAGES, PAGE = 20, 128
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
I8, I32, I64, U8 = torch.int8, torch.int32, torch.int64, torch.uint8
FP8 = torch.float8_e4m3fn
# the vendor's numbers for dtypes that its torch may not have: torch_npu.float4_e2m1fn_x2 and float8_e8m0fnu
E2M1_CODE, E8M0_CODE = 296, 293

Result = tuple[torch.dtype, tuple[int, ...]]
Outcome = Literal["accepted", "refused", "shows", "unchecked"]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        key: of the contract. label: what is tried. arguments: by position, and by keyword. returns: dtype and shape of each
            tensor, in order. outcome: what is to happen.
    """

    key: str
    label: str
    positional: Sequence[Any]
    keyword: dict[str, Any]
    returns: Sequence[Result]
    outcome: Outcome = "accepted"


def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(config: ModelConfig) -> Iterator[Case]:
    """All calls of one model's shapes, each followed by its wrong form."""
    for family in (_norm_rope, _hyper_connection, _attention, _experts, _quantised, _exchange):
        yield from family(config)


def _norm_rope(c: ModelConfig) -> Iterator[Case]:
    D = c.hidden_size
    norm = ((BF16, (T, D)), (F32, (T, 1)))
    yield Case("npu.npu_rms_norm", "hidden rows", (t(T, D), t(D), c.rms_norm_eps), {}, norm)
    yield Case(
        "npu.npu_rms_norm", "gain of two dimensions", (t(T, D), t(1, D), c.rms_norm_eps), {}, norm, "shows"
    )
    R, H = c.qk_rope_head_dim, c.num_attention_heads
    rope, mode = (t(1, T, 1, R), t(1, T, 1, R)), {"rotary_mode": "interleave"}
    yield Case(
        "npu.npu_rotary_mul", "last dims of queries", (t(1, T, H, R), *rope), mode, ((BF16, (1, T, H, R)),)
    )
    wrong = (t(1, T, 1, R // 2), t(1, T, 1, R // 2))
    yield Case(
        "npu.npu_rotary_mul",
        "table of half the width",
        (t(1, T, H, R), *wrong),
        mode,
        ((BF16, (1, T, H, R)),),
        "unchecked",
    )


def _hyper_connection(c: ModelConfig) -> Iterator[Case]:
    D, n = c.hidden_size, c.hc_mult
    mixes = n * n + 2 * n
    eps = {"norm_eps": c.rms_norm_eps, "hc_eps": c.hc_eps}
    returns = (
        (BF16, (T, D)), (F32, (T, n)), (F32, (T, n, n)), (F32, (T,)), (F32, (T, mixes)), (F32, (T, n)),
    )  # fmt: skip
    weights = (t(mixes, n * D, dtype=F32), t(3, dtype=F32), t(mixes, dtype=F32))
    yield Case("npu.npu_mhc_pre", "streams", (t(T, n, D), *weights), eps, returns)
    four = (weights[0], t(4, dtype=F32), weights[2])
    yield Case("npu.npu_mhc_pre", "four scales", (t(T, n, D), *four), eps, returns, "refused")
    steps = {"eps": c.hc_eps, "num_iters": c.hc_sinkhorn_iters}
    square = ((F32, (T, n, n)),)
    yield Case("npu.npu_mhc_sinkhorn", "mixes", (t(T, n, n, dtype=F32),), steps, square)
    yield Case("npu.npu_mhc_sinkhorn", "three streams", (t(T, 3, 3, dtype=F32),), steps, square, "refused")
    post = (t(T, n, n, dtype=F32), t(T, D), t(T, n, dtype=F32))
    yield Case("npu.npu_mhc_post", "streams", (t(T, n, D), *post), {}, ((BF16, (T, n, D)),))
    half = (post[0], t(T, D // 2), post[2])
    yield Case(
        "npu.npu_mhc_post",
        "output of half the width",
        (t(T, n, D), *half),
        {},
        ((BF16, (T, n, D)),),
        "unchecked",
    )


def _attention(c: ModelConfig) -> Iterator[Case]:
    H, D, R = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim
    I, E, K = c.index_n_heads, c.index_head_dim, c.index_topk
    index = {
        "actual_seq_lengths_query": t(2, dtype=I32), "actual_seq_lengths_key": t(2, dtype=I32),
        "block_table": t(2, 10, dtype=I32), "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": K, "sparse_mode": 0,
    }  # fmt: skip
    query = (t(T, I, E), t(PAGES, PAGE, 1, E), t(T, I))
    found = ((I32, (T, 1, K)), (BF16, (0,)))
    yield Case("npu.npu_lightning_indexer", "paged keys", query, index, found)
    none = {**index, "sparse_count": 0}
    yield Case("npu.npu_lightning_indexer", "no key to choose", query, none, found, "refused")
    rows = PAGES * PAGE
    split = {
        "query_rope": t(1, T, H, R), "key_rope": t(1, rows, 1, R), "sparse_block_size": 1, "layout_query": "BSND",
        "layout_kv": "BSND", "sparse_mode": 0, "attention_mode": 2,
    }  # fmt: skip
    kv, ids = t(1, rows, 1, D), t(1, T, 1, c.sliding_window + K + 1, dtype=I32)
    out = ((BF16, (1, T, H, D)), (F32, (0,)), (F32, (0,)))
    name = "npu.npu_sparse_flash_attention"
    yield Case(name, "the sink a row of its own", (t(1, T, H, D), kv, kv, ids, D**-0.5), split, out)
    yield Case(name, "sinks", (t(1, T, H, D), kv, kv, ids, D**-0.5), {**split, "sinks": t(H, dtype=F32)}, out)
    yield Case(name, "queries of three dimensions", (t(T, H, D), kv, kv, ids, D**-0.5), split, out, "refused")


def _experts(c: ModelConfig) -> Iterator[Case]:
    D, M, E, k = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok
    rows = T * k
    route = {
        "active_num": rows, "expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
        "active_expert_range": [0, E], "row_idx_type": 0,
    }  # fmt: skip
    counted = ((I32, (rows,)), (I64, (E,)))
    ids = t(T, k, dtype=I32)
    name = "npu.npu_moe_init_routing_v2"
    yield Case(
        name,
        "bfloat16 rows",
        (t(T, D), ids),
        {**route, "quant_mode": -1},
        ((BF16, (rows, D)), *counted, (F32, (rows,))),
    )
    yield Case(
        name,
        "int8 rows",
        (t(T, D), ids),
        {**route, "quant_mode": 1},
        ((I8, (rows, D)), *counted, (F32, (rows,))),
    )
    yield Case(name, "ids of other rows", (t(T + 1, D), ids), {**route, "quant_mode": 1}, (), "refused")
    groups = {"group_list": t(E, dtype=I64), "split_item": 3, "group_type": 0, "group_list_type": 1}
    name = "npu.npu_grouped_matmul"
    yield Case(name, "bfloat16", ([t(rows, D)], [t(E, D, 2 * M)]), groups, ((BF16, (rows, 2 * M)),))
    scaled = {**groups, "scale": [t(E, D)], "per_token_scale": [t(rows, dtype=F32)], "output_dtype": BF16}
    weight = [t(E, M, D, dtype=I8)]
    yield Case(name, "int8", ([t(rows, M, dtype=I8)], weight), scaled, ((BF16, (rows, D)),))
    packed = {
        **groups, "scale": [t(E, D, M // 64, 2, dtype=U8).transpose(1, 2)], "per_token_scale": [t(rows, M // 64, 2, dtype=U8)],
        "weight_dtype": E2M1_CODE, "scale_dtype": E8M0_CODE, "per_token_scale_dtype": E8M0_CODE, "output_dtype": BF16,
    }  # fmt: skip
    fp4 = [t(E, D, M // 2, dtype=U8).transpose(1, 2)]
    yield Case(name, "MXFP8 with MXFP4", ([t(rows, M, dtype=FP8)], fp4), packed, ((BF16, (rows, D)),))
    yield Case(
        name,
        "scales of another dtype",
        ([t(rows, M, dtype=FP8)], fp4),
        {**packed, "scale_dtype": E2M1_CODE},
        (),
        "refused",
    )
    plain = {**groups, "output_dtype": I32}
    yield Case(
        name,
        "int8 to int32",
        ([t(rows, D, dtype=I8)], [t(E, D, 2 * M, dtype=I8)]),
        plain,
        ((I32, (rows, 2 * M)),),
    )
    yield Case(
        name,
        "groups along the columns",
        ([t(rows, D)], [t(E, D, 2 * M)]),
        {**groups, "group_type": 1},
        (),
        "refused",
    )
    act = {
        "weight_scale": t(E, 2 * M, dtype=F32), "activation_scale": t(rows, dtype=F32), "group_index": t(E, dtype=I64),
        "activate_left": True, "quant_mode": 1, "swiglu_mode": 2, "clamp_limit": c.swiglu_limit, "glu_alpha": 1.0,
        "glu_bias": 0.0,
    }  # fmt: skip
    name = "npu.npu_dequant_swiglu_quant"
    yield Case(name, "int32 sums", (t(rows, 2 * M, dtype=I32),), act, ((I8, (rows, M)), (F32, (rows,))))
    yield Case(
        name,
        "sums of half the width",
        (t(rows, M, dtype=I32),),
        act,
        ((I8, (rows, M)), (F32, (rows,))),
        "shows",
    )
    clip = {"dim": -1, "alpha": 1.0, "limit": c.swiglu_limit, "bias": 0.0, "interleaved": False}
    yield Case("npu.npu_clipped_swiglu", "bfloat16", (t(rows, 2 * M),), clip, ((BF16, (rows, M)),))
    yield Case("npu.npu_clipped_swiglu", "half the width", (t(rows, M),), clip, ((BF16, (rows, M)),), "shows")
    back = (t(rows, D), None, None, None, t(T, k), t(rows, dtype=I32), None)
    name = "npu.npu_moe_finalize_routing"
    yield Case(name, "weighted sum", back, {"drop_pad_mode": 2}, ((BF16, (T, D)),))
    # the weights alone say how many tokens come out
    short = (*back[:4], t(T - 1, k), *back[5:])
    yield Case(name, "weights of other tokens", short, {"drop_pad_mode": 2}, ((BF16, (T, D)),), "shows")


def _quantised(c: ModelConfig) -> Iterator[Case]:
    D, Q, A = c.hidden_size, c.q_lora_rank, c.num_attention_heads * c.head_dim
    yield Case("npu.npu_dynamic_quant", "int8 per row", (t(T, D),), {}, ((I8, (T, D)), (F32, (T,))))
    yield Case("npu.npu_dynamic_quant", "one dimension", (t(D),), {}, ((I8, (D,)), (F32, ())), "shows")
    right = {"pertoken_scale": t(T, dtype=F32), "output_dtype": BF16}
    out = ((BF16, (T, A)),)
    name = "npu.npu_quant_matmul"
    yield Case(name, "int8", (t(T, Q, dtype=I8), t(Q, A, dtype=I8), t(A)), right, out)
    yield Case(
        name, "half the depth", (t(T, Q, dtype=I8), t(Q // 2, A, dtype=I8), t(A)), right, out, "refused"
    )
    blocks = {
        "pertoken_scale": t(T, Q // 64, 2, dtype=U8), "pertoken_scale_dtype": E8M0_CODE, "scale_dtype": E8M0_CODE,
        "group_sizes": [1, 1, 32], "output_dtype": BF16,
    }  # fmt: skip
    weight = (t(A, Q, dtype=FP8).t(), t(A, Q // 64, 2, dtype=U8).transpose(0, 1))
    yield Case(name, "MXFP8", (t(T, Q, dtype=FP8), *weight), blocks, out)
    yield Case(
        name,
        "MXFP8, two group sizes",
        (t(T, Q, dtype=FP8), *weight),
        {**blocks, "group_sizes": [1, 32]},
        out,
        "refused",
    )
    scales = (U8, (T, D // 64, 2))
    name, mx = "npu.npu_dynamic_mx_quant", {"axis": -1, "dst_type": FP8, "block_size": 32}
    yield Case(name, "FP8", (t(T, D),), mx, ((FP8, (T, D)), scales))
    yield Case(name, "blocks of 48", (t(T, D),), {**mx, "block_size": 48}, ((FP8, (T, D)), scales), "refused")


def _exchange(c: ModelConfig) -> Iterator[Case]:
    D, E, k = c.hidden_size, c.n_routed_experts, c.num_experts_per_tok
    local = E // RANKS
    received = T * RANKS * min(local, k)
    share = {
        "x_active_mask": t(T, dtype=torch.bool), "shared_expert_num": 0, "shared_expert_rank_num": 0, "global_bs": T * RANKS,
        "comm_alg": "",
    }  # fmt: skip
    send = {**share, "expert_scales": t(T, k, dtype=F32), "quant_mode": 2, "expert_token_nums_type": 1}
    # besides what comes from each rank: two numbers per token and expert for each group of eight ranks
    counts = RANKS * local + T * RANKS * 2 * k * (RANKS // 8)
    sent = (
        (I8, (received, D)), (F32, (received,)), (I32, (received * 128,)), (I64, (local,)), (I32, (counts,)), (I32, (0,)),
        (F32, (received,)),
    )  # fmt: skip
    name = "npu.npu_moe_distribute_dispatch_v2"
    ids = t(T, k, dtype=I32)
    yield Case(name, "int8 rows", (t(T, D), ids, "group", RANKS, 0, E), send, sent)
    yield Case(name, "a rank too many", (t(T, D), ids, "group", RANKS, RANKS, E), send, sent, "refused")
    name = "npu.npu_moe_distribute_combine_v2"
    gather = {**share, "tp_send_counts": t(0, dtype=I32), "expand_scales": t(received, dtype=F32)}
    places = (t(received * 128, dtype=I32), t(counts, dtype=I32), t(T, k, dtype=F32), "group", RANKS, 0, E)
    yield Case(name, "weighted sum", (t(received, D), ids, *places), gather, ((BF16, (T, D)),))
    yield Case(
        name,
        "ids of other rows",
        (t(received, D), t(T + 1, k, dtype=I32), *places),
        gather,
        ((BF16, (T, D)),),
        "shows",
    )


def outcome(case: Case, call: Callable[..., Any]) -> tuple[str, str]:
    """What happens to a call: the outcome's word and what was said or returned."""
    try:
        given = call(case.key, *case.positional, **case.keyword)
    except TypeError:
        # the table of calls does not name an argument: a fault of the case, not a refusal of the vendor's
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        return "refused", str(error).strip().splitlines()[0]
    result = tuple((x.dtype, tuple(x.shape)) for x in _tensors(given))
    if result == tuple(case.returns):
        return ("accepted" if case.outcome == "accepted" else "unchecked"), ""
    return ("differs" if case.outcome == "accepted" else "shows"), f"{result} and not {tuple(case.returns)}"


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for part in given:
            yield from _tensors(part)
