"""v4-nano through the backend's own kernels writes what the CPU writes, by the rule for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from v4sdk import Session
from v4sdk_bench.nano.dialogues import questions
from v4sdk_bench.parity.same_tokens import same_tokens


@pytest.mark.parametrize(
    ("is_whole", "tokens"),
    [
        pytest.param(False, 2, id="one-prompt-of-two"),
        # the rule as the project states it for an interpreter; minutes
        pytest.param(True, 8, id="five-prompts-of-eight", marks=pytest.mark.slow),
    ],
)
def test_the_bundled_model_writes_the_same_tokens(is_whole: bool, tokens: int, cuda: Any) -> None:
    with (
        Session.load(backend="cpu", numerics="reference") as here,
        Session.load(backend=cuda, numerics="reference") as there,
    ):
        assert not there.loaded.binding.without_kernel
        asked = None if is_whole else [next(iter(questions(here, 8)))]
        found = same_tokens(here, there, asked, tokens)
    assert found.compared == found.tokens
    assert not found.broken, found.broken
