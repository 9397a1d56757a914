"""Products of a prompt with FP8 weights by DeepGEMM, whose kernels are for compute capability 9.0 and 10.0.

It multiplies FP8 by FP8, so it may only serve numerics that round the input of a GEMM anyway. Decode steps, other
weights and outputs, and sizes that are no whole tiles stay with our kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from v4sdk.numerics import Numerics
from v4sdk.quant import q8_encode, ue8m0_value
from v4sdk.weights import Weight

from ..launch import deliver, result
from ..operands import GROUP, rounds_input
from ..tiles import shape_of

MODULE, DISTRIBUTION = "deep_gemm", "sgl-deep-gemm"
# later versions are built against later versions of torch
INSTALL = "sgl-deep-gemm==0.1.5"
CHIPS = frozenset({90, 100})
# of weights, one scale each
_TILE = (GROUP, GROUP)


class DeepGemm:
    """The op `linear`: DeepGEMM for what it takes, ours for the rest.

    Raises:
        ImportError, OSError, AttributeError: where the library cannot be loaded; the caller keeps ours.
    """

    def __init__(self, ours: Callable[..., Tensor]) -> None:
        self._ours = ours
        self._product = importlib.import_module(MODULE).fp8_gemm_nt

    def linear(
        self, x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """See `v4sdk.ops.linear`.

        Source:
            DeepGEMM, README, csrc/apis/gemm.hpp and layout.hpp: d = a @ b.T; scales of a [T, in / 128] and of b
            [out / 128, in / 128], both float32; for 10.0 the library itself packs them as exponents
        """
        if weight.scale is None or not takes(x, weight, numerics, dtype):
            return self._ours(x, weight, numerics, dtype, out=out)
        y = result(out, (x.shape[0], weight.out_features), dtype, x.device)
        q, scale = q8_encode(x, GROUP)
        stored = weight.data.view(torch.float8_e4m3fn), ue8m0_value(weight.scale.view(torch.uint8))
        self._product((q, ue8m0_value(scale)), stored, y)
        return deliver(out, y)


def takes(x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype) -> bool:
    """Whether the library has a kernel for a call; from shapes and dtypes alone."""
    if weight.encoding != "fp8" or weight.block != _TILE or not rounds_input(weight, numerics):
        return False
    # float32 scales need not be powers of two, which 10.0 would round them to
    if weight.scale is None or weight.scale.dtype == torch.float32 or dtype != torch.bfloat16:
        return False
    whole = x.shape[1] % GROUP == 0 and weight.out_features % GROUP == 0
    return whole and shape_of(x.shape[0]) == "prefill"
