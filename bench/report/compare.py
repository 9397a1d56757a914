"""Records side by side: which rows are of the same thing, which may be compared, and why the others may not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from v4sdk_bench.record import Row
from v4sdk_bench.report.numbers import finite, name_of, show
from v4sdk_bench.report.sources import Source

# settings that two rows of one thing may differ in: they are what is compared, and they are shown
SHOWN = frozenset({"backend", "threads", "device", "machine", "load", "date"})
# statistics over samples of different size are different statistics
SAMPLES = ("positions", "questions", "samples", "asked")
# sides are named `backend:numerics:kv_format`; the backend is what is compared
_SIDES = ("a", "b")
NOISE_LIMIT = 0.10
# an arithmetic that only imitates the device says nothing about its speed
_RAN = ("reference", "device")
_LEAST_ROUNDS = 5
# values that are a row's own speed; the rest of its `_s` values are limits, parts or ends of an interval
SPEEDS = ("median_s", "tpot_s", "ttft_s", "prefill_tokens_per_s", "kernel_s", "kernel_median_s")


@dataclass(frozen=True)
class Incomparable:
    """Two things that are not put in relation, and the reason in words."""

    subject: str
    left: str
    right: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Two speeds from separate runs.

    Attributes:
        quantity: name of the value. ratio: of the right to the left, as times faster; low, high: from the ends of both
            intervals, so wider than either. verdict: in words.
    """

    key: str
    what: str
    quantity: str
    left: str
    right: str
    left_value: float
    right_value: float
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Line:
    """Rows of one thing, by label of their record."""

    key: str
    what: str
    setting: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def first(self) -> Row:
        """The row of the first record that has one."""
        return next(iter(self.rows.values()))

    @property
    def commands(self) -> tuple[str, ...]:
        """What reproduces it."""
        return tuple(row.command for row in self.rows.values())


class Joined:
    """All rows of all records, by key and setting. Sections take what they understand; the rest is listed plainly."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.refused: list[Incomparable] = list(_models_differ(sources))
        self._taken: set[str] = set()
        self._lines = list(self._join())

    @property
    def labels(self) -> list[str]:
        """Of the records, in order."""
        return [source.label for source in self.sources]

    def source(self, label: str) -> Source:
        """The record of a label."""
        return next(source for source in self.sources if source.label == label)

    def take(self, *prefixes: str, without: tuple[str, ...] = ()) -> list[Line]:
        """Lines under a prefix that nobody has taken yet."""
        found = [
            line
            for line in self._lines
            if line.key.startswith(prefixes)
            and not (without and line.key.startswith(without))
            and line.key not in self._taken
        ]
        self._taken |= {line.key for line in found}
        return found

    def peek(self, *prefixes: str) -> list[Line]:
        """Lines under a prefix, taken or not."""
        return [line for line in self._lines if line.key.startswith(prefixes)]

    def _join(self) -> Iterator[Line]:
        keys = dict.fromkeys(row.key for source in self.sources for row in source.record.rows)
        by_key = {s.label: {row.key: row for row in s.record.rows} for s in self.sources}
        for key in keys:
            lines: list[tuple[dict[str, str], Line]] = []
            for source in self.sources:
                row = by_key[source.label].get(key)
                if row is None:
                    continue
                mark = signature(source, row)
                match = next((line for other, line in lines if _agree(mark, other, row, line.first)), None)
                if match is not None:
                    match.rows[source.label] = row
                    continue
                if lines:
                    other, line = lines[0]
                    self.refused.append(
                        Incomparable(key, next(iter(line.rows)), source.label, difference(other, mark))
                    )
                lines.append((mark, Line(key, row.what, dict(row.setting), {source.label: row})))
            yield from (line for _, line in lines)


def _agree(mark: dict[str, str], other: dict[str, str], row: Row, first: Row) -> bool:
    # what was not run says nothing about its setting, and may share a line with anything
    return mark == other or "not run" in (row.state, first.state)


def signature(source: Source, row: Row) -> dict[str, str]:
    """What another record's row must share: its setting, the model's fingerprint, the sizes of its samples."""
    mark = {
        n: json.dumps(_bare(n, value), sort_keys=True) for n, value in row.setting.items() if n not in SHOWN
    }
    parts = row.key.split("/")
    for name, about in source.record.models.items():
        if name in parts or row.setting.get("model") == name:
            mark["model fingerprint"] = json.dumps(about.get("fingerprint"))
            mark.pop("fingerprint", None)
    for name in SAMPLES:
        if row.values.get(name) is not None:
            mark[name] = json.dumps(row.values[name])
    return mark


def _bare(name: str, value: Any) -> Any:
    return value.partition(":")[2] or value if name in _SIDES and isinstance(value, str) else value


def difference(left: dict[str, str], right: dict[str, str]) -> str:
    """In words, what two signatures differ in."""
    said = []
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            one, two = (
                show(name, json.loads(side[name])) if name in side else "absent" for side in (left, right)
            )
            said.append(f"{name_of(name)} {_short(one)} and {_short(two)}")
    return "different " + "; ".join(said)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:18]}…{text[-12:]}"


def _models_differ(sources: Sequence[Source]) -> Iterator[Incomparable]:
    for at, right in enumerate(sources):
        for left in sources[:at]:
            both = set(left.record.models) & set(right.record.models)
            for name in sorted(both):
                one, two = (s.record.models[name].get("fingerprint") for s in (left, right))
                if one != two:
                    yield Incomparable(
                        f"model {name}", left.label, right.label,
                        f"different fingerprints, {_short(str(one))} and {_short(str(two))}; its rows stand in separate sections",
                    )  # fmt: skip
            if left.record.models and right.record.models and not both:
                one, two = (", ".join(s.record.models) for s in (left, right))
                yield Incomparable(
                    "model", left.label, right.label, f"different models, {_short(one)} and {_short(two)}"
                )


def withheld(source: Source, row: Row) -> str | None:
    """Why a row's speed may not be told, or None."""
    if row.state == "failed":
        return "its result is wrong"
    if row.state == "not run":
        return f"not run: {row.note}" if row.note else "not run"
    wrong = wrong_below(source, row)
    if wrong is not None:
        return f"parity is red: {wrong.key}"
    noise = finite(row.values.get("noise"))
    if noise is not None and noise > NOISE_LIMIT:
        return f"the same build differs from itself by {show('noise', noise)}, above {show('noise', NOISE_LIMIT)}"
    return None


def wrong_below(source: Source, row: Row) -> Row | None:
    """The parity row that makes a speed meaningless: of the same op, or of the same whole model."""
    parts = row.key.split("/")
    failed = [r for r in source.record.rows if r.state == "failed"]
    if parts[0] == "ops" and len(parts) > 1:
        prefix = f"parity/op/{parts[1]}"
        return next((r for r in failed if r.key == prefix or r.key.startswith(f"{prefix}/")), None)
    if parts[0] == "model" and len(parts) > 1 and parts[1] in source.record.models:
        of_model = (r for r in failed if r.setting.get("model", parts[1]) == parts[1])
        return next((r for r in of_model if r.key.startswith(("parity/model/", "parity/invariance/"))), None)
    return None


def compare(joined: Joined) -> tuple[list[Comparison], list[Incomparable]]:
    """Speeds of every further record against the first that has the row."""
    found: list[Comparison] = []
    refused: list[Incomparable] = []
    for line in joined.peek("ops/", "model/", "device/"):
        labels = list(line.rows)
        for right in labels[1:]:
            left = labels[0]
            pair = [(joined.source(label), line.rows[label]) for label in (left, right)]
            names = [n for n in SPEEDS if any(finite(row.values.get(n)) for _, row in pair)]
            # other engines are compared with ours in their own run, not with themselves elsewhere
            if not names or line.key.startswith("model/peers/"):
                continue
            noise = max(source.noise(row.suite) or 0.0 for source, row in pair)
            why = not_comparable(*pair[0], *pair[1])
            if why is not None:
                refused.append(Incomparable(line.key, left, right, why))
                continue
            found += [c for n in names if (c := _relate(line, n, left, right, noise)) is not None]
    return found, refused


def not_comparable(left: Source, a: Row, right: Source, b: Row) -> str | None:
    """Why two rows of one setting have no ratio, or None."""
    for source, row in ((left, a), (right, b)):
        why = withheld(source, row)
        if why is not None:
            return f"{source.label}: {why}"
        if row.evidence not in _RAN:
            return f"{source.label}: evidence `{row.evidence}` has no speed of its device"
        noise = source.noise(row.suite)
        if noise is not None and noise > NOISE_LIMIT:
            return (
                f"{source.label}: on its machine the same call differs from itself by {show('noise', noise)}, "
                f"above {show('noise', NOISE_LIMIT)}"
            )
    if bool(left.record.options.get("quick")) != bool(right.record.options.get("quick")):
        for source, row in ((left, a), (right, b)):
            rounds = finite(row.values.get("rounds"))
            if rounds is not None and rounds < _LEAST_ROUNDS:
                return f"a quick and a full run, and {source.label} has only {rounds:.0f} rounds"
    return None


def ends(row: Row, name: str) -> tuple[float, float]:
    """The interval of a speed: its low and high values, or the value itself."""
    value = finite(row.values.get(name)) or 0.0
    stem = name.removesuffix("_s")
    places = [
        (name.replace("median", "low"), name.replace("median", "high")) if "median" in name else None,
        (f"{stem}_low_s", f"{stem}_high_s"),
    ]
    for place in places:
        if place is not None:
            low, high = (finite(row.values.get(n)) for n in place)
            if low and high:
                return low, high
    return value, value


def _relate(line: Line, name: str, left: str, right: str, noise: float) -> Comparison | None:
    a, b = line.rows[left], line.rows[right]
    one, two = finite(a.values.get(name)), finite(b.values.get(name))
    if not one or not two:
        return None
    (a_low, a_high), (b_low, b_high) = ends(a, name), ends(b, name)
    if name.endswith("_per_s"):
        ratio, low, high = two / one, b_low / a_high, b_high / a_low
    else:
        ratio, low, high = one / two, a_low / b_high, a_high / b_low
    verdict = _faster(left, right, ratio, low, high, noise)
    return Comparison(line.key, line.what, name, left, right, one, two, ratio, low, high, verdict)


def _faster(left: str, right: str, ratio: float, low: float, high: float, noise: float) -> str:
    """Which is faster, in words. A value without a spread is held to the noise that its suite measured."""
    if low <= 1 <= high or abs(ratio - 1) <= noise:
        return "no difference beyond the spread"
    if ratio < 1:
        left, right, ratio, low, high = right, left, 1 / ratio, 1 / high, 1 / low
    how_sure = f"{low:.2f} to {high:.2f}" if low < high else "its spread was not measured"
    return f"{right} is {ratio:.2f} times faster ({how_sure})"
