"""Write a model in the released layout: quantised as its configuration says, one layer per shard, with an index.

Nothing larger than one tensor is held in memory, so the size of a checkpoint is bounded by the disk alone.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.config_file import config_dict
from v4sdk.encodings import QuantizationConfig
from v4sdk.errors import CheckpointError
from v4sdk.headers import INDEX_NAME, SINGLE_NAME
from v4sdk.quant import ue8m0_value
from v4sdk.tensors import ITEM_BYTES, TensorSpec, expected_tensors
from v4sdk.weight_formats import (
    FP4_GROUP,
    TORCH_DTYPES,
    pack_fp4,
    pack_fp8,
    pack_int4,
    pack_int8,
    round_fp4,
    round_fp8,
    round_int4,
    round_int8,
)
from v4sdk.weights import Weight, WeightSource

FloatDtype = Literal["BF16", "F32"]
# told of a matrix that is not stored as it was given: what it is, its values, the values stored
OnRounded = Callable[[TensorSpec, Tensor, Tensor], None]


class Tensors(Protocol):
    """What the writer reads: a mapping by full name, in memory or made on demand."""

    def __getitem__(self, name: str, /) -> Tensor: ...

    def __contains__(self, name: object, /) -> bool: ...


def released(config: ModelConfig) -> ModelConfig:
    """Give `config` with the released encodings: FP8 128x128 projections, FP4 experts, UE8M0 scales."""
    return replace(config, quantization=QuantizationConfig(), expert_dtype="fp4", integers=None)


def unquantised(config: ModelConfig) -> ModelConfig:
    """Give `config` for a folder without any quantised tensor."""
    return replace(config, quantization=None, expert_dtype=None, integers=None)


def round_weights(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round every tensor to the values `write_checkpoint` would store, gradients straight through.

    Training uses this so that it sees the weights of the shipped file; tensors that are not in `config`'s list
    are left out.
    """
    rounded = {}
    for spec in expected_tensors(config):
        if spec.name not in tensors:
            continue
        x = tensors[spec.name]
        if spec.encoding == "fp8":
            x = round_fp8(x, config.quantization.block) if config.quantization else round_fp8(x)
        elif spec.encoding == "fp4":
            x = round_fp4(x)
        elif spec.encoding == "int8":
            x = round_int8(x)
        elif spec.encoding == "int4" and config.integers:
            x = round_int4(x, config.integers.int4_group)
        rounded[spec.name] = x
    return rounded


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    float_dtype: FloatDtype | None = None,
    sharded: bool = True,
    extra_config: Mapping[str, Any] | None = None,
    on_shard: Callable[[str, int], None] | None = None,
    on_rounded: OnRounded | None = None,
) -> int:
    """Write `config.json`, the shards and the index; give the payload bytes.

    Float matrices are packed as `config.quantization`, `config.integers` and `config.expert_dtype` say; tensors that already
    have the stored dtype are copied byte for byte with their `.scale`. Files appear under their names only when all of
    them are complete, `config.json` last. MTP blocks of which `tensors` holds nothing are left out.

    Args:
        tensors: by full name (`layers.0.attn.wq_a.weight`, ...).
        float_dtype: store every float tensor of an unquantised folder so; else BF16 or F32 as released.
        sharded: one layer per file and an index; else one `model.safetensors`.
        extra_config: further fields of `config.json`.
        on_shard: called with (file name, its payload bytes) after each file.
        on_rounded: called with each matrix that is packed, or narrowed to BF16: (what it is, given values, stored values).

    Raises:
        CheckpointError: if a tensor is missing, has the wrong shape, or is not finite.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    specs = [_with_dtype(spec, float_dtype) for spec in _present(config, tensors)]
    encoder = _Encoder(config, specs, tensors, on_rounded)
    shards = _files(specs, sharded)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=target))
    try:
        for name, members in shards.items():
            _write_shard(staging / name, members, encoder)
            if on_shard:
                on_shard(name, sum(spec.nbytes for spec in members))
        total = sum(spec.nbytes for spec in specs)
        if sharded:
            where = {spec.name: name for name, members in shards.items() for spec in members}
            _write_json(staging / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": where})
        present_mtp = len({spec.block for spec in specs} - {"backbone"})
        raw = config_dict(config, num_mtp=present_mtp) | dict(extra_config or {})
        _write_json(staging / "config.json", raw)
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return total


class FloatTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint with every quantised matrix read as float32; scales disappear.

    Writing this with `unquantised(config)` gives a float folder of the same values.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        block = config.quantization.block if config.quantization else (128, 128)
        self._source = WeightSource(tensors, block)

    def __getitem__(self, name: str) -> Tensor:
        x = self._tensors[name]
        if x.dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
            return self._source.weight(name.removesuffix(".weight")).dequantize()
        return x

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if not name.endswith(".scale"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and not name.endswith(".scale") and name in self._tensors


class _Encoder:
    """Turns source tensors into stored ones; remembers the last matrix because its scale is asked for next."""

    def __init__(
        self, config: ModelConfig, specs: list[TensorSpec], tensors: Tensors, on_rounded: OnRounded | None
    ) -> None:
        self._tile = config.quantization.block if config.quantization else (128, 128)
        self._group = config.integers.int4_group if config.integers else 0
        self._specs = {spec.name: spec for spec in specs}
        self._tensors = tensors
        self._told = on_rounded
        self._last: tuple[str, Weight] | None = None

    def stored(self, spec: TensorSpec) -> Tensor:
        """Give the tensor in `spec`'s dtype and shape."""
        name, want = spec.name, TORCH_DTYPES[spec.dtypes[0]]
        if name.endswith(".scale") and name not in self._tensors:
            scale = self._packed(f"{name.removesuffix('.scale')}.weight").scale
            assert scale is not None
            wide = want == torch.float32 and scale.dtype != want
            return _checked(spec, ue8m0_value(scale.view(torch.uint8)) if wide else scale)
        x = self._tensors[name].detach()
        if x.is_floating_point() and x.dtype.itemsize > 1 and x.dtype != want:
            x = self._narrowed(spec, x) if spec.encoding == "float" else self._packed(name, x).data.view(want)
        if want in (torch.bfloat16, torch.float32):
            _check_finite(name, x)
        return _checked(spec, x)

    def _narrowed(self, spec: TensorSpec, x: Tensor) -> Tensor:
        stored = x.to(TORCH_DTYPES[spec.dtypes[0]])
        if self._told and spec.dtypes[0] == "BF16":
            self._told(spec, x, stored)
        return stored

    def _packed(self, name: str, x: Tensor | None = None) -> Weight:
        if self._last is None or self._last[0] != name:
            x = self._tensors[name].detach() if x is None else x
            _check_finite(name, x)
            spec = self._specs[name]
            weight = _pack(x, spec, self._tile, self._group)
            if self._told:
                self._told(spec, x, weight.dequantize())
            self._last = (name, weight)
        return self._last[1]


def _pack(x: Tensor, spec: TensorSpec, tile: tuple[int, int], group: int) -> Weight:
    columns = x.shape[-1]
    if spec.encoding == "int8":
        return Weight(*pack_int8(x), "int8", (1, columns))
    if spec.encoding == "int4":
        return Weight(*pack_int4(x, group), "int4", (1, group or columns))
    if spec.encoding == "fp4":
        return Weight(*pack_fp4(x), "fp4", (1, FP4_GROUP), True)
    return Weight(*pack_fp8(x, tile), "fp8", tile, True)


def _check_finite(name: str, x: Tensor) -> None:
    # the extremes show NaN and infinity without a second tensor of the same size
    if x.numel() and not all(bool(torch.isfinite(extreme)) for extreme in x.detach().aminmax()):
        raise CheckpointError(f"tensor `{name}` holds NaN or infinity, expected finite values")


def _checked(spec: TensorSpec, x: Tensor) -> Tensor:
    if tuple(x.shape) != spec.shape or x.dtype != TORCH_DTYPES[spec.dtypes[0]]:
        raise CheckpointError(
            f"tensor `{spec.name}` is {x.dtype} {list(x.shape)}, expected {spec.dtypes[0]} {list(spec.shape)}"
        )
    return x


def _present(config: ModelConfig, tensors: Tensors) -> list[TensorSpec]:
    specs = list(expected_tensors(config))
    blocks = {spec.block for spec in specs if spec.name in tensors}
    specs = [spec for spec in specs if spec.block in blocks | {"backbone"}]
    for spec in specs:
        quantised_here = (
            spec.name.endswith(".scale") and f"{spec.name.removesuffix('.scale')}.weight" in tensors
        )
        if spec.name not in tensors and not quantised_here:
            raise CheckpointError(f"tensor `{spec.name}` is missing from the model to write")
    return specs


def _with_dtype(spec: TensorSpec, float_dtype: FloatDtype | None) -> TensorSpec:
    if float_dtype in spec.dtypes:
        return spec._replace(dtypes=(float_dtype,))
    return spec


def _files(specs: list[TensorSpec], sharded: bool) -> dict[str, list[TensorSpec]]:
    if not sharded:
        return {SINGLE_NAME: specs}
    numbers = sorted({spec.shard for spec in specs})
    names = {n: f"model-{at + 1:05d}-of-{len(numbers):05d}.safetensors" for at, n in enumerate(numbers)}
    shards: dict[str, list[TensorSpec]] = {name: [] for name in names.values()}
    for spec in specs:
        shards[names[spec.shard]].append(spec)
    return shards


def _write_shard(path: Path, specs: list[TensorSpec], encoder: _Encoder) -> None:
    # wide elements first: every tensor then starts at a multiple of its element size
    ordered = sorted(specs, key=lambda spec: -ITEM_BYTES[spec.dtypes[0]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in ordered:
        where = [at, at + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtypes[0], "shape": list(spec.shape), "data_offsets": where}
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # a matrix and its scales lie apart, and are made together
        for spec in specs:
            x = encoder.stored(spec).cpu().contiguous()
            file.seek(8 + len(text) + header[spec.name]["data_offsets"][0])
            file.write(x.reshape(-1).view(torch.uint8).numpy().data)
        _flush(file)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
        _flush(file)


def _flush(file: BufferedWriter) -> None:
    # a rename may reach the disk before the bytes do
    file.flush()
    os.fsync(file.fileno())


def _publish(staging: Path, target: Path) -> None:
    new = {path.name for path in staging.iterdir()}
    # config.json last: a folder without it is not a checkpoint, so a reader never sees half of one
    for path in sorted(
        staging.iterdir(), key=lambda p: (p.name == "config.json", p.name == INDEX_NAME, p.name)
    ):
        os.replace(path, target / path.name)
    for stale in target.glob("model*.safetensors*"):
        if stale.name not in new:
            stale.unlink()
