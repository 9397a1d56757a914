"""An independent implementation computes the same logits from the same files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import v4sdk
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk_bench.parity.independent import RELATIVE_LIMIT, load_elsewhere, logits_difference, their_name
from v4sdk_bench.parity.tiny import VARIANTS, draw

NANO = Path(v4sdk.__file__).parent / "nano"
# window of 128, several blocks of 128, more entries than the indexer picks
LENGTH, DECODE_FROM = 280, 252


def prompt(vocab: int, length: int = LENGTH) -> list[int]:
    return random.Random(5).choices(range(vocab), k=length)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_freshly_drawn_models_give_their_logits_in_prefill_and_decode(variant: str, seed: int) -> None:
    config = VARIANTS[variant]
    prefill, decode = logits_difference(config, draw(config, seed), prompt(config.vocab_size), DECODE_FROM)
    assert prefill <= RELATIVE_LIMIT
    assert decode <= RELATIVE_LIMIT


@pytest.mark.parametrize("name", ["tiny-fp32", "tiny-quant"])
def test_golden_checkpoints_give_their_logits(name: str) -> None:
    folder = Path(__file__).parent / "golden" / name
    config = ModelConfig.from_folder(folder)
    with Checkpoint(folder) as checkpoint:
        found = logits_difference(config, checkpoint, prompt(config.vocab_size, 160), 140)
    assert max(found) <= RELATIVE_LIMIT


def test_released_layout_loads_there_bit_for_bit() -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 folders through accelerate")
    found = load_elsewhere(Path(__file__).parent / "golden" / "tiny-quant")
    assert found.report == ()
    assert found.different == ()
    assert found.compared == 145


@pytest.mark.skipif(not list(NANO.glob("*.safetensors")), reason="the bundled model is not there yet")
def test_bundled_model_loads_there_bit_for_bit_and_gives_their_logits() -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 folders through accelerate")
    found = load_elsewhere(NANO)
    assert found.report == ()
    assert found.different == ()
    config = ModelConfig.from_folder(NANO)
    with Checkpoint(NANO) as checkpoint:
        assert (
            max(logits_difference(config, checkpoint, prompt(config.vocab_size), DECODE_FROM))
            <= RELATIVE_LIMIT
        )


def test_names_there() -> None:
    assert their_name("layers.3.attn.indexer.compressor.norm.weight") == (
        "model.layers.3.self_attn.compressor.indexer.kv_norm.weight"
    )
    assert their_name("layers.3.attn.compressor.ape") == "model.layers.3.self_attn.compressor.position_bias"
