"""Experts: grouped products and gated activations of torch_npu 2.13.0, with the dtype tables of its documents."""

from __future__ import annotations

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
from .quant import E8M0, FP4, mx_scales, mx_values, typed


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
    if E8M0 in (scale_dtype, per_token_scale_dtype):
        refuse(family() != "950", f"MX scales are for 950, not for {family()}")
        blocks = _mx_scale(rows, weight_dtype, scale, scale_dtype, antiquant_scale)
        if token is None or per_token_scale_dtype != E8M0:
            raise Refused("MX needs E8M0 bytes in per_token_scale")
        return [
            _mx_groups(
                rows, matrix, blocks, token, numbers, x_dtype, weight_dtype, typed(output_dtype, rows.dtype)
            )
        ]
    refuse(antiquant_scale is not None, "antiquant_scale without MX is not emulated")
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


def _mx_scale(
    rows: Tensor, weight_dtype: int | None, scale: list[Tensor] | None, scale_dtype: int | None, anti: list[Tensor] | None
) -> Tensor:  # fmt: skip
    """The scales of the weights [E, N, K/64, 2]: FP8 times FP4 has them in antiquant_scale, equal types in scale."""
    if rows.dtype == torch.float8_e4m3fn and weight_dtype == FP4:
        if anti is None or scale is not None:
            raise Refused("FP8 times FP4 has the weight's scales in antiquant_scale, and none in scale")
        want_contiguous(antiquant_scale=anti[0])
        return anti[0]
    if scale is None or scale_dtype != E8M0 or anti is not None:
        raise Refused("MX products of equal types have the weight's scales in scale, as E8M0")
    refuse(
        scale[0].stride(1) != 2, "the scale must be the transposed view of [E, N, K/64, 2], as the weight is"
    )
    return scale[0].transpose(1, 2)


def _mx_groups(
    rows: Tensor, matrix: Tensor, scale: Tensor, token: Tensor, numbers: list[int], x_dtype: int | None,
    weight_dtype: int | None, target: torch.dtype,
) -> Tensor:  # fmt: skip
    """x [M, K] with E8M0 bytes [M, K/64, 2]; weights [E, K, N] (FP4: [E, K/2, N] bytes), transposed views of [E, N, ..]."""
    refuse(matrix.stride(1) != 1, "weights must be transposed views of [E, N, ..]")
    a, b = mx_values(rows, x_dtype), mx_values(matrix.transpose(1, 2).contiguous(), weight_dtype)
    experts, n, k = b.shape
    refuse(
        a.shape[1] != k or k % 64 != 0,
        f"x is {list(a.shape)}, weights are {[experts, k, n]}, K in pairs of 32",
    )
    want_shape("per_token_scale", token, len(a), k // 64, 2)
    want_shape("scale", scale, experts, n, k // 64, 2)
    refuse(target not in HALF, f"MX output {target}, documented are bfloat16 and float16")
    a = a * mx_scales(token).repeat_interleave(32, -1)
    b = b * mx_scales(scale).repeat_interleave(32, -1)
    return torch.cat([p @ w.T for p, w in zip(torch.split(a, numbers), b, strict=True)]).to(target)


def gated(x: Tensor, mode: int, left: bool, limit: float, alpha: float, bias: float) -> Tensor:
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
    found, scales = int8_rows(gated(values, swiglu_mode, activate_left, clamp_limit, glu_alpha, glu_bias))
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
    y = gated(x.float(), 1 if interleaved else 2, True, limit, alpha, bias).to(x.dtype)
    if group_index is not None:
        want_dtype("group_index", group_index, torch.int64)
        y.flatten(0, -2)[int(group_index.sum()) :] = torch.nan
    return y
