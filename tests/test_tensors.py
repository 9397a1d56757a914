"""The tensor list follows from the configuration: totals, counts and every row of the released models."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from v4sdk.config import ModelConfig, QuantizationConfig
from v4sdk.errors import ConfigError
from v4sdk.presets import PRESETS, V4_FLASH, V4_FLASH_0731, V4_PRO, V4_PRO_0813, shrunk
from v4sdk.tensors import TensorSpec, expected_tensors

MANIFESTS = Path(__file__).parent / "data" / "manifests"
# name, configuration, tensors, payload bytes
RELEASED = [
    ("flash", V4_FLASH, 69_187, 159_609_485_896),
    ("pro", V4_PRO, 145_116, 864_704_792_696),
    ("flash-0731", V4_FLASH_0731, 72_317, 166_878_536_440),
    ("pro-0813-predicted", V4_PRO_0813, 149_782, 892_595_197_672),
]
Row = tuple[str, tuple[int, ...], int]


def layer_numbers(text: str) -> list[int]:
    numbers = []
    for run in text.split():
        first, last, step = (int(x) for x in re.split("[-:]", run if "-" in run else f"{run}-{run}:1"))
        numbers += range(first, last + 1, step)
    return numbers


def manifest_rows(name: str) -> dict[str, Row]:
    """Expand a manifest: name to (dtype, shape, shard)."""
    rows: dict[str, Row] = {}
    with (MANIFESTS / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            shape = tuple(int(n) for n in row["shape"].split("x"))
            for i in layer_numbers(row["layers"]) or [None]:
                shard = int(row["shard"]) if i is None else i + 2
                pattern = row["name"] if i is None else row["name"].replace("{i}", str(i))
                for e in range(int(row["count"])):
                    rows[pattern.replace("{e}", str(e))] = (row["dtype"], shape, shard)
    return rows


@pytest.mark.parametrize(("name", "config", "count", "total"), RELEASED)
def test_every_row_of_the_manifest_is_expected_exactly(
    name: str, config: ModelConfig, count: int, total: int
) -> None:
    specs = list(expected_tensors(config))
    assert len(specs) == count
    assert sum(spec.nbytes for spec in specs) == total
    assert {s.name: (s.dtypes[0], s.shape, s.shard) for s in specs} == manifest_rows(name)


def test_dtype_census_of_flash() -> None:
    census = Counter(spec.dtypes[0] for spec in expected_tensors(V4_FLASH))
    assert census == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}


def parameters(config: ModelConfig, block: str = "backbone") -> int:
    return sum(s.parameters for s in expected_tensors(config) if block in ("all", s.block))


def test_parameter_counts_are_the_published_ones() -> None:
    assert round(parameters(V4_FLASH) / 1e9, 2) == 284.33
    assert round(parameters(V4_PRO) / 1e9, 1) == 1573.0
    assert round(parameters(V4_FLASH, "all") / 1e9, 2) == 290.94
    assert round(parameters(V4_PRO, "all") / 1e9, 1) == 1598.8
    assert round(parameters(V4_FLASH_0731, "all") / 1e9, 2) == 304.18


def test_base_checkpoints_have_their_predicted_size() -> None:
    for config, gigabytes in ((V4_FLASH, 292.56), (V4_PRO, 1602.3)):
        base = replace(config, expert_dtype="fp8", quantization=QuantizationConfig((128, 128), "float32"))
        specs = list(expected_tensors(base))
        assert sum(s.nbytes for s in specs) / 1e9 == pytest.approx(gigabytes, abs=0.05)
        assert {s.dtypes[0] for s in specs} == {"BF16", "I64", "F32", "F8_E4M3"}


def by_name(config: ModelConfig) -> dict[str, TensorSpec]:
    return {s.name: s for s in expected_tensors(config)}


def test_unquantised_folders_may_hold_either_float_dtype() -> None:
    specs = by_name(replace(shrunk(V4_FLASH, (0, 4, 128)), quantization=None, expert_dtype=None))
    assert not any(name.endswith(".scale") for name in specs)
    for spec in specs.values():
        assert set(spec.dtypes) == ({"I64"} if spec.name.endswith("tid2eid") else {"BF16", "F32"})
    assert specs["layers.0.ffn.experts.0.w1.weight"].shape == (2048, 4096)


def test_fp4_experts_beside_unquantised_projections() -> None:
    specs = by_name(replace(shrunk(V4_FLASH, (0, 4, 128)), quantization=None))
    assert specs["layers.1.ffn.experts.0.w1.weight"].dtypes == ("I8",)
    assert specs["layers.1.attn.wq_a.weight"].dtypes == ("BF16", "F32")


def test_tiles_at_the_edges_are_partial() -> None:
    config = replace(shrunk(V4_FLASH, (0, 4)), hidden_size=160, q_lora_rank=130)
    specs = by_name(config)
    assert specs["layers.0.attn.wq_a.scale"].shape == (2, 2)
    assert specs["layers.1.ffn.experts.3.w1.scale"].shape == (2048, 5)


def test_fp4_needs_columns_in_multiples_of_32() -> None:
    with pytest.raises(ConfigError, match="w2` has 2040 columns"):
        list(expected_tensors(replace(V4_FLASH, moe_intermediate_size=2040)))


@pytest.mark.parametrize("extra", [(), (0,), (0, 0, 0)])
def test_length_of_compress_ratios_does_not_change_the_tensors(extra: tuple[int, ...]) -> None:
    config = replace(V4_FLASH, compress_ratios=V4_FLASH.compress_ratios[:43] + extra)
    assert list(expected_tensors(config)) == list(expected_tensors(V4_FLASH))


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("DeepSeek-V4-Flash.config.json", "v4-flash"),
        ("DeepSeek-V4-Flash.config.initial-2026-04-24.json", "v4-flash"),
        ("DeepSeek-V4-Pro.config.json", "v4-pro"),
        ("DeepSeek-V4-Flash-0731.config.reconstructed.json", "v4-flash-0731"),
    ],
)
def test_presets_equal_the_published_files(shared: Path, file: str, preset: str) -> None:
    assert ModelConfig.from_folder(shared / "data" / "configs" / file) == PRESETS[preset]
