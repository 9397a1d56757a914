"""Experts: routing, permutation, grouped products, gated activations; torch_npu 2.13.0, and the gate of _C_ascend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .documented import (
    FLOAT,
    HALF,
    Refused,
    emulates,
    family,
    garbage,
    int8_rows,
    refuse,
    want_contiguous,
    want_dtype,
    want_shape,
)
from .quant import E8M0, mx_scales, mx_values, typed


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


def _groups(group_list: Tensor | None, kind: int | None, rows: int, experts: int) -> list[int]:
    if group_list is None:
        raise Refused("group_type 0 needs group_list")
    want_dtype("group_list", group_list, torch.int64)
    want_shape("group_list", group_list, experts)
    refuse(experts > 1024, f"{experts} groups, documented are at most 1024")
    numbers = group_list.tolist()
    if kind == 0:
        numbers = [b - a for a, b in zip([0, *numbers], numbers, strict=False)]
    refuse(kind not in (0, 1), f"group_list_type is {kind}")
    refuse(min(numbers) < 0 or sum(numbers) != rows, f"group_list sums to {sum(numbers)} for {rows} rows")
    return numbers


@emulates("npu", "npu_grouped_matmul")
def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: list[Tensor] | None = None, scale: list[Tensor] | None = None,
    offset: list[Tensor] | None = None, antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None, per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None, activation_input: list[Tensor] | None = None,
    activation_quant_scale: list[Tensor] | None = None, activation_quant_offset: list[Tensor] | None = None,
    split_item: int | None = 0, group_type: int | None = None, group_list_type: int | None = 0, act_type: int | None = 0,
    tuning_config: list[int] | None = None, output_dtype: int | None = None, x_dtype: int | None = None,
    weight_dtype: int | None = None, scale_dtype: int | None = None, per_token_scale_dtype: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """One product per group of rows: one x [M, K], one weight [E, K, N], one output [M, N].

    int8: int32 sums times scale [E, N] and per_token_scale [M]; without both, the sums themselves as int32.
    """
    unused = (
        bias,
        offset,
        antiquant_scale,
        antiquant_offset,
        activation_input,
        activation_quant_scale,
        activation_quant_offset,
    )
    refuse(any(t is not None for t in unused), "an argument is passed that is not emulated")
    refuse(len(x) != 1 or len(weight) != 1, "one x and one weight are what is emulated")
    refuse(
        group_type != 0 or split_item not in (2, 3) or act_type != 0,
        f"group_type {group_type}, split_item {split_item}",
    )
    rows, matrix = x[0], weight[0]
    refuse(rows.dim() != 2 or matrix.dim() != 3, f"x is {list(rows.shape)}, weight {list(matrix.shape)}")
    want_contiguous(x=rows)
    numbers = _groups(group_list, group_list_type, rows.shape[0], matrix.shape[0])
    token = None if per_token_scale is None else per_token_scale[0]
    if scale_dtype == E8M0 or per_token_scale_dtype == E8M0:
        refuse(family() != "950", f"MX scales are for 950, not for {family()}")
        refuse(scale is None or token is None, "MX needs both scales")
        assert scale is not None
        assert token is not None
        return [
            _mx_groups(
                rows,
                matrix,
                scale[0],
                token,
                numbers,
                x_dtype,
                weight_dtype,
                typed(output_dtype, torch.bfloat16),
            )
        ]
    refuse(rows.shape[1] != matrix.shape[1], f"x is {list(rows.shape)}, weight {list(matrix.shape)}")
    refuse(max(rows.shape[1], matrix.shape[2]) >= 65536, "a last dim is not below 65536")
    if rows.dtype == torch.int8:
        return [_int8_groups(rows, matrix, scale, token, numbers, typed(output_dtype, torch.int8))]
    want_dtype("x", rows, *FLOAT)
    refuse(matrix.dtype != rows.dtype, f"weight is {matrix.dtype}, x {rows.dtype}")
    refuse(scale is not None or token is not None, "scales go with int8")
    target = typed(output_dtype, rows.dtype)
    refuse(target != rows.dtype, f"output {target} of {rows.dtype} is not in the table")
    parts = [a.float() @ b.float() for a, b in zip(torch.split(rows, numbers), matrix, strict=True)]
    return [torch.cat(parts).to(target)]


def _int8_groups(
    rows: Tensor, matrix: Tensor, scale: list[Tensor] | None, token: Tensor | None, numbers: list[int], target: torch.dtype
) -> Tensor:  # fmt: skip
    want_dtype("weight", matrix, torch.int8)
    # float64 holds int32 sums exactly
    sums = [a.double() @ b.double() for a, b in zip(torch.split(rows, numbers), matrix, strict=True)]
    if scale is None:
        refuse(target != torch.int32 or token is not None, f"int8 without scale gives int32, not {target}")
        return torch.cat(sums).to(torch.int32)
    want_shape("scale", scale[0], matrix.shape[0], matrix.shape[2])
    pairs = {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)}
    refuse(
        (scale[0].dtype, target) not in pairs,
        f"scale {scale[0].dtype} with output {target} is not in the table",
    )
    y = torch.cat([s.float() * column.float() for s, column in zip(sums, scale[0], strict=True)])
    if token is not None:
        want_dtype("per_token_scale", token, torch.float32)
        want_shape("per_token_scale", token, rows.shape[0])
        y = y * token[:, None]
    return y.to(target)


def _mx_groups(
    rows: Tensor, matrix: Tensor, scale: Tensor, token: Tensor, numbers: list[int], x_dtype: int | None,
    weight_dtype: int | None, target: torch.dtype,
) -> Tensor:  # fmt: skip
    """Weights as the transposed view of [E, N, K] (FP4: [E, N, K/2] bytes) with E8M0 bytes [E, N, K/64, 2]."""
    refuse(matrix.stride(1) != 1, "MX weights must be the transposed view of [E, N, K]")
    a = mx_values(rows, x_dtype)
    a = a * mx_scales(token).repeat_interleave(32, -1)[:, : a.shape[1]]
    b = mx_values(matrix.transpose(1, 2).contiguous(), weight_dtype)
    scales = scale if scale.shape[1] == b.shape[1] else scale.transpose(1, 2)
    b = b * mx_scales(scales).repeat_interleave(32, -1)[..., : b.shape[2]]
    return torch.cat([p @ w.T for p, w in zip(torch.split(a, numbers), b, strict=True)]).to(target)


def _gated(x: Tensor, mode: int, left: bool, limit: float, alpha: float, bias: float) -> Tensor:
    if mode == 1:
        gate, value = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, -1)
        gate, value = (first, second) if left else (second, first)
    if mode == 0:
        return gate * torch.sigmoid(gate) * value
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (value + bias)


@emulates("npu", "npu_dequant_swiglu_quant", chips=("910B", "910C"))
def npu_dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor | None = None, activation_scale: Tensor | None = None, bias: Tensor | None = None,
    quant_scale: Tensor | None = None, quant_offset: Tensor | None = None, group_index: Tensor | None = None,
    activate_left: bool = False, quant_mode: int = 0, dst_type: int | None = None, round_mode: int | None = None,
    activate_dim: int | None = None, swiglu_mode: int = 0, clamp_limit: float = 7.0, glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale int32 sums back, gate, and quantise each row to int8.

    swiglu_mode 0 has no clamp; 1 takes even channels as gates, 2 one half: gate min(g, limit) * sigmoid(alpha * g) times
    clamp(v, -limit, limit) + bias.

    Shapes:
        x [T, 2H] int32 with weight_scale [G, 2H] and activation_scale [T] or [T, 1] float32, or bfloat16 without; group_index
        [G] int64 counts -> y [T, H] int8, scale [T] float32; rows past the groups are garbage
    """
    want_dtype("x", x, torch.int32, *HALF)
    refuse(x.dim() != 2 or x.shape[1] % 2 != 0, f"x is {list(x.shape)}")
    refuse(
        any(t is not None for t in (bias, quant_scale, quant_offset, round_mode)),
        "an argument is passed that is not emulated",
    )
    refuse(
        typed(dst_type, torch.int8) != torch.int8 or activate_dim not in (None, -1),
        "int8 along the last dim is emulated",
    )
    refuse(quant_mode != 1, f"quant_mode is {quant_mode}; dynamic (1) is what is emulated")
    refuse(swiglu_mode not in (0, 1, 2), f"swiglu_mode is {swiglu_mode}")
    refuse(clamp_limit <= 0, f"clamp_limit is {clamp_limit}, documented are positive ones")
    tokens, width = x.shape
    numbers = [tokens]
    if group_index is not None:
        want_dtype("group_index", group_index, torch.int64)
        numbers = group_index.tolist()
        refuse(
            min(numbers) < 0 or sum(numbers) > tokens, f"group_index sums to {sum(numbers)} for {tokens} rows"
        )
        half = width // 2
        refuse(
            half % 64 != 0 or half > 10496,
            f"H is {half}, documented are multiples of 64 to 10496 with groups",
        )
    count = sum(numbers)
    values = x[:count].float()
    if x.dtype == torch.int32:
        if weight_scale is None or activation_scale is None:
            raise Refused("int32 sums need weight_scale and activation_scale")
        want_dtype("weight_scale", weight_scale, torch.float32)
        want_dtype("activation_scale", activation_scale, torch.float32)
        want_shape("weight_scale", weight_scale, len(numbers), width)
        refuse(
            activation_scale.shape not in ((tokens,), (tokens, 1)),
            f"activation_scale is {list(activation_scale.shape)}",
        )
        group = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
        values = values * weight_scale[group] * activation_scale.view(-1, 1)[:count]
    else:
        refuse(weight_scale is not None or activation_scale is not None, "scales go with int32 sums")
    found, scales = int8_rows(_gated(values, swiglu_mode, activate_left, clamp_limit, glu_alpha, glu_bias))
    y, scale = garbage(tokens, width // 2, dtype=torch.int8), garbage(tokens, dtype=torch.float32)
    y[:count], scale[:count] = found, scales
    return y, scale


@emulates("npu", "npu_clipped_swiglu")
def npu_clipped_swiglu(
    x: Tensor, *, group_index: Tensor | None = None, dim: int = -1, alpha: float = 1.702, limit: float = 7.0,
    bias: float = 1.0, interleaved: bool = True,
) -> Tensor:  # fmt: skip
    """min(a, limit) * sigmoid(alpha * a) times clamp(b, -limit, limit) + bias; a and b even and odd channels, or halves.

    Shapes:
        x [.., 2H] float -> [.., H] like x; rows past the sum of group_index are garbage
    """
    want_dtype("x", x, *FLOAT)
    want_contiguous(x=x)
    refuse(
        x.dim() < 2 or dim not in (-1, x.dim() - 1) or x.shape[-1] % 2 != 0,
        f"x is {list(x.shape)}, dim {dim}",
    )
    y = _gated(x.float(), 1 if interleaved else 2, True, limit, alpha, bias).to(x.dtype)
    if group_index is not None:
        want_dtype("group_index", group_index, torch.int64)
        y.flatten(0, -2)[int(group_index.sum()) :] = torch.nan
    return y


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
