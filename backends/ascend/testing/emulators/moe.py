"""Routing: the gate of _C_ascend, and the permutation to experts and back of torch_npu 2.13.0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .documented import FLOAT, emulates, garbage, int8_rows, refuse, want_dtype, want_shape


@emulates("_C_ascend", "moe_gating_top_k_hash", chips=("910B", "910C"))
def moe_gating_top_k_hash(
    x: Tensor, k: int, bias: Tensor | None = None, input_ids: Tensor | None = None, tid2eid: Tensor | None = None,
    k_group: int = 1, group_count: int = 1, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
    group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0, out_flag: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores by softmax (0), sigmoid (1) or the root of softplus (2); the k best of scores + bias, or those of the token's id.

    y = score / (sum of the chosen + eps) * factor, without the bias.

    Shapes:
        x [T, E] float, bias [E] of its dtype, input_ids [T] int64 with tid2eid [V, k] int32
        -> y [T, k] like x, ids [T, k] int32, scores [T, E] float32 if `out_flag`
    """
    want_dtype("x", x, *FLOAT)
    refuse(renorm != 0 or norm_type not in (0, 1, 2), f"renorm {renorm}, norm_type {norm_type}")
    refuse((k_group, group_count) != (1, 1), "groups are not emulated")
    refuse(not 1 <= k <= min(64, x.shape[-1]), f"k is {k}, documented are 1 to 64 and at most the experts")
    refuse((input_ids is None) != (tid2eid is None), "input_ids and tid2eid go together")
    logits = x.float()
    if norm_type == 0:
        scores = torch.softmax(logits, -1)
    else:
        scores = torch.sigmoid(logits) if norm_type == 1 else torch.nn.functional.softplus(logits).sqrt()
    if input_ids is not None and tid2eid is not None:
        want_dtype("input_ids", input_ids, torch.int64)
        want_dtype("tid2eid", tid2eid, torch.int32)
        want_shape("input_ids", input_ids, x.shape[0])
        want_shape("tid2eid", tid2eid, None, k)
        ids = tid2eid[input_ids].long()
    else:
        ranked = scores
        if bias is not None:
            refuse(bias.dtype != x.dtype, f"bias is {bias.dtype}, x {x.dtype}")
            ranked = scores + bias.float()
        ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.gather(scores, -1, ids)
    y = chosen / (chosen.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return y.to(x.dtype), ids.to(torch.int32), scores if out_flag else garbage(0, dtype=torch.float32)


@emulates("npu", "npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, offset: Tensor | None = None, active_num: int = -1,
    expert_capacity: int = -1, expert_num: int = -1, drop_pad_mode: int = 0, expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0, x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of tokens repeated per choice, sorted by expert (stable).

    Shapes:
        x [T, H], expert_idx [T, K] int32 -> rows [T * K, H], row index [T * K] int32 (0: place of choice t * K + k, -1 outside
        the range; 1: choice at a place), counts per expert of the range [E] int64, scales [T * K] float32 (int8 rows)
    """
    want_dtype("x", x, *FLOAT, torch.int8)
    want_dtype("expert_idx", expert_idx, torch.int32)
    refuse(
        expert_idx.shape[:1] != x.shape[:1] or x.dim() != 2 or expert_idx.dim() != 2,
        "x and expert_idx differ in rows",
    )
    refuse(
        not expert_tokens_num_flag or expert_tokens_num_type != 1,
        "counts per expert (flag, type 1) are what is emulated",
    )
    refuse(drop_pad_mode != 0 or offset is not None, "drop_pad_mode 0 without offset is what is documented")
    refuse(
        quant_mode not in (-1, 1) or (quant_mode == 1 and x.dtype == torch.int8),
        f"quant_mode {quant_mode} of {x.dtype}",
    )
    refuse(scale is not None, "smoothing scales are not emulated")
    refuse(not 0 < expert_num <= 10240, f"expert_num is {expert_num}")
    first, last = active_expert_range or (0, expert_num)
    refuse(not 0 <= first < last <= expert_num, f"active_expert_range is {first}, {last} of {expert_num}")
    total = expert_idx.numel()
    refuse(
        active_num not in (-1, 0, total), f"active_num is {active_num}; all {total} rows are what is emulated"
    )
    flat = expert_idx.flatten().long()
    refuse(bool(((flat < 0) | (flat >= expert_num)).any()), "an expert number is out of range")
    active = (flat >= first) & (flat < last)
    order = torch.sort(torch.where(active, flat, expert_num), stable=True).indices
    count = int(active.sum())
    rows = x[order[:count] // expert_idx.shape[1]]
    scales = garbage(total, dtype=torch.float32)
    if quant_mode == 1:
        rows, found = int8_rows(rows.float())
        scales[:count] = found
    expanded = garbage(total, x.shape[1], dtype=rows.dtype)
    expanded[:count] = rows
    if row_idx_type == 1:
        index = garbage(total, dtype=torch.int32)
        index[:count] = order[:count].to(torch.int32)
    else:
        index = torch.full((total,), -1, dtype=torch.int32)
        index[order[:count]] = torch.arange(count, dtype=torch.int32)
    return expanded, index, torch.bincount(flat[active] - first, minlength=last - first), scales


@emulates("npu", "npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None, scales: Tensor | None,
    expanded_src_to_dst_row: Tensor, export_for_source_row: Tensor | None, drop_pad_mode: int | None = 0, k: int | None = 1,
) -> Tensor:  # fmt: skip
    """out[i] = skip1[i] + skip2[i] + sum over k of scales[i, k] * rows[place(i, k)].

    The place of choice k of token i is at i + k * T of the index in mode 0, at i * K + k in mode 2.

    Shapes:
        rows [T * K, H] float, scales [T, K] and skips [T, H] of its dtype, index [T * K] int32 -> [T, H] like rows
    """
    want_dtype("rows", expanded_permuted_rows, *FLOAT)
    want_dtype("expanded_src_to_dst_row", expanded_src_to_dst_row, torch.int32)
    refuse(
        bias is not None or drop_pad_mode not in (0, 2),
        f"drop_pad_mode {drop_pad_mode}, or a bias, is not emulated",
    )
    refuse(skip2 is not None and skip1 is None, "skip2 needs skip1")
    for name, t in (("skip1", skip1), ("skip2", skip2), ("scales", scales)):
        refuse(
            t is not None and t.dtype != expanded_permuted_rows.dtype, f"{name} and the rows differ in dtype"
        )
    choices = scales.shape[1] if scales is not None else k or 1
    total = expanded_src_to_dst_row.shape[0]
    refuse(total % choices != 0, f"{total} choices, {choices} per token")
    places = expanded_src_to_dst_row.long()
    refuse(bool(((places < 0) | (places >= len(expanded_permuted_rows))).any()), "a place is out of range")
    at = places.view(choices, -1).T if drop_pad_mode == 0 else places.view(-1, choices)
    rows = expanded_permuted_rows.float()[at]
    out = (rows if scales is None else rows * scales.float()[..., None]).sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(expanded_permuted_rows.dtype)
