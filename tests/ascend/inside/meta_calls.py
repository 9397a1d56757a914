"""Every stock call with the shapes of V4-Flash and V4-Pro, on the meta device: what the vendor's own shape functions say of it.

With each comes a wrong input, and what is to happen with it: "refused" by the vendor's check; "shows" in the result, whose shape
or dtype is then another; "unchecked", taken as if it were right, where the vendor's function looks at nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from v4sdk.backend import Ranks
from v4sdk.config import ModelConfig

contract = importlib.import_module("v4sdk_ascend.contract")
ep_exchange = importlib.import_module("v4sdk_ascend.ep_exchange")

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

    def but(
        self,
        label: str,
        positional: Sequence[Any] | None = None,
        returns: Sequence[Result] | None = None,
        **keyword: Any,
    ) -> Case:
        """Another right call that differs in these."""
        new = {**self.keyword, **keyword}
        return Case(self.key, label, positional or self.positional, new, returns or self.returns)

    def wrong(
        self, label: str, outcome: Outcome, positional: Sequence[Any] | None = None, **keyword: Any
    ) -> Case:
        """A wrong call that differs in these."""
        return replace(self.but(label, positional, **keyword), outcome=outcome)


def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(config: ModelConfig) -> Iterator[Case]:
    """All calls of one model's shapes, each followed by its wrong form."""
    for family in (
        _norm_rope,
        _hyper_connection,
        _attention,
        _experts,
        _int8_matrices,
        _mx_matrices,
        _exchange,
    ):
        yield from family(config)


def _norm_rope(c: ModelConfig) -> Iterator[Case]:
    D, R, H = c.hidden_size, c.qk_rope_head_dim, c.num_attention_heads
    right = Case(
        "npu.npu_rms_norm", "rows", (t(T, D), t(D), c.rms_norm_eps), {}, ((BF16, (T, D)), (F32, (T, 1)))
    )
    yield right
    yield right.wrong("a gain of two dimensions", "shows", (t(T, D), t(1, D), c.rms_norm_eps))
    heads, table = t(1, T, H, R, dtype=F32), t(1, T, 1, R, dtype=F32)
    out = ((F32, (1, T, H, R)),)
    right = Case("npu.npu_rotary_mul", "heads", (heads, table, table), {"rotary_mode": "interleave"}, out)
    yield right
    half = t(1, T, 1, R // 2, dtype=F32)
    yield right.wrong("a table of half the width", "unchecked", (heads, half, half))


def _hyper_connection(c: ModelConfig) -> Iterator[Case]:
    D, n = c.hidden_size, c.hc_mult
    mixes = n * n + 2 * n
    x, fn, base = t(T, n, D), t(mixes, n * D, dtype=F32), t(mixes, dtype=F32)
    returns = (
        (BF16, (T, D)), (F32, (T, n)), (F32, (T, n, n)), (F32, (T,)), (F32, (T, mixes)), (F32, (T, n)),
    )  # fmt: skip
    eps = {"norm_eps": c.rms_norm_eps, "hc_eps": c.hc_eps}
    right = Case("npu.npu_mhc_pre", "streams", (x, fn, t(3, dtype=F32), base), eps, returns)
    yield right
    yield right.wrong("four scales", "refused", (x, fn, t(4, dtype=F32), base))
    steps = {"eps": c.hc_eps, "num_iters": c.hc_sinkhorn_iters}
    # what of its three results is not asked for is none
    right = Case("npu.npu_mhc_sinkhorn", "mixes", (t(T, n, n, dtype=F32),), steps, ((F32, (T, n, n)),))
    yield right
    yield right.wrong("three streams", "refused", (t(T, 3, 3, dtype=F32),))
    comb, post = t(T, n, n, dtype=F32), t(T, n, dtype=F32)
    right = Case("npu.npu_mhc_post", "streams", (x, comb, t(T, D), post), {}, ((BF16, (T, n, D)),))
    yield right
    yield right.wrong("an output of half the width", "unchecked", (x, comb, t(T, D // 2), post))


def _attention(c: ModelConfig) -> Iterator[Case]:
    H, D, R = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim
    I, E, K = c.index_n_heads, c.index_head_dim, c.index_topk
    index = {
        "actual_seq_lengths_query": t(T, dtype=I32), "actual_seq_lengths_key": t(T, dtype=I32),
        "block_table": t(T, 10, dtype=I32), "layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": K, "sparse_mode": 0,
    }  # fmt: skip
    query = (t(T, I, E), t(PAGES, PAGE, 1, E), t(T, I))
    right = Case("npu.npu_lightning_indexer", "pages", query, index, ((I32, (T, 1, K)), (BF16, (0,))))
    yield right
    yield right.wrong("nothing to choose", "refused", sparse_count=0)
    rows = PAGES * PAGE
    split = {
        "query_rope": t(1, T, H, R), "key_rope": t(1, rows, 1, R), "sparse_block_size": 1, "layout_query": "BSND",
        "layout_kv": "BSND", "sparse_mode": 0, "attention_mode": 2,
    }  # fmt: skip
    kv, ids = t(1, rows, 1, D), t(1, T, 1, c.sliding_window + K + 1, dtype=I32)
    out = ((BF16, (1, T, H, D)), (F32, (0,)), (F32, (0,)))
    inputs = (t(1, T, H, D), kv, kv, ids, D**-0.5)
    right = Case("npu.npu_sparse_flash_attention", "the sink a row of its own", inputs, split, out)
    yield right
    yield right.but("sinks", sinks=t(H, dtype=F32))
    yield right.wrong("queries of three dimensions", "refused", (t(T, H, D), *inputs[1:]))


def _experts(c: ModelConfig) -> Iterator[Case]:
    D, M, E, k = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok
    rows = T * k
    route = {
        "active_num": rows, "expert_num": E, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1,
        "active_expert_range": [0, E], "row_idx_type": 0,
    }  # fmt: skip
    found = ((BF16, (rows, D)), (I32, (rows,)), (I64, (E,)), (F32, (rows,)))
    ids = t(T, k, dtype=I32)
    right = Case("npu.npu_moe_init_routing_v2", "BF16 rows", (t(T, D), ids), route, found)
    yield right
    yield right.but("int8 rows", returns=((I8, (rows, D)), *found[1:]), quant_mode=1)
    yield right.wrong("ids of other rows", "refused", (t(T + 1, D), ids))
    act = {
        "weight_scale": t(E, 2 * M, dtype=F32), "activation_scale": t(rows, dtype=F32), "group_index": t(E, dtype=I64),
        "activate_left": True, "quant_mode": 1, "swiglu_mode": 2, "clamp_limit": c.swiglu_limit, "glu_alpha": 1.0,
        "glu_bias": 0.0,
    }  # fmt: skip
    sums, out = t(rows, 2 * M, dtype=I32), ((I8, (rows, M)), (F32, (rows,)))
    right = Case("npu.npu_dequant_swiglu_quant", "int32 sums", (sums,), act, out)
    yield right
    yield right.wrong("sums of half the width", "shows", (t(rows, M, dtype=I32),))
    clip = {"dim": -1, "alpha": 1.0, "limit": c.swiglu_limit, "bias": 0.0, "interleaved": False}
    both = t(rows, 2 * M, dtype=F32)
    right = Case("npu.npu_clipped_swiglu", "both halves", (both,), clip, ((F32, (rows, M)),))
    yield right
    yield right.wrong("one half", "shows", (t(rows, M, dtype=F32),))
    ones, places = t(T, k, dtype=F32), t(rows, dtype=I32)
    back = (t(rows, D, dtype=F32), None, None, None, ones, places, None)
    right = Case("npu.npu_moe_finalize_routing", "sum", back, {"drop_pad_mode": 0}, ((F32, (T, D)),))
    yield right
    # the factors alone say how many tokens come out
    yield right.wrong("factors of other tokens", "shows", (*back[:4], t(T - 1, k, dtype=F32), *back[5:]))


def _int8_matrices(c: ModelConfig) -> Iterator[Case]:
    D, M, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    Q, A, rows = c.q_lora_rank, c.num_attention_heads * c.head_dim, T * c.num_experts_per_tok
    quantised = ((I8, (T, D)), (F32, (T,)))
    right = Case("npu.npu_dynamic_quant", "int8 per row", (t(T, D),), {}, quantised)
    yield right
    yield right.wrong("rows of half the width", "shows", (t(T, D // 2),))
    x, w, scale = t(T, Q, dtype=I8), t(A, Q, dtype=I8).t(), t(A, dtype=F32)
    how = {"pertoken_scale": t(T, dtype=F32), "output_dtype": BF16}
    right = Case("npu.npu_quant_matmul", "int8", (x, w, scale), how, ((BF16, (T, A)),))
    yield right
    yield right.wrong("half the depth", "refused", (x, t(A, Q // 2, dtype=I8).t(), scale))
    groups = {
        "group_list": t(E, dtype=I64), "split_item": 3, "group_type": 0, "group_list_type": 1, "output_dtype": BF16,
    }  # fmt: skip
    up, down = ([t(rows, D)], [t(E, 2 * M, D).transpose(1, 2)]), ((BF16, (rows, 2 * M)),)
    right = Case("npu.npu_grouped_matmul", "BF16", up, groups, down)
    yield right
    yield right.wrong("groups of columns", "refused", group_type=1)
    ints = ([t(rows, D, dtype=I8)], [t(E, 2 * M, D, dtype=I8).transpose(1, 2)])
    yield right.but("int8 to int32", ints, ((I32, (rows, 2 * M)),), output_dtype=I32)
    scales = {"scale": [t(E, D, dtype=F32)], "per_token_scale": [t(rows, dtype=F32)]}
    ints = ([t(rows, M, dtype=I8)], [t(E, D, M, dtype=I8).transpose(1, 2)])
    yield right.but("int8 to FP16", ints, ((F16, (rows, D)),), output_dtype=F16, **scales)


def _mx_matrices(c: ModelConfig) -> Iterator[Case]:
    D, M, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    Q, A, rows = c.q_lora_rank, c.num_attention_heads * c.head_dim, T * c.num_experts_per_tok
    to_mx = {"axis": -1, "dst_type": FP8, "block_size": 32}
    right = Case("npu.npu_dynamic_mx_quant", "FP8", (t(T, D),), to_mx, ((FP8, (T, D)), (U8, (T, D // 64, 2))))
    yield right
    yield right.wrong("blocks of 48", "refused", block_size=48)
    how = {
        "pertoken_scale": t(T, Q // 64, 2, dtype=U8), "pertoken_scale_dtype": E8M0_CODE, "scale_dtype": E8M0_CODE,
        "group_sizes": [1, 1, 32], "output_dtype": BF16,
    }  # fmt: skip
    inputs = (t(T, Q, dtype=FP8), t(A, Q, dtype=FP8).t(), t(A, Q // 64, 2, dtype=U8).transpose(0, 1))
    right = Case("npu.npu_quant_matmul", "MXFP8", inputs, how, ((BF16, (T, A)),))
    yield right
    yield right.wrong("two group sizes", "refused", group_sizes=[1, 32])
    how = {
        "group_list": t(E, dtype=I64), "split_item": 3, "group_type": 0, "group_list_type": 1, "output_dtype": BF16,
        "antiquant_scale": [t(E, D, M // 64, 2, dtype=U8)], "per_token_scale": [t(rows, M // 64, 2, dtype=U8)],
        "weight_dtype": E2M1_CODE, "per_token_scale_dtype": E8M0_CODE,
    }  # fmt: skip
    packed = ([t(rows, M, dtype=FP8)], [t(E, D, M // 2, dtype=U8).transpose(1, 2)])
    right = Case("npu.npu_grouped_matmul", "MXFP8 by MXFP4", packed, how, ((BF16, (rows, D)),))
    yield right
    yield right.wrong("scales of another dtype", "refused", per_token_scale_dtype=E2M1_CODE)


class _Noted(contract.Vendor):  # type: ignore[name-defined, misc]
    """Makes no calls; keeps them, and gives what was prepared."""

    def __init__(self, *results: Any) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._results = iter(results)

    def call(self, key: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((key, args, kwargs))
        return next(self._results)


def _exchange(c: ModelConfig) -> Iterator[Case]:
    """The calls that the adapter itself makes, each with a wrong form; both families' forms are known to both."""
    D, k, local = c.hidden_size, c.num_experts_per_tok, c.n_routed_experts // RANKS
    received, wide = T * RANKS * min(local, k), ep_exchange.carried_width(D, k)
    bounds = tuple(local * rank for rank in range(RANKS + 1))
    for family in ("910B", "910C"):
        # besides what comes from each rank, where weights go along: two numbers per token and expert for eight ranks
        weighted = family == "910B"
        counts = RANKS * local + weighted * T * RANKS * 2 * k * (RANKS // 8)
        sent = (
            (BF16, (received, wide)), (F32, (received,)), (I32, (received * 128,)), (I64, (local,)), (I32, (counts,)),
            (I32, (0,)), (F32, (weighted * received,)),
        )  # fmt: skip
        given = [t(*shape, dtype=dtype) for dtype, shape in sent]
        given[3] = torch.zeros(local, dtype=I64)  # how many rows came is read: none
        noted = _Noted(given, t(T, wide))
        ranks = Ranks(0, bounds, lambda: None, lambda *rows: None)
        adapter = ep_exchange.DispatchCombine(noted, family, ranks, c, T, None, "group")
        adapter.exchange(t(T, D), t(T, k, dtype=I32), t(T, k, dtype=F32), lambda *rows: None)
        (first, args, how), (second, back, back_how) = noted.calls
        right = Case(first, f"as on {family}", args, how, sent)
        yield right
        yield right.wrong(f"a rank too many, as on {family}", "refused", (*args[:4], RANKS, *args[5:]))
        right = Case(second, f"as on {family}", back, back_how, ((BF16, (T, wide)),))
        yield right
        other = t(T + 1, k, dtype=I32)
        yield right.wrong(f"other ids, as on {family}", "shows", (back[0], other, *back[2:]))


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
