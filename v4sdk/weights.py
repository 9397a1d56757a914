"""Weights as the ops see them: bytes as stored, their scales, and how to read both as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4sdk.encodings import Encoding as Encoding
from v4sdk.errors import ShapeError
from v4sdk.quant import fp4_unpack, int4_unpack, split_last, ue8m0_value

INTEGERS: frozenset[Encoding] = frozenset(("int8", "int4"))
_PACKED: frozenset[Encoding] = frozenset(("fp4", "int4"))
# no op holds more than this of de-quantised weight at a time
DEQUANT_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Weight:
    """One matrix [out, in] (or a stack [E, out, in]) as stored.

    Attributes:
        data: float matrix, FP8 E4M3 bytes, int8 numbers, or packed FP4 or int4 [.., out, in / 2] int8 with the even column in
            the low nibble (int4 in two's complement).
        scale: one value per tile: UE8M0 (uint8 or float8_e8m0fnu) or float32 [.., ceil(out / b0), ceil(in / b1)]; None for float.
            Integers have float32 scales, one per row (b1 is then `in`) or per group of a row.
        encoding: how to read `data`.
        block: tile height and width (b0, b1) of one scale.
        quantised: the checkpoint stores this matrix in FP8 or FP4, so GEMM inputs are rounded in reference numerics,
            even where a backend has replaced `data` by a float copy. False for integers: a device whose products are integer
            ones rounds their inputs to int8 itself, by `encoding`.
    """

    data: Tensor
    scale: Tensor | None = None
    encoding: Encoding = "float"
    block: tuple[int, int] = (1, 1)
    quantised: bool = False

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.data.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns after unpacking."""
        return self.data.shape[-1] * (2 if self.encoding in _PACKED else 1)

    @property
    def nbytes(self) -> int:
        """Bytes at stored width, scales included."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Read rows first..last as float32 [.., rows, in]; exact, since scales are powers of two (or float32).

        Scales of integers that `weight_formats` makes are short enough for that too. Any row range is served; a range that
        starts inside a tile uses that tile's scale.
        """
        data = self.data[..., first:last, :]
        if self.encoding == "float" or self.scale is None:
            return data.float()
        b0, b1 = self.block
        rows = data.shape[-2]
        scale = self.scale[..., first // b0 : -(-(first + rows) // b0), :]
        factor = _scale_value(scale)
        if b0 > 1:
            factor = factor.repeat_interleave(b0, -2)[..., first % b0 :, :][..., :rows, :]
        values = _values(data, self.encoding)
        cols = values.shape[-1]
        # in place: the values are fresh, and a second copy of a large matrix costs as much as reading it
        if cols % b1 == 0:
            return split_last(values, b1).mul_(factor[..., None]).flatten(-2)
        return values.mul_(factor.repeat_interleave(b1, -1)[..., :cols])

    def to(self, device: torch.device) -> Weight:
        """The same weight on another device; itself where it already lies there."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def row_blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (first, last) ranges within rows first..last whose float32 copies stay under `DEQUANT_LIMIT_BYTES`."""
        # a stack reads the same rows of each of its matrices
        step = max(1, DEQUANT_LIMIT_BYTES // (4 * max(1, self.in_features * self.data.shape[:-2].numel())))
        step = max(self.block[0], step // self.block[0] * self.block[0])
        end = self.out_features if last is None else last
        for at in range(first, end, step):
            yield at, min(at + step, end)


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer: gate (w1), down (w2) and up (w3) matrices.

    Attributes:
        w1, w3: per expert [I, N]; w2: per expert [N, I]; as mapped from the checkpoint. Empty where only `packed` exists.
        packed: optional stacks ([E, I, N], [E, N, I], [E, I, N]) made by a backend; needed to choose experts on the device.
    """

    w1: tuple[Weight, ...] = ()
    w2: tuple[Weight, ...] = ()
    w3: tuple[Weight, ...] = ()
    packed: tuple[Weight, Weight, Weight] | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.w1) if self.w1 else self.packed[0].data.shape[0] if self.packed else 0

    def to(self, device: torch.device) -> ExpertWeights:
        """The same experts on another device."""
        w1, w2, w3 = (tuple(w.to(device) for w in ws) for ws in (self.w1, self.w2, self.w3))
        packed = None
        if self.packed is not None:
            p1, p2, p3 = (w.to(device) for w in self.packed)
            packed = (p1, p2, p3)
        return ExpertWeights(w1, w2, w3, packed)

    def expert(self, index: int) -> tuple[Weight, Weight, Weight]:
        """The (w1, w2, w3) of one expert."""
        if self.w1:
            return self.w1[index], self.w2[index], self.w3[index]
        if self.packed is None:
            raise ShapeError("expert weights are empty, expected per-expert matrices or a packed stack")
        w1, w2, w3 = (pick(w, torch.tensor(index)) for w in self.packed)
        return w1, w2, w3


def pick(stack: Weight, index: Tensor) -> Weight:
    """Take matrices `index` out of a stack, without reading `index` on the host."""
    scale = None if stack.scale is None else _bytes(stack.scale)[index]
    return Weight(_movable(stack)[index], scale, stack.encoding, stack.block, stack.quantised)


def stack(weights: tuple[Weight, ...]) -> Weight:
    """Stack equal matrices into one `Weight` with a leading expert dimension."""
    one = weights[0]
    data = torch.stack([_movable(w) for w in weights])
    scales = [_bytes(w.scale) for w in weights if w.scale is not None]
    return Weight(data, torch.stack(scales) if scales else None, one.encoding, one.block, one.quantised)


def _bytes(x: Tensor) -> Tensor:
    # reinterpret, never convert: a value cast would turn 2**-7 into 0
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _movable(weight: Weight) -> Tensor:
    # integers can be indexed and stacked as they are, on every device
    return _bytes(weight.data) if weight.encoding in ("fp8", "fp4") else weight.data


def _values(data: Tensor, encoding: Encoding) -> Tensor:
    """Stored numbers without their scales, as a float32 tensor of its own."""
    if encoding == "fp4":
        return fp4_unpack(data)
    if encoding == "int4":
        return int4_unpack(data)
    return data.view(torch.int8 if encoding == "int8" else torch.float8_e4m3fn).float()


def _scale_value(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else ue8m0_value(scale.view(torch.uint8))


def _packed_or_integers(data: Tensor, scale: Tensor) -> Weight:
    """Tell FP4 (int8 bytes, UE8M0 scales), int8 (int8, float32 scales) and int4 (uint8 bytes, float32 scales) of files apart."""
    if scale.dtype != torch.float32:
        return Weight(data, scale, "fp4", (1, 32), True)
    encoding: Encoding = "int4" if data.dtype == torch.uint8 else "int8"
    weight = Weight(data.view(torch.int8), scale, encoding)
    return replace(weight, block=(1, max(1, weight.in_features // scale.shape[-1])))


class WeightSource:
    """Named tensors of a checkpoint, or Parameters in training, read as `Weight`s.

    Args:
        tensors: full tensor names (`layers.0.attn.wq_a.weight`, ...) to tensors, possibly memory-mapped.
        fp8_block: tile of FP8 matrices, from `quantization_config.weight_block_size`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], fp8_block: tuple[int, int] = (128, 128)) -> None:
        self._tensors = tensors
        self._fp8_block = fp8_block

    def tensor(self, name: str) -> Tensor:
        """One plain tensor by its full name."""
        return self._tensors[name]

    def weight(self, name: str) -> Weight:
        """The matrix `name.weight` with its `name.scale`, if the checkpoint quantises it."""
        data = self._tensors[f"{name}.weight"]
        if data.dtype in (torch.int8, torch.uint8):
            return _packed_or_integers(data, self._tensors[f"{name}.scale"])
        if data.dtype == torch.float8_e4m3fn:
            return Weight(data, self._tensors[f"{name}.scale"], "fp8", self._fp8_block, True)
        return Weight(data)

    def experts(self, prefix: str, count: int) -> ExpertWeights:
        """Routed experts `prefix.experts.{e}.w1|w2|w3`."""
        w1, w2, w3 = (
            tuple(self.weight(f"{prefix}.experts.{e}.{w}") for e in range(count)) for w in ("w1", "w2", "w3")
        )
        return ExpertWeights(w1, w2, w3)
