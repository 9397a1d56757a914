"""Values of a record as a reader wants them: the ending of a name says the unit, the size says the prefix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "–"
# shares between 0 and 1 whose names carry no unit
SHARES = ("top1", "top5", "accuracy", "noise", "spread", "agreement", "share", "exact_match", "sets_equal")
# shares that have no upper end
_OPEN_SHARES = ("noise", "spread")
# below these one line of a table is about a count, not a quantity
_COUNTS = ("rounds", "positions", "tokens", "threads", "questions", "cores", "calls", "cases", "ranks")

_ENDINGS = (
    ("_tokens_per_s", " rate"),
    ("_per_s", " rate"),
    ("_of_ceiling", " of the ceiling"),
    ("_bytes", ""),
    ("_ms", ""),
    ("_s", ""),
)
_NAMES = {
    "median_s": "median", "low_s": "10th percentile", "high_s": "90th percentile", "floor_s": "floor", "cpu_s": "CPU time",
    "ttft_s": "time to first token", "tpot_s": "time per output token", "kv_bytes": "KV bytes", "peak_bytes": "peak memory",
    "kv_formula_bytes": "KV by formula", "max_abs": "max abs", "relative_l2": "relative L2", "cosine_min": "cosine, least",
    "kl_mean": "KL mean", "kl_mean_everywhere": "KL mean, everywhere",
    "kl_p99": "KL p99", "kl_max": "KL max", "top1": "top-1", "top5": "top-5",
    "tokens_per_s": "rate", "in_cache": "in cache", "share_of_ceiling": "of the ceiling",
}  # fmt: skip


def show(name: str, value: Any) -> str:
    """A value with its unit, three significant digits: `show("tpot_s", 0.0123)` is `12.3 ms`. Lists and mappings in one line."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(name, value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(str(key), inner)}" for key, inner in value.items()) or ABSENT
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(show(name, inner) for inner in value) or ABSENT
    return str(value)


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if name.endswith("bytes_per_s"):
        return f"{scaled(value, 'B')}/s"
    if name.endswith("flops_per_s"):
        return f"{scaled(value, 'FLOP')}/s"
    if name.endswith("tokens_per_s"):
        return f"{digits(value)} tok/s"
    if name.endswith("_per_s"):
        return f"{digits(value)}/s"
    if name.endswith("_ms"):
        return f"{digits(value)} ms"
    if name.endswith("_s"):
        return seconds(value)
    if name.endswith("bytes"):
        return scaled(value, "B")
    if name.endswith("flops"):
        return scaled(value, "FLOP")
    if name.endswith("_of_ceiling"):
        return percent(value)
    if "cosine" in name:
        return f"{value:.6f}"
    if name.endswith("ratio") or name.startswith("ratio"):
        return f"{digits(value)}×"
    if name.endswith(SHARES) and 0 <= value <= 1:
        return percent(value)
    if name.endswith(_OPEN_SHARES) and value > 1:
        return percent(value)
    if isinstance(value, int) or (value == int(value) and (name.endswith(_COUNTS) or abs(value) >= 1000)):
        return f"{int(value):,}"
    return digits(value)


def digits(value: float) -> str:
    """Three significant digits: `0.0123`, `12.3`, `1,230`, `1.2e-05`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"


def scaled(value: float, unit: str) -> str:
    """With a decimal prefix: `scaled(2.5e9, "B")` is `2.50 GB`."""
    size = abs(value)
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value)} {unit}"


def seconds(value: float) -> str:
    """Seconds, milliseconds, microseconds or nanoseconds; minutes beyond 120 s."""
    size = abs(value)
    if size >= 120:
        return f"{digits(value / 60)} min"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if size >= factor:
            return f"{digits(value / factor)} {unit}"
    return "0 s" if value == 0 else f"{digits(value / 1e-9)} ns"


def percent(value: float) -> str:
    """A share: `99.2%`, `0.04%`; 100% only if it is all."""
    share = value * 100
    if share == 0 or share == 100:
        return f"{share:.0f}%"
    text = f"{share:.1f}" if share >= 0.1 else digits(share)
    return "over 99.9%" if text == "100.0" and value < 1 else f"{text}%"


def name_of(name: str) -> str:
    """A value's name in words, without its unit, which stands beside the number."""
    if name in _NAMES:
        return _NAMES[name]
    for ending, word in _ENDINGS:
        if name.endswith(ending) and name != ending:
            return f"{name.removesuffix(ending)}{word}".strip("_").replace("_", " ")
    return name.replace("_", " ")


def interval(name: str, low: Any, high: Any) -> str:
    """`1.20 to 1.40 ms`, or nothing if an end is missing."""
    if finite(low) is None or finite(high) is None:
        return ""
    one, two = show(name, low), show(name, high)
    number, _, unit = one.partition(" ")
    return f"{number} to {two}" if unit and two.endswith(f" {unit}") else f"{one} to {two}"


def finite(value: Any) -> float | None:
    """The value as a number one can draw or divide by, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
