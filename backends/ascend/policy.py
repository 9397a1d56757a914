"""Which dtypes each family of chips runs on, as data: matrices by name, cache rows; and what int4 products need.

910B and 910C multiply BF16 and integers only, so FP8 and FP4 checkpoints are converted for them. 950 takes them as released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.encodings import Encoding, IntegerLayout
from v4sdk.errors import ShapeError
from v4sdk.numerics import KVFormat
from v4sdk.quant import int4_unpack, split_last
from v4sdk.weights import Weight

from .chip import FAMILIES, Family

_ATTENTION = ("*.attn.wq_b", "*.attn.wo_b", "*.attn.indexer.wq_b")
_SHARED, _ROUTED = "*.ffn.shared_experts.*", "*.ffn.experts.*"
# activations of these matrices are rounded to int8 token by token; all others are BF16 products
W8A8 = IntegerLayout("ascend-w8a8", int8=(*_ATTENTION, _SHARED, _ROUTED))
W4A8 = IntegerLayout("ascend-w4a8", int8=(*_ATTENTION, _SHARED), int4=(_ROUTED,))
LAYOUTS: Mapping[str, IntegerLayout] = {layout.name: layout for layout in (W8A8, W4A8)}


@dataclass(frozen=True)
class Policy:
    """What a family runs on.

    Attributes:
        encodings: of matrices that its products read; a checkpoint with others is refused, with `layouts` as the way out.
        layouts: names for `v4sdk convert --for`, the default first; empty where the released checkpoint is read as it is.
        kv_format: of cache rows.
        activations: what the input of a quantised matrix is rounded to, for each token.
    """

    encodings: frozenset[Encoding]
    layouts: tuple[str, ...]
    kv_format: KVFormat
    activations: Literal["int8", "fp8"]


_INTEGER = Policy(frozenset(("float", "int8", "int4")), (W8A8.name, W4A8.name), "bf16", "int8")
_NATIVE = Policy(frozenset(("float", "fp8", "fp4")), (), "native", "fp8")
POLICIES: Mapping[Family, Policy] = {"910B": _INTEGER, "910C": _INTEGER, "950": _NATIVE}


def stored_as(config: ModelConfig) -> frozenset[Encoding]:
    """The encodings that matrices of a checkpoint have."""
    if config.integers is not None:
        wanted = {"int8": config.integers.int8, "int4": config.integers.int4}
        return frozenset(("float", *(encoding for encoding, names in wanted.items() if names)))  # type: ignore[arg-type]
    dense: Encoding = "fp8" if config.quantization else "float"
    experts: Encoding = (
        "fp4" if config.expert_dtype == "fp4" else "fp8" if config.expert_dtype == "fp8" else "float"
    )
    return frozenset((dense, experts))


def refusal(config: ModelConfig, family: Family) -> tuple[str, str] | None:
    """Why a family cannot run a checkpoint's matrices, and the way out; None if it can."""
    policy = POLICIES[family]
    strange = sorted(stored_as(config) - policy.encodings)
    if not strange:
        return None
    reason = f"the checkpoint has {' and '.join(strange)} matrices, and {family} has no products of them"
    if policy.layouts:
        return reason, f"v4sdk convert SOURCE TARGET --for {policy.layouts[0]}, then --model TARGET"
    able = " or ".join(name for name in FAMILIES if stored_as(config) <= POLICIES[name].encodings)
    return reason, f"run the checkpoint as released; a converted one is for {able}"


def offline_bias(weight: Weight) -> Tensor:
    """What is added to an int4 matrix's product with int8 inputs: 8 times the sum of each row's values.

    The product takes an int8 input a as two int4 halves, a = 16 h + (l - 8) + 8 with h = floor(a / 16) and l = a mod 16: the
    low half is shifted by 8 to be signed. What the shift takes away, 8 * sum over the row, depends on the weight alone.

    No provider calls it: int4 experts run the reference. It is kept, with its test, for the adapter of that product.

    Shapes:
        weight [.., out, in] int4 -> [.., out] float32
    Raises:
        ShapeError: if the weight is not int4.
    Source:
        the vendor's int8 x int4 grouped product, which takes the sum as its bias
    """
    if weight.encoding != "int4" or weight.scale is None:
        raise ShapeError(f"the offline bias is of int4 matrices, got {weight.encoding}")
    # numbers first: their sums are whole, and only the scale rounds
    sums = split_last(int4_unpack(weight.data), weight.block[1]).sum(-1)
    return 8.0 * (sums * weight.scale).sum(-1)


def int8_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split int8 numbers into the signed int4 halves of that product: x = 16 * high + low + 8.

    The product does this itself; here it is what `offline_bias` is proven against.

    Shapes:
        x [...] int8 -> high, low [...] int8, both -8..7
    """
    wide = x.to(torch.int16)
    high = torch.div(wide, 16, rounding_mode="floor")
    return high.to(torch.int8), (wide - 16 * high - 8).to(torch.int8)
