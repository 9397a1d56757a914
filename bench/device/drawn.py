"""Weights of the released shapes and formats, drawn where they will lie: a hundred gigabytes do not pass through the host."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.ops.inputs import Geometry
from v4sdk.quant import ue8m0_ceil
from v4sdk.tensors import TensorSpec, expected_tensors
from v4sdk.weights import Weight

# codes of these formats have about this root mean square
_FP4_RMS, _FP8_RMS = 5.0, 100.0
# an FP8 matrix is drawn this many values at a time: its float32 form is four times as large
_DRAWN_AT_ONCE = 1 << 26


def random_on(device: torch.device, label: str) -> torch.Generator:
    """A generator of the device, deterministic in the label."""
    return torch.Generator(device).manual_seed(zlib.crc32(label.encode()))


def _scales(shape: tuple[int, ...], size: float, random: torch.Generator) -> Tensor:
    device = random.device
    base = ue8m0_ceil(torch.full((1,), size, device=device))
    return base + torch.randint(0, 2, shape, generator=random, device=device, dtype=torch.uint8)


def fp4(shape: tuple[int, ...], random: torch.Generator) -> Weight:
    """FP4 matrices of unit output variance for unit input; `shape` ends in rows and columns."""
    *lead, rows, cols = shape
    codes = torch.randint(
        0, 256, (*lead, rows, cols // 2), generator=random, device=random.device, dtype=torch.uint8
    )
    scale = _scales((*lead, rows, cols // 32), cols**-0.5 / _FP4_RMS, random)
    return Weight(codes.view(torch.int8), scale, "fp4", (1, 32), True)


def fp8_values(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal FP8 values that no scale has been applied to."""
    rows, cols = shape
    found = torch.empty(shape, dtype=torch.float8_e4m3fn, device=random.device)
    step = max(1, _DRAWN_AT_ONCE // cols)
    for at in range(0, rows, step):
        part = torch.randn(min(step, rows - at), cols, generator=random, device=random.device)
        found[at : at + step] = (part * _FP8_RMS).clamp(-448, 448).to(torch.float8_e4m3fn)
    return found


def experts(g: Geometry, random: torch.Generator) -> tuple[Weight, Weight, Weight]:
    """Stacks of one layer's routed experts: w1 [E, I, N], w2 [E, N, I], w3 [E, I, N]."""
    up, down = (g.experts, g.intermediate, g.hidden), (g.experts, g.hidden, g.intermediate)
    return fp4(up, random), fp4(down, random), fp4(up, random)


class DrawnTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each drawn when it is asked for and held by nobody here."""

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        self._specs = {spec.name: spec for spec in expected_tensors(config)}
        self._device, self._seed = device, seed

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        random = random_on(self._device, f"{name}-{self._seed}")
        stored = spec.dtypes[0]
        if name.endswith(".scale"):
            return self._scale(name, spec, random)
        if stored == "I8":
            rows, half = spec.shape
            return fp4((rows, 2 * half), random).data
        if stored == "F8_E4M3":
            return fp8_values((spec.shape[0], spec.shape[1]), random)
        if stored == "I64":
            return self._hash_table(spec, random)
        return self._float(name, spec, random)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _scale(self, name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
        of = self._specs[name.removesuffix(".scale") + ".weight"]
        packed = of.dtypes[0] == "I8"
        cols = of.shape[1] * (2 if packed else 1)
        return _scales(spec.shape, cols**-0.5 / (_FP4_RMS if packed else _FP8_RMS), random)

    def _hash_table(self, spec: TensorSpec, random: torch.Generator) -> Tensor:
        tokens, chosen = spec.shape
        experts = next(s.shape[0] for n, s in self._specs.items() if n.endswith("ffn.gate.weight"))
        first = torch.randint(0, experts, (tokens, 1), generator=random, device=self._device)
        return (first + torch.arange(chosen, device=self._device)) % experts

    def _float(self, name: str, spec: TensorSpec, random: torch.Generator) -> Tensor:
        dtype = torch.bfloat16 if spec.dtypes[0] == "BF16" else torch.float32
        drawn = torch.randn(spec.shape, generator=random, device=self._device)
        if name.endswith("norm.weight"):
            return (1 + 0.1 * drawn).to(dtype)
        # unit gain; what has one dimension is a bias or a sink
        return (
            drawn * (spec.shape[-1] ** -0.5 if len(spec.shape) > 1 and name != "embed.weight" else 0.1)
        ).to(dtype)
