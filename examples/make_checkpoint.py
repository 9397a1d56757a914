"""Write a checkpoint of random weights in the released layout, for loading and speed tests at real sizes.

    python examples/make_checkpoint.py OUT                        four layers of V4-Flash, about 16.4 GB
    python examples/make_checkpoint.py OUT --preset v4-pro --ratios 4,128
    python examples/make_checkpoint.py OUT --config config.json   the sizes of any V4 configuration

Tensors are drawn and written one at a time. The answers of such a model mean nothing; its sizes and its work are real.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.convert import write_checkpoint
from v4sdk.errors import CheckpointError, ConfigError, V4Error
from v4sdk.presets import PRESETS, shrunk
from v4sdk.tensors import TensorSpec, expected_tensors

# root mean square of an FP4 value when all 16 codes are equally likely
_FP4_RMS = 2.926


class RandomTensors:
    """Draws any tensor of a configuration on demand; the same name and seed give the same values."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._specs = {spec.name: spec for spec in expected_tensors(config)}

    def __contains__(self, name: object) -> bool:
        # scales of FP8 tiles are left to the writer; FP4 experts are drawn as bytes together with theirs
        spec = self._specs.get(str(name))
        return spec is not None and (not spec.name.endswith(".scale") or self._is_fp4(spec.name))

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs[name]
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)
        if self._is_fp4(name):
            return self._fp4(spec, g)
        if name.endswith("tid2eid"):
            # distinct experts per row without sorting a random key per expert
            first = torch.randint(self._config.n_routed_experts, (spec.shape[0], 1), generator=g)
            return (first + torch.arange(spec.shape[1])) % self._config.n_routed_experts
        if name.endswith("norm.weight"):
            return torch.ones(spec.shape, dtype=torch.bfloat16)
        if len(spec.shape) == 1:
            return torch.randn(spec.shape, generator=g) * 0.1
        dtype = torch.bfloat16 if spec.dtypes[0] == "BF16" else torch.float32
        drawn = torch.randn(spec.shape, generator=g, dtype=dtype)
        return drawn if name == "embed.weight" else drawn.mul_(spec.shape[1] ** -0.5)

    def _is_fp4(self, name: str) -> bool:
        weight = self._specs.get(f"{name.removesuffix('.scale').removesuffix('.weight')}.weight")
        return weight is not None and weight.dtypes[0] == "I8"

    def _fp4(self, spec: TensorSpec, g: torch.Generator) -> Tensor:
        if spec.name.endswith(".scale"):
            exponent = round(math.log2(1 / (_FP4_RMS * math.sqrt(spec.shape[1] * 32))))
            return torch.full(spec.shape, 127 + exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        # 16 random nibbles at a time: billions of them are needed
        words = torch.empty(-(-math.prod(spec.shape) // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=g)
        return words.view(torch.int8)[: math.prod(spec.shape)].view(spec.shape)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--preset", choices=sorted(PRESETS), default="v4-flash", help="sizes (default: v4-flash)"
    )
    sizes.add_argument("--config", type=Path, help="take sizes from this config.json instead")
    parser.add_argument(
        "--ratios", default="0,4,128,4", help="one layer each: 0 window, 4 CSA, 128 HCA; or `all`"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def chosen_config(arguments: argparse.Namespace) -> ModelConfig:
    """Give the sizes that were asked for."""
    config = ModelConfig.from_folder(arguments.config) if arguments.config else PRESETS[arguments.preset]
    if arguments.ratios == "all":
        return config
    try:
        ratios = tuple(int(ratio) for ratio in arguments.ratios.split(","))
    except ValueError:
        raise ConfigError(f"`--ratios` is `{arguments.ratios}`, expected numbers and commas") from None
    return shrunk(config, ratios)


def main() -> int:
    """Write the checkpoint and say how large it is."""
    arguments = read_arguments()
    try:
        config = chosen_config(arguments)
        total = sum(spec.nbytes for spec in expected_tensors(config))
        arguments.out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(arguments.out).free
        if total > free:
            raise CheckpointError(f"`{arguments.out}` has {free:,} bytes free, expected {total:,}")
        started = time.perf_counter()
        write_checkpoint(
            arguments.out,
            config,
            RandomTensors(config, arguments.seed),
            on_shard=lambda name, size: print(f"{name}  {size:,} bytes", file=sys.stderr),
        )
    except V4Error as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(f"{total:,} bytes in {time.perf_counter() - started:.0f} s: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
