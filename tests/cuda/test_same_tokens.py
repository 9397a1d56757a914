"""v4-nano through the backend's own kernels writes what the CPU writes, by the rule for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from v4sdk import Session
from v4sdk_bench.parity.same_tokens import same_tokens


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [
        pytest.param([[3, 17, 5, 29, 11]], 2, id="a-few-tokens"),
        # the rule as the project states it for an interpreter; minutes
        pytest.param(None, 8, id="five-prompts-of-eight", marks=pytest.mark.slow),
    ],
)
def test_the_bundled_model_writes_the_same_tokens(
    prompts: list[list[int]] | None, tokens: int, cuda: Any
) -> None:
    with (
        Session.load(backend="cpu", numerics="reference") as here,
        Session.load(backend=cuda, numerics="reference") as there,
    ):
        assert not there.loaded.binding.without_kernel
        found = same_tokens(here, there, prompts, tokens)
    assert found.compared == found.tokens
    assert not found.broken, found.broken
