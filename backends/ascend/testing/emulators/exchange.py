"""Expert parallelism: `npu_moe_distribute_dispatch_v2`, `.._combine_v2` and `npu_mega_moe`, over the processes' own group.

Several processes exchange over torch.distributed's default group (gloo here); one process is a group of its own, which no
document allows on a device but which shows the bookkeeping.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .documented import HALF, Refused, emulates, family, garbage, int8_rows, refuse, want_dtype, want_shape
from .grouped import gated

_INFO = 128


def _gather(x: Tensor, world: int) -> list[Tensor]:
    """The tensor of every rank, all of one shape."""
    if world == 1:
        return [x]
    refuse(
        not dist.is_initialized() or dist.get_world_size() != world,
        f"no group of {world} processes is running",
    )
    out = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(out, x.contiguous())
    return out


def _check_exchange(
    x: Tensor, expert_ids: Tensor, world: int, rank: int, experts: int, comm_alg: str, others: dict[str, Any]
) -> None:
    want_dtype("x", x, *HALF)
    want_dtype("expert_ids", expert_ids, torch.int32)
    refuse(
        x.dim() != 2 or expert_ids.shape[0] != x.shape[0],
        f"x {list(x.shape)}, expert_ids {list(expert_ids.shape)}",
    )
    refuse(not 0 <= rank < world, f"rank {rank} of {world}")
    refuse(experts % world != 0 or not 1 <= experts <= 1024, f"{experts} experts on {world} ranks")
    tokens, hidden, chosen = x.shape[0], x.shape[1], expert_ids.shape[1]
    refuse(not 0 < chosen <= 16, f"{chosen} choices per token, documented are 1 to 16")
    ids = expert_ids.sort(-1).values
    refuse(bool((ids[:, 1:] == ids[:, :-1]).any()), "an expert is chosen twice by one token")
    refuse(bool(((ids < 0) | (ids >= experts)).any()), "an expert number is out of range")
    if family() == "910B":
        refuse(comm_alg not in ("", "fullmesh"), f"comm_alg `{comm_alg}` is not emulated")
        refuse(
            hidden > 7168 or hidden % 32 != 0 or tokens > 256,
            f"{tokens} tokens of {hidden}; 256 of 7168 are the limit",
        )
    else:
        refuse(comm_alg not in ("", "fullmesh_v1", "fullmesh_v2"), f"comm_alg `{comm_alg}` is not emulated")
        refuse(
            not 1024 <= hidden <= 8192 or tokens > 512,
            f"{tokens} tokens of {hidden}; 512 of 1024 to 8192 are documented",
        )
    passed = sorted(name for name, value in others.items() if value not in (None, 0, ""))
    refuse(bool(passed), f"{', '.join(passed)} is passed, which is not emulated")


@emulates("npu", "npu_moe_distribute_dispatch_v2", chips=("910B", "910C"))
def npu_moe_distribute_dispatch_v2(
    x: Tensor, expert_ids: Tensor, group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, *,
    scales: Tensor | None = None, x_active_mask: Tensor | None = None, expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None, performance_info: Tensor | None = None, group_tp: str = "", tp_world_size: int = 0,
    tp_rank_id: int = 0, expert_shard_type: int = 0, shared_expert_num: int = 1, shared_expert_rank_num: int = 0,
    quant_mode: int = 0, global_bs: int = 0, expert_token_nums_type: int = 1, comm_alg: str = "", zero_expert_num: int = 0,
    copy_expert_num: int = 0, const_expert_num: int = 0, y_dtype: int | None = None, x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Send every token to the ranks of its experts; rows arrive by local expert, then source rank, then token.

    Shapes:
        x [T, H], expert_ids [T, K] int32 -> rows [A, H] (int8 in quant_mode 2), their scales [A], opaque [A * 128] int32,
        tokens per local expert [E] int64 (0: running sums), opaque counts, A = tokens of all ranks * min(E, K)
    """
    _check_exchange(
        x, expert_ids, ep_world_size, ep_rank_id, moe_expert_num, comm_alg,
        {"scales": scales, "x_active_mask": x_active_mask, "elastic_info": elastic_info, "performance_info": performance_info,
         "group_tp": group_tp, "expert_shard_type": expert_shard_type, "shared_expert_rank_num": shared_expert_rank_num,
         "zero_expert_num": zero_expert_num, "copy_expert_num": copy_expert_num, "const_expert_num": const_expert_num,
         "y_dtype": y_dtype, "x_dtype": x_dtype, "scales_dtype": scales_dtype},
    )  # fmt: skip
    refuse(quant_mode not in (0, 2), f"quant_mode {quant_mode}, documented are 0 and 2")
    refuse(not group_ep or len(group_ep) >= 128, "group_ep is the name of the group, 1 to 127 characters")
    refuse(global_bs not in (0, x.shape[0] * ep_world_size), f"global_bs is {global_bs}")
    local = moe_expert_num // ep_world_size
    tokens, ids = _gather(x, ep_world_size), _gather(expert_ids, ep_world_size)
    choices = expert_ids.shape[1]
    room = x.shape[0] * ep_world_size * min(local, choices)
    found, info, counts = [], [], []
    for e in range(ep_rank_id * local, (ep_rank_id + 1) * local):
        for rank in range(ep_world_size):
            token, choice = torch.nonzero(ids[rank] == e, as_tuple=True)
            found.append(tokens[rank][token])
            info.append(torch.stack((torch.full_like(token, rank), token, choice), -1))
            counts.append(len(token))
    rows, where = torch.cat(found), torch.cat(info)
    dynamic = torch.empty(0, dtype=torch.float32)
    if quant_mode == 2:
        rows, scale = int8_rows(rows.float())
        dynamic = garbage(room, dtype=torch.float32)
        dynamic[: len(scale)] = scale
    out = garbage(room, x.shape[1], dtype=rows.dtype)
    out[: len(rows)] = rows
    assist = garbage(max(room, 1) * _INFO, dtype=torch.int32)
    assist.view(-1, _INFO)[: len(where), :3] = where.to(torch.int32)
    per_expert = torch.tensor(counts).view(local, ep_world_size).sum(1)
    numbers = per_expert if expert_token_nums_type == 1 else per_expert.cumsum(0)
    received = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32)
    return (
        out,
        dynamic,
        assist,
        numbers,
        received,
        torch.zeros(tp_world_size, dtype=torch.int32),
        torch.empty(0),
    )


@emulates("npu", "npu_moe_distribute_combine_v2", chips=("910B", "910C"))
def npu_moe_distribute_combine_v2(
    expand_x: Tensor, expert_ids: Tensor, assist_info_for_combine: Tensor, ep_send_counts: Tensor, expert_scales: Tensor,
    group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, *, tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None, expand_scales: Tensor | None = None, shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None, ori_x: Tensor | None = None, const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None, const_expert_v: Tensor | None = None, performance_info: Tensor | None = None,
    group_tp: str = "", tp_world_size: int = 0, tp_rank_id: int = 0, expert_shard_type: int = 0, shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0, global_bs: int = 0, comm_quant_mode: int = 0, comm_alg: str = "",
    zero_expert_num: int = 0, copy_expert_num: int = 0, const_expert_num: int = 0,
) -> Tensor:  # fmt: skip
    """Send the experts' rows back, and sum those of a token weighted by `expert_scales`.

    Shapes:
        expand_x [A, H], expert_ids [T, K] int32, expert_scales [T, K] float32 -> [T, H] like expand_x
    """
    want_dtype("expand_x", expand_x, *HALF)
    want_dtype("expert_scales", expert_scales, torch.float32)
    want_shape("expert_scales", expert_scales, *expert_ids.shape)
    refuse(
        comm_quant_mode != 0 or shared_expert_rank_num != 0,
        "compressed exchange and shared experts are not emulated",
    )
    used = int(ep_send_counts[-1]) if len(ep_send_counts) else 0
    where = assist_info_for_combine.view(-1, _INFO)[:, :3].clone()
    where[used:] = -1
    rows = expand_x.clone()
    rows[used:] = 0
    out = torch.zeros(expert_ids.shape[0], expand_x.shape[1])
    for back, origin in zip(_gather(rows, ep_world_size), _gather(where, ep_world_size), strict=True):
        mine = origin[:, 0] == ep_rank_id
        token, choice = origin[mine, 1].long(), origin[mine, 2].long()
        out.index_add_(0, token, back[mine].float() * expert_scales[token, choice][:, None])
    return out.to(expand_x.dtype)


@emulates("cann_ops_transformer", "npu_mega_moe")
def npu_mega_moe(
    context: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weight1: list[Tensor], weight2: list[Tensor],
    moe_expert_num: int, ep_world_size: int, ccl_buffer_size: int, *, weight_scales1: list[Tensor] | None = None,
    weight_scales2: list[Tensor] | None = None, activation: str = "swiglu", activation_clamp: float | None = None,
    dispatch_quant_mode: int = 0, **rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dispatch, two products with a gated activation between, and the weighted sum, in bfloat16 (A16W16).

    `activation_clamp` bounds both halves on both sides.

    Shapes:
        x [T, H] bfloat16, topk_ids [T, K] int32, weight1 per local expert [H, 2I], weight2 [I, H]
        -> y [T, H] bfloat16, tokens per local expert int32
    """
    here = family()
    refuse(here == "950", "A16W16 is not supported on 950, and MX is not emulated")
    refuse(dispatch_quant_mode != 0 or weight_scales1 is not None, "quantised dispatch is not emulated")
    refuse(activation != "swiglu", f"activation is `{activation}`, documented is swiglu")
    passed = sorted(
        name
        for name, value in rest.items()
        if value not in (None, 0, "") and name != "num_max_tokens_per_rank"
    )
    refuse(bool(passed), f"{', '.join(passed)} is passed, which is not emulated")
    want_dtype("x", x, torch.bfloat16)
    want_dtype("topk_ids", topk_ids, torch.int32)
    refuse(ep_world_size not in (2, 4, 8, 16, 32), f"{ep_world_size} ranks, documented are 2, 4, 8, 16, 32")
    local = moe_expert_num // ep_world_size
    refuse(
        len(weight1) != local or len(weight2) != local, f"{len(weight1)} matrices for {local} local experts"
    )
    hidden, inner = x.shape[1], weight2[0].shape[0]
    refuse(hidden % 512 != 0 or not 1024 <= hidden <= 8192, f"hidden is {hidden}")
    refuse(inner % 512 != 0 or not 1024 <= inner <= 3072, f"intermediate is {inner}")
    if not dist.is_initialized():
        raise Refused("no group of processes is running")
    first = dist.get_rank() * local
    ids, tokens, weights = (_gather(t, ep_world_size) for t in (topk_ids, x, topk_weights.float()))
    total = torch.zeros(ep_world_size, *x.shape)
    counts = []
    for i in range(local):
        seen = 0
        for rank in range(ep_world_size):
            token, choice = torch.nonzero(ids[rank] == first + i, as_tuple=True)
            seen += len(token)
            h = tokens[rank][token].float() @ weight1[i].float()
            if activation_clamp is not None:
                h = h.clamp(-activation_clamp, activation_clamp)
            y = gated(h, 0, True, 1.0, 1.0, 0.0) @ weight2[i].float()
            total[rank].index_add_(0, token, y * weights[rank][token, choice][:, None])
        counts.append(seen)
    dist.all_reduce(total)
    return total[dist.get_rank()].to(x.dtype), torch.tensor(counts, dtype=torch.int32)
