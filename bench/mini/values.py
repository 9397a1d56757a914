"""The numbers of v4-mini: sums of random bytes, the same on every processor and in every version of a library."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.convert import unquantised
from v4sdk.tensors import TensorSpec, expected_tensors

# a sum of four bytes: mean and standard deviation
_MEAN, _DEVIATION = 510.0, math.sqrt(21845.0)


class DrawnTensors:
    """Draws any tensor of a configuration on demand, in the values that an unquantised checkpoint would hold.

    Float32 tensors are drawn on the BF16 grid too, so an engine that rounds everything to BF16 loses nothing.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._specs = {spec.name: spec for spec in expected_tensors(unquantised(config))}

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        if spec.dtypes[0] == "I64":
            return self._table(spec)
        base, gain = _level(spec)
        drawn = self._bytes(name, math.prod(spec.shape) * 4).view(-1, 4)
        total = drawn.sum(-1, dtype=torch.int16).float() - _MEAN
        return (total * (gain / _DEVIATION) + base).to(torch.bfloat16).float().view(spec.shape)

    def _bytes(self, name: str, count: int) -> Tensor:
        # raw output of the generator is guaranteed to stay as it is; what is derived from it by a library is not
        source = np.random.PCG64(np.random.SeedSequence([self._seed, zlib.crc32(name.encode())]))
        words = source.random_raw(-(-count // 8)).astype("<u8", copy=False)
        return torch.from_numpy(words.view(np.uint8)[:count])

    def _table(self, spec: TensorSpec) -> Tensor:
        """Distinct experts per token: the first columns of a sort by random keys."""
        experts = self._config.n_routed_experts
        keys = self._bytes(spec.name, spec.shape[0] * experts * 4).view(-1, 4).to(torch.int64)
        keys = (keys * torch.tensor([1 << 24, 1 << 16, 1 << 8, 1])).sum(-1).view(spec.shape[0], experts)
        return keys.argsort(dim=-1, stable=True)[:, : spec.shape[1]].contiguous()


def _level(spec: TensorSpec) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor: unit gain nearly everywhere, so that eight layers keep their scale."""
    name, fan_in = spec.name, math.sqrt(spec.shape[-1])
    if name.endswith("norm.weight"):
        return 1.0, 0.02
    if name.endswith("_scale"):
        return (1.0 if name == "hc_head_scale" else 0.7), 0.0
    for ending, gain in (("_base", 0.4), (".ape", 0.3), ("attn_sink", 0.5), ("gate.bias", 0.1)):
        if name.endswith(ending):
            return 0.0, gain
    if name == "embed.weight":
        return 0.0, 0.5
    # a spread of logits as in trained models, and an attention that is heard beside the residual
    return 0.0, (2.0 if name == "head.weight" or ".wo_" in name else 1.0) / fan_in
