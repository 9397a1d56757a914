"""How tokens are drawn: validated parameters, and uniform numbers that depend on nothing but a counter. Knows no device."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from v4sdk.errors import SamplingError

MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_BIAS = 100.0
_SEEDS = 1 << 63


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may say about sampling. `None` means: as the checkpoint's `generation_config.json` says.

    Applied in this order: bias, temperature, top_k, top_p, min_p. Ties go to the lowest id.

    Args:
        temperature: 0 is greedy; at most 2.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities reach this sum; in (0, 1].
        min_p: drop tokens less likely than this share of the likeliest one; in [0, 1].
        seed: same seed, same draws, on every device. None draws one and reports it in the result.
        max_tokens: most tokens to generate.
        stop: strings that end the content; they are removed from it.
        stop_token_ids: further token ids that end generation, besides the model's end token.
        logit_bias: added to the logits of these token ids; in [-100, 100].
        logprobs: report the log-probability of every generated token, of the unmodified distribution.
        top_logprobs: also report this many of the likeliest tokens; at most 20; implies `logprobs`.
        ignore_eos: go on after the model's end token.

    Raises:
        SamplingError: naming the value and its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, 0)
        _check_int("seed", self.seed, 0, _SEEDS - 1)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        # one string is a list of one; frozen, so set through the back door of dataclasses
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _checked_stop(stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.top_logprobs:
            object.__setattr__(self, "logprobs", True)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """Fill what is None from `defaults`."""
        missing = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **missing)

    @property
    def is_greedy(self) -> bool:
        """Nothing is drawn; true only where the temperature is known to be 0."""
        return self.temperature == 0.0


def params_from_generation_config(raw: Mapping[str, Any]) -> SamplingParams:
    """Read defaults from a parsed `generation_config.json`; what it does not name stays plain sampling.

    Raises:
        SamplingError: if one of its values is outside its range.
    """
    known = {
        name: raw[name] for name in ("temperature", "top_k", "top_p", "min_p") if raw.get(name) is not None
    }
    if raw.get("do_sample") is False:
        known["temperature"] = 0.0
    if raw.get("max_new_tokens") is not None:
        known["max_tokens"] = raw["max_new_tokens"]
    return SamplingParams(**known).over(PLAIN)


def eos_from_generation_config(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens a `generation_config.json` names: one id, a list, or none.

    Raises:
        SamplingError: if it names something else.
    """
    eos = raw.get("eos_token_id")
    ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise SamplingError(f"`eos_token_id` is {eos!r}, expected a token id or several")
    return tuple(ids)


def draw_seed() -> int:
    """A seed nobody chose."""
    return secrets.randbelow(_SEEDS)


def uniforms(seed: int, stream: int, first: int, count: int) -> list[float]:
    """Uniform numbers in [0, 1) for positions first..first+count of one sequence; any range gives the same numbers.

    Philox 4x64 with key (seed, stream) and counter position // 4; the upper 24 bits of each word, so that float32 holds
    the number exactly and every device computes with the same one.

    Args:
        seed: the request's. stream: which sequence of the request. first: index of the token to be drawn.
    """
    start = first // 4
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[start, 0, 0, 0])
    raw = words.random_raw(first % 4 + count)[first % 4 :]
    return [float(word) for word in (raw >> np.uint64(40)).astype(np.float64) * 2.0**-24]


def _check_float(name: str, value: object, low: float, high: float, open_below: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type, operator]
    if not inside or (open_below and value == low):
        bracket = "(" if open_below else "["
        raise SamplingError(f"`{name}` is {value!r}, expected a number in {bracket}{low:g}, {high:g}]")


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        want = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise SamplingError(f"`{name}` is {value!r}, expected an integer {want}")


def _checked_stop(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
        raise SamplingError(f"`stop` is {stop!r}, expected strings that are not empty")
    if len(stop) > MAX_STOP_STRINGS:
        raise SamplingError(f"`stop` has {len(stop)} strings, expected at most {MAX_STOP_STRINGS}")
    return tuple(stop)


def _checked_ids(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or not all(type(i) is int and i >= 0 for i in ids):
        raise SamplingError(f"`stop_token_ids` is {ids!r}, expected token ids")
    return tuple(ids)


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise SamplingError(f"`logit_bias` is {bias!r}, expected a mapping from token id to a number")
    for index, value in bias.items():
        if type(index) is not int or index < 0:
            raise SamplingError(f"`logit_bias` names {index!r}, expected a token id")
        _check_float(f"logit_bias[{index}]", value, -MAX_BIAS, MAX_BIAS)
        if value is None:
            raise SamplingError(f"`logit_bias[{index}]` is None, expected a number")
    return dict(bias)


# what a folder without generation_config.json means
PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
