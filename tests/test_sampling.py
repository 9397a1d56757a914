"""Parameters are refused outside their ranges, uniforms depend on a counter alone, and the op follows its order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from v4sdk.errors import SamplingError
from v4sdk.ops import sample
from v4sdk.sampling import (
    PLAIN,
    SamplingParams,
    eos_from_generation_config,
    params_from_generation_config,
    uniforms,
)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "[0, 2]"),
        ("temperature", 2.01, "[0, 2]"),
        ("temperature", math.nan, "[0, 2]"),
        ("temperature", math.inf, "[0, 2]"),
        ("temperature", "1", "[0, 2]"),
        ("temperature", True, "[0, 2]"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.5, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("min_p", -1e-9, "[0, 1]"),
        ("min_p", math.nan, "[0, 1]"),
        ("top_k", -1, "at least 0"),
        ("top_k", 2.5, "at least 0"),
        ("seed", -1, "from 0"),
        ("seed", 1 << 63, "from 0"),
        ("max_tokens", 0, "at least 1"),
        ("top_logprobs", 21, "from 0 to 20"),
        ("stop", [""], "not empty"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop_token_ids", [-1], "token ids"),
        ("logit_bias", {3: math.nan}, "[-100, 100]"),
        ("logit_bias", {3: 101.0}, "[-100, 100]"),
        ("logit_bias", {"a": 1.0}, "token id"),
    ],
)
def test_bad_parameter_is_named_with_its_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    assert f"`{name}" in caught.value.message
    assert expected in caught.value.message


def test_parameters_are_filled_from_defaults() -> None:
    defaults = params_from_generation_config(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 99}
    )
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.6, 0, 0.95, 0.0)
    mine = SamplingParams(top_p=0.5, stop="x", top_logprobs=2).over(defaults)
    assert (mine.temperature, mine.top_p, mine.max_tokens) == (0.6, 0.5, 99)
    assert mine.stop_strings == ("x",)
    assert mine.logprobs


def test_generation_config_without_sampling_is_greedy() -> None:
    assert params_from_generation_config({"do_sample": False, "temperature": 0.7}).is_greedy
    assert params_from_generation_config({}) == PLAIN
    assert eos_from_generation_config({"eos_token_id": [1, 7]}) == (1, 7)
    assert eos_from_generation_config({"eos_token_id": 3}) == (3,)
    with pytest.raises(SamplingError, match="`top_p`"):
        params_from_generation_config({"top_p": 7})


def test_uniforms_depend_on_seed_stream_and_position_only() -> None:
    whole = uniforms(11, 2, 0, 50)
    for first, count in ((0, 1), (1, 7), (3, 4), (4, 4), (17, 33), (49, 1)):
        assert uniforms(11, 2, first, count) == whole[first : first + count]
    assert all(0 <= u < 1 and float(np.float32(u)) == u for u in whole)
    assert len(set(whole)) == 50
    assert not set(whole) & set(uniforms(12, 2, 0, 50))
    assert not set(whole) & set(uniforms(11, 3, 0, 50))


def test_uniforms_never_change() -> None:
    # saved sequences continue with these numbers
    assert uniforms(5, 0, 0, 3) == [0.7337459325790405, 0.5905206203460693, 0.20780891180038452]
    assert uniforms((1 << 63) - 1, 7, 1 << 20, 1) == uniforms((1 << 63) - 1, 7, (1 << 20) - 3, 4)[3:]


def _row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def _sample(logits: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    rows = logits.shape[0]
    named: dict[str, Any] = {
        "bias": None, "temperature": torch.ones(rows), "top_k": torch.zeros(rows, dtype=torch.int32),
        "top_p": torch.ones(rows), "min_p": torch.zeros(rows), "uniform": torch.zeros(rows), "num_top": 0,
    }  # fmt: skip
    return sample(logits, **(named | given))


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert _sample(logits, temperature=None)[0].tolist() == [1, 0]
    assert _sample(logits, temperature=torch.zeros(2), uniform=torch.tensor([0.9, 0.9]))[0].tolist() == [1, 0]


def test_zero_temperature_row_beside_a_drawn_row() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    ids = _sample(logits, temperature=torch.tensor([0.0, 1.0]), uniform=torch.tensor([0.99, 0.99]))[0]
    assert ids.tolist() == [1, 2]


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    grid = torch.arange(1000) / 1000 + 0.0005
    ids = _sample(p.log().expand(1000, -1), uniform=grid)[0]
    assert torch.bincount(ids, minlength=4).tolist() == [500, 200, 200, 100]
    # equal probabilities keep the order of their ids
    assert ids[600] == 1
    assert ids[800] == 2


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.39}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        # after top_k the rest is a distribution again: 0.5 of it is less than the first
        ({"top_k": 2, "top_p": 0.7}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep(given: dict[str, Any], kept: set[int]) -> None:
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    grid = torch.arange(500) / 500
    tensors = {
        k: torch.full((500,), v, dtype=torch.int32 if k == "top_k" else torch.float32)
        for k, v in given.items()
    }
    assert set(_sample(p.log().expand(500, -1), uniform=grid, **tensors)[0].tolist()) == kept


def test_bias_comes_before_temperature() -> None:
    # at temperature 2 the bias is halved with the logits, so the odds are e to the half of it
    logits, bias = torch.zeros(1000, 2), torch.tensor([[2.0, 0.0]]).expand(1000, -1)
    grid = torch.arange(1000) / 1000
    ids = _sample(logits, bias=bias, temperature=torch.full((1000,), 2.0), uniform=grid)[0]
    share = float((ids == 0).float().mean())
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=2e-3)


def test_barred_tokens_are_never_drawn() -> None:
    logits = torch.zeros(200, 5)
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf, -math.inf]).expand(200, -1)
    ids = _sample(logits, bias=bias, uniform=torch.arange(200) / 200)[0]
    assert set(ids.tolist()) == {0, 2}
    assert set(_sample(logits, bias=bias, temperature=None)[0].tolist()) == {0}


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = _row(1.0, 2.0, 0.5, 2.0)
    expected = torch.log_softmax(logits, -1)[0]
    ids, lp, top_ids, top_lp = _sample(
        logits,
        bias=_row(9.0, 0.0, 0.0, 0.0),
        temperature=torch.tensor([0.5]),
        top_k=torch.tensor([1]),
        num_top=3,
    )
    assert ids.tolist() == [0]
    assert float(lp) == pytest.approx(float(expected[0]))
    assert top_ids.tolist() == [[1, 3, 0]]
    torch.testing.assert_close(top_lp[0], expected[[1, 3, 0]])


def test_extreme_uniforms_stay_inside() -> None:
    top = 1 - 2.0**-24
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 10
    for u in (0.0, top):
        for k in (1, 3, 0):
            ids = _sample(
                logits,
                uniform=torch.full((4,), u),
                top_k=torch.full((4,), k),
                temperature=torch.full((4,), 0.01),
            )[0]
            assert ((ids >= 0) & (ids < 2000)).all()
            if k == 1:
                assert ids.tolist() == logits.argmax(-1).tolist()


def test_no_value_is_read_on_the_host() -> None:
    with FakeTensorMode():
        for temperature in (None, torch.ones(3)):
            out = _sample(torch.randn(3, 50), temperature=temperature, num_top=2)
            assert [tuple(t.shape) for t in out] == [(3,), (3,), (3, 2), (3, 2)]
