"""Known changes to a model, harmless and wrong ones, to see what the metrics and verdicts say about each.

A rounding changes values as another precision would, and only where numerics round at all. A mistake is one of those that
implementations of V4 have really made, in one layer where it can be in one. Each is planted through the public seams: the
configuration, the tensors, the table of ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk import ops as o
from v4sdk.config import ModelConfig
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import Numerics
from v4sdk.ops.linear import gemm_input
from v4sdk.ops.op import OpTable
from v4sdk.weights import ExpertWeights, Weight, WeightSource

Functions = dict[str, Callable[..., Any]]


def _same_config(config: ModelConfig) -> ModelConfig:
    return config


def _same_tensor(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _same_values(values: Tensor) -> Tensor:
    return values


def _no_functions(model: V4Model) -> Functions:
    return {}


@dataclass(frozen=True)
class Plant:
    """One change.

    Attributes:
        name: as in keys. what: in words. wrong: a mistake; else a rounding. quick: also in quick runs.
        config: another configuration over the same weights. tensor: by name, another plain tensor. values: other values of
            every matrix. functions: ops that are replaced, given the bound model.
    """

    name: str
    what: str
    wrong: bool
    quick: bool = False
    config: Callable[[ModelConfig], ModelConfig] = _same_config
    tensor: Callable[[str, Tensor], Tensor] = _same_tensor
    values: Callable[[Tensor], Tensor] = _same_values
    functions: Callable[[V4Model], Functions] = _no_functions

    @property
    def touches_weights(self) -> bool:
        """It rounds what the checkpoint holds, so only a run that rounds can have it."""
        return not self.wrong and (self.values is not _same_values or self.tensor is not _same_tensor)


class _PlantingBinder(Binder):
    """Binds weights widened to float32, changed on the way."""

    def __init__(self, config: ModelConfig, source: WeightSource, plant: Plant) -> None:
        def matrix(role: str, weight: Weight) -> Weight:
            return Weight(plant.values(weight.dequantize()), quantised=weight.quantised)

        def experts(role: str, held: ExpertWeights) -> ExpertWeights:
            w1, w2, w3 = (tuple(matrix(role, w) for w in ws) for ws in (held.w1, held.w2, held.w3))
            return ExpertWeights(w1, w2, w3)

        super().__init__(plant.config(config), source, matrix, experts)
        self._plant = plant

    def tensor(self, name: str) -> Tensor:
        """A plain tensor, changed."""
        return self._plant.tensor(name, super().tensor(name))


def planted(config: ModelConfig, source: WeightSource, numerics: Numerics, plant: Plant) -> V4Model:
    """Bind a small model with one change in it."""
    table = OpTable({})
    with torch.inference_mode():
        model = V4Model(_PlantingBinder(config, source, plant), numerics, table)
    for name, function in plant.functions(model).items():
        table.set(name, function)
    return model


def reordered_linear(x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype) -> Tensor:
    """`linear`, each sum in two halves of which the second comes first, in slabs of another length than torch's own."""
    operand, matrix = gemm_input(x, weight, numerics), weight.dequantize()
    y = torch.zeros(x.shape[0], matrix.shape[0], dtype=operand.dtype)
    for at in reversed(range(0, operand.shape[1], 48)):
        y = y + operand[:, at : at + 48] @ matrix[:, at : at + 48].to(operand.dtype).T
    return y.to(dtype)


def with_parts(**parts: Callable[..., Any]) -> Functions:
    """Replaced ops, and the fused ones made of them."""
    table = OpTable(parts)
    fused = {op.name: op.build(table) for op in o.OPS.values() if any(p.name in parts for p in op.parts)}
    return {**fused, **parts}


def _per_row_fp8(values: Tensor) -> Tensor:
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def _blocks_of_32(levels: int) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        blocks = values.reshape(-1, 32)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
        return ((blocks / scale).round() * scale).reshape(values.shape)

    return rounded


def _bf16(name: str, tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float() if tensor.is_floating_point() else tensor


def _without_sink(layer: int) -> Callable[[str, Tensor], Tensor]:
    # exp(sink - top) is 0: nothing is added to the denominator
    def tensor(name: str, value: Tensor) -> Tensor:
        return torch.full_like(value, -1e30) if name == f"layers.{layer}.attn.attn_sink" else value

    return tensor


def _without_norm_in_front_of_ffn(layer: int) -> Callable[[V4Model], Functions]:
    def functions(model: V4Model) -> Functions:
        target = model.blocks[layer].hc_ffn.norm
        bare = o.hc_post_pre.build(
            OpTable({"rms_norm": lambda x, weight, eps, dtype: (x.float() * weight).to(dtype)})
        )

        def hc_post_pre(y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
                        norm_weight: Tensor, *rest: Any) -> Any:  # fmt: skip
            run = bare if norm_weight is target else o.hc_post_pre
            return run(y, x, post, comb, fn, base, scale, norm_weight, *rest)

        return {"hc_post_pre": hc_post_pre}

    return functions


def _in_layer(
    layer: int, op: str, weight: Callable[[V4Model, int], Any], wrong: Callable[..., Any]
) -> Callable[[V4Model], Functions]:
    """Replace an op in one layer, which is known by a weight that is among the arguments."""

    def functions(model: V4Model) -> Functions:
        mark, right = weight(model, layer), o.OPS[op]

        def chosen(*args: Any) -> Any:
            return wrong(*args) if any(a is mark for a in args) else right(*args)

        return {op: chosen}

    return functions


def _query_one_late(u: Tensor, wq_a: Weight, q_norm: Tensor, wq_b: Weight, table: Tensor, *rest: Any) -> Any:
    return o.q_project(u, wq_a, q_norm, wq_b, torch.cat([table[1:], table[-1:]]), *rest)


def _no_inverse_rope(out: Tensor, wo_a: Weight, wo_b: Weight, table: Tensor, *rest: Any) -> Any:
    half = table.shape[-1] // 2
    still = torch.cat([torch.ones_like(table[:, :half]), torch.zeros_like(table[:, half:])], -1)
    return o.grouped_out(out, wo_a, wo_b, still, *rest)


def _swapped(u: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, *rest: Any) -> Any:
    def swap(ws: tuple[Weight, ...]) -> tuple[Weight, ...]:
        return (ws[1], ws[0], *ws[2:])

    turned = ExpertWeights(swap(experts.w1), swap(experts.w2), swap(experts.w3))
    return o.routed_experts(u, ids, weights, turned, *rest)


def _most_recent(model: V4Model) -> Functions:
    def index_topk(
        q: Tensor, w: Tensor, keys: Tensor, batch: Any, topk: int, ratio: int, n: Numerics
    ) -> Tensor:
        visible = (batch.positions.long()[:, None] + 1) // ratio
        picks = (visible - topk).clamp_min(0) + torch.arange(topk)
        return torch.where(picks < visible, picks, -1).to(torch.int32)

    return {"index_topk": index_topk}


def _mixing(change: Callable[..., Any]) -> Callable[[V4Model], Functions]:
    def hc_pre(*args: Any) -> Any:
        return change(*o.hc_pre(*args))

    return lambda model: with_parts(hc_pre=hc_pre)


def _ffn_norm_weight(layer: int) -> Callable[[str, Tensor], Tensor]:
    return lambda name, t: torch.ones_like(t) if name == f"layers.{layer}.ffn_norm.weight" else t


def _late_query(layer: int) -> Callable[[V4Model], Functions]:
    return _in_layer(layer, "q_project", lambda m, i: m.blocks[i].attn.wq_a, _query_one_late)


ROUNDINGS = (
    Plant("same", "the same weights and equations again", False, True),
    Plant("order", "every product summed in another order", False, True, functions=lambda m: with_parts(linear=reordered_linear)),
    Plant("bf16-weights", "every tensor rounded to BF16", False, True, tensor=_bf16, values=lambda v: v.bfloat16().float()),
    Plant("fp8-weights", "every matrix rounded to FP8 again, one scale a row", False, True, values=_per_row_fp8),
    Plant("int8-weights", "every matrix rounded to 8-bit integers in blocks of 32", False, values=_blocks_of_32(127)),
)  # fmt: skip

MISTAKES = (
    Plant("rope-base", "layers without a compressor rotate with base 160,000 in place of 10,000", True, True,
          config=lambda c: replace(c, rope_theta=c.compress_rope_theta)),
    Plant("compress-rope-base", "layers with a compressor rotate with base 10,000 in place of 160,000", True,
          config=lambda c: replace(c, compress_rope_theta=c.rope_theta)),
    Plant("no-yarn", "positions of layers with a compressor are not stretched", True,
          config=lambda c: replace(c, rope_factor=1.0)),
    Plant("no-norm", "layer 1 skips the norm in front of its experts", True, True, functions=_without_norm_in_front_of_ffn(1)),
    Plant("no-norm-weight", "layer 1 leaves out the weight of that norm", True, tensor=_ffn_norm_weight(1)),
    Plant("no-sink", "layer 1 has no attention sinks", True, True, tensor=_without_sink(1)),
    Plant("no-sink-last", "layer 3 has no attention sinks", True, tensor=_without_sink(3)),
    Plant("swapped-experts", "layer 0 calls expert 0 where 1 is meant and the reverse", True, True,
          functions=_in_layer(0, "routed_experts", lambda m, i: m.blocks[i].ffn.experts, _swapped)),
    Plant("swapped-experts-last", "the same in layer 3", True,
          functions=_in_layer(3, "routed_experts", lambda m, i: m.blocks[i].ffn.experts, _swapped)),
    Plant("recent-picks", "the most recent entries in place of the indexer's picks", True, True, functions=_most_recent),
    Plant("query-late", "layer 1 rotates its queries as if they stood one position later", True, True, functions=_late_query(1)),
    Plant("no-inverse-rope", "layer 1 does not rotate its output back", True,
          functions=_in_layer(1, "grouped_out", lambda m, i: m.blocks[i].attn.wo_a, _no_inverse_rope)),
    Plant("window-short", "the window is one token short", True, True,
          config=lambda c: replace(c, sliding_window=c.sliding_window - 1)),
    Plant("half-top-k", "half as many entries are picked", True, config=lambda c: replace(c, index_topk=c.index_topk // 2)),
    Plant("one-expert", "each token goes to one expert fewer", True,
          config=lambda c: replace(c, num_experts_per_tok=c.num_experts_per_tok - 1)),
    Plant("no-routed-scaling", "routing weights are not scaled", True, config=lambda c: replace(c, routed_scaling_factor=1.0)),
    Plant("one-sinkhorn-step", "stream mixing is normalised once", True, config=lambda c: replace(c, hc_sinkhorn_iters=1)),
    Plant("half-post", "what a sub-layer writes back is not doubled", True,
          functions=_mixing(lambda u, post, comb: (u, post / 2, comb))),
    Plant("mixing-transposed", "stream mixing sums over the other index", True,
          functions=_mixing(lambda u, post, comb: (u, post, comb.transpose(1, 2).contiguous()))),
    Plant("no-shared-expert", "layer 0 leaves out its shared expert", True,
          functions=_in_layer(0, "shared_expert", lambda m, i: m.blocks[i].ffn.shared[0],
                              lambda u, routed, *rest: routed.to(u.dtype))),
)  # fmt: skip
