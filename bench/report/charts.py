"""Line charts and rooflines as inline SVG whose colours come from the page's style, so that they follow light, dark and paper.

A drawing is made at the width at which it is shown: 358 units are the text of a phone, and a letter of 14 stays 14.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from v4sdk_bench.report.numbers import digits, scaled, seconds
from v4sdk_bench.report.svg import FONT, Axis, Drawing, decades, nice, padded, thinned, ticks, ticks_log

NARROW, WIDE = 358, 1040
_LETTER = 7.4
_MARKS = ("circle", "square", "triangle", "diamond", "cross", "ring")
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 2", "1 3")
COLOURS = len(_MARKS)


@dataclass(frozen=True)
class Series:
    """One line: points `(x, y, low, high)` in ascending x. `faint` draws it dashed and without marks, as a formula."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]
    faint: bool = False


@dataclass(frozen=True)
class Roof:
    """A ceiling: bytes or FLOPs per second."""

    label: str
    value: float
    is_bandwidth: bool


@dataclass(frozen=True)
class Spot:
    """A measured op in a roofline: FLOPs per byte, achieved FLOPs per second, number in the table, name."""

    intensity: float
    achieved: float
    number: int
    label: str


def lines(
    title: str, describes: str, series: Sequence[Series], x_name: str, unit: str, width: float = NARROW
) -> str:
    """Lines over a logarithmic x; y is linear from zero, or logarithmic where values span more than a factor of 20.

    Args:
        unit: `s`, `B` or a word for plain numbers.
    Returns:
        The SVG, or an empty text if there is no point.
    """
    points = [p for one in series for p in one.points if p[0] > 0 and p[1] > 0]
    if not points:
        return ""
    low, high = min(p[1] for p in points), max(max(p[1], p[3]) for p in points)
    log = high / low > 20
    left, right, top = 64.0, width - 14.0, 18.0
    bottom = top + 210.0
    xs = sorted({p[0] for p in points})
    x = Axis(*padded(xs[0], xs[-1]), True, left + 8, right - left - 16)
    y_low, y_high = decades(low, high) if log else (0.0, nice(high))
    y = Axis(y_low, y_high, log, bottom, top - bottom)
    entries = [one for one in series if one.points]
    height = bottom + 50 + 24 * len(entries)
    d = Drawing(title, describes, width, height)
    for value in ticks_log(y_low, y_high) if log else ticks(y_high):
        d.line(left, y.at(value), right, y.at(value), "grid")
        d.text(left - 8, y.at(value) + 5, _tick(value, unit), "end")
    for value in thinned(xs, x, 40):
        d.line(x.at(value), bottom, x.at(value), bottom + 5, "axis")
        d.text(x.at(value), bottom + 20, tokens(value), "middle")
    d.line(left, bottom, right, bottom, "axis")
    d.text((left + right) / 2, bottom + 40, x_name, "middle", "soft")
    for at, one in enumerate(entries):
        style, dash = f"s{at % COLOURS}", _DASHES[at % COLOURS] if not one.faint else "3 4"
        placed = [(x.at(p[0]), y.at(p[1])) for p in one.points if p[0] > 0 and p[1] > 0]
        d.path(placed, f"line {style}", dash)
        for (px, py), (value, measured, lower, upper) in zip(placed, one.points, strict=False):
            if one.faint:
                continue
            if upper > lower > 0:
                d.line(px, y.at(lower), px, y.at(upper), f"line {style}")
            d.mark(
                px, py, _MARKS[at % COLOURS], style, f"{one.label}: {tokens(value)}, {_tick(measured, unit)}"
            )
        below = bottom + 62 + 24 * at
        d.line(left - 44, below, left - 14, below, f"line {style}", dash)
        if not one.faint:
            d.mark(left - 29, below, _MARKS[at % COLOURS], style)
        d.text(left - 4, below + 5, _cut(one.label, width - left))
    return str(d.done())


def roofline(
    title: str, describes: str, roofs: Sequence[Roof], spots: Sequence[Spot], width: float = NARROW
) -> str:
    """Achieved FLOPs per second over FLOPs per byte, under the measured ceilings; both logarithmic.

    Returns:
        The SVG, or an empty text without a ceiling of each kind or without a point.
    """
    slopes = [r for r in roofs if r.is_bandwidth]
    flats = [r for r in roofs if not r.is_bandwidth]
    if not slopes or not flats or not spots:
        return ""
    narrow = width < WIDE / 2
    left, right, top = 64.0, width - 14.0, 18.0
    bottom = top + (300.0 if narrow else 400.0)
    knees = [f.value / s.value for f in flats for s in slopes]
    x_low, x_high = decades(min(s.intensity for s in spots), max([s.intensity for s in spots] + knees) * 1.5)
    y_low, y_high = decades(min(s.achieved for s in spots), max(f.value for f in flats) * 1.05)
    x, y = Axis(x_low, x_high, True, left, right - left), Axis(y_low, y_high, True, bottom, top - bottom)
    d = Drawing(title, describes, width, bottom + 54 + 24 * len(roofs))
    for value in ticks_log(y_low, y_high):
        d.line(left, y.at(value), right, y.at(value), "grid")
        d.text(
            left - 8, y.at(value) + 5, scaled(value, "").strip().replace(".00", "").replace(".0", ""), "end"
        )
    for value in thinned(ticks_log(x_low, x_high), x, 44):
        d.line(x.at(value), top, x.at(value), bottom, "grid")
        d.text(x.at(value), bottom + 20, f"{value:,g}", "end" if value == x_high else "middle")
    d.line(left, bottom, right, bottom, "axis")
    d.text((left + right) / 2, bottom + 40, "FLOP per byte; upwards FLOP/s", "middle", "soft")
    peak, steepest = max(f.value for f in flats), max(s.value for s in slopes)
    for at, roof in enumerate([*slopes, *flats]):
        style, dash = f"roof s{at % COLOURS}", _DASHES[at % COLOURS]
        if roof.is_bandwidth:
            begin = max(x_low, y_low / roof.value)
            places = [(begin, begin * roof.value), (peak / roof.value, peak)]
        else:
            places = [(max(x_low, roof.value / steepest), roof.value), (x_high, roof.value)]
        d.path([(x.at(a), y.at(b)) for a, b in places], style, dash)
        below = bottom + 66 + 24 * at
        d.line(left - 44, below, left - 14, below, style, dash)
        unit = "B/s" if roof.is_bandwidth else "FLOP/s"
        d.text(left - 4, below + 5, _cut(f"{roof.label}, {scaled(roof.value, unit)}", width - left))
    _place(d, [(x.at(s.intensity), y.at(s.achieved), s) for s in spots], narrow, (left, top, right, bottom))
    return str(d.done())


def _place(
    d: Drawing,
    spots: list[tuple[float, float, Spot]],
    narrow: bool,
    frame: tuple[float, float, float, float],
) -> None:
    """Marks, and beside each its number (and its name where there is room) so that no two labels touch."""
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in spots]
    for px, py, spot in spots:
        d.mark(px, py, "circle", "spot", f"{spot.number} {spot.label}: {scaled(spot.achieved, 'FLOP/s')}")
        wanted = [str(spot.number)] if narrow else [f"{spot.number} {spot.label}", str(spot.number)]
        found = next(_free(px, py, wanted, taken, frame), None)
        if found is None:
            continue
        words, box = found
        taken.append(box)
        d.text(box[0], box[3] - 4, words)


def _free(
    px: float, py: float, wanted: list[str], taken: list[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> Iterator[tuple[str, tuple[float, float, float, float]]]:  # fmt: skip
    for words in wanted:
        w = len(words) * _LETTER + 2
        for far in (1, 2.2, 3.6):
            for dx, dy in ((8, 5), (-8 - w, 5), (-w / 2, -9 * far), (-w / 2, 20 * far), (8, -8 * far), (8, 18 * far),
                           (-8 - w, -8 * far), (-8 - w, 18 * far)):  # fmt: skip
                box = (px + dx, py + dy - FONT + 3, px + dx + w, py + dy + 4)
                inside = (
                    box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
                )
                if inside and not any(_touch(box, other) for other in taken):
                    yield words, box


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def tokens(value: float) -> str:
    """A context length: `512`, `8k`, `1M`, counted in 1,024s where that comes out even."""
    whole = int(value)
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole:,}"


def _tick(value: float, unit: str) -> str:
    text = (
        "0"
        if value == 0
        else seconds(value)
        if unit == "s"
        else scaled(value, unit)
        if unit == "B"
        else digits(value)
    )
    number, _, rest = text.partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {rest}".strip()


def _cut(text: str, width: float) -> str:
    room = int(width / _LETTER)
    return text if len(text) <= room else text[: room - 1] + "…"
