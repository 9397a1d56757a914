"""The parts of a drawing: an SVG under construction, axes, and where their ticks stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from xml.etree import ElementTree as ET

FONT = 14


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    log: bool
    start: float
    length: float

    def at(self, value: float) -> float:
        """Place of a value in the drawing."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + self.length * share


class Drawing:
    """An SVG under construction, with the name and description a screen reader says."""

    _numbers = count(1)

    def __init__(self, title: str, describes: str, width: float, height: float) -> None:
        number = next(self._numbers)
        self.root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {width:g} {height:g}",
                "role": "img",
                "aria-labelledby": f"t{number} d{number}",
                "font-size": str(FONT),
                "class": "chart",
                "style": f"max-width:{width * 1.2:g}px",
            },
        )
        ET.SubElement(self.root, "title", {"id": f"t{number}"}).text = title
        ET.SubElement(self.root, "desc", {"id": f"d{number}"}).text = describes

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str, dash: str = "") -> None:
        """A straight line."""
        names = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        ET.SubElement(self.root, "line", {k: f"{v:.1f}" for k, v in names.items()} | _drawn(style, dash))

    def path(self, places: Sequence[tuple[float, float]], style: str, dash: str = "") -> None:
        """A line through places."""
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        ET.SubElement(self.root, "polyline", {"points": text, "fill": "none"} | _drawn(style, dash))

    def text(self, x: float, y: float, words: str, anchor: str = "start", style: str = "ink") -> None:
        """One line of text."""
        where = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": style}
        ET.SubElement(self.root, "text", where).text = words

    def mark(self, x: float, y: float, kind: str, style: str, says: str = "") -> None:
        """A point; `says` is shown when it is pointed at."""
        r = 4.5
        shapes = {
            "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
            "triangle": [(0, -r - 1), (r + 1, r), (-r - 1, r)],
            "diamond": [(0, -r - 1.5), (r + 1.5, 0), (0, r + 1.5), (-r - 1.5, 0)],
            "cross": [(-r, -r), (r, r), (0, 0), (-r, r), (r, -r)],
        }
        if kind in shapes:
            points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
            found = ET.SubElement(
                self.root,
                "polyline" if kind == "cross" else "polygon",
                {"points": points, "class": f"mark {style}"},
            )
        else:
            found = ET.SubElement(
                self.root,
                "circle",
                {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{r:g}", "class": f"mark {style}"},
            )
        if kind in ("ring", "cross"):
            found.set("class", f"mark hollow {style}")
        if says:
            ET.SubElement(found, "title").text = says

    def done(self) -> str:
        """The text of the drawing."""
        return ET.tostring(self.root, encoding="unicode")


def _drawn(style: str, dash: str) -> dict[str, str]:
    return {"class": style} | ({"stroke-dasharray": dash} if dash else {})


def padded(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low / 2, high * 2)


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around a range."""
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**begin, 10.0 ** max(end, begin + 1)


def nice(high: float) -> float:
    """A round number a little above."""
    step = 10.0 ** math.floor(math.log10(high))
    return next(step * k for k in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15) if step * k >= high * 1.02)


def ticks(high: float) -> list[float]:
    """At most six round numbers from 0."""
    step = 10 ** math.floor(math.log10(high))
    each = next(step * k for k in (0.2, 0.25, 0.5, 1, 2) if high / (step * k) <= 5.01)
    return [i * each for i in range(int(high / each + 1e-6) + 1)]


def ticks_log(low: float, high: float) -> list[float]:
    """At most eight powers of ten."""
    begin, end = round(math.log10(low)), round(math.log10(high))
    each = max(1, math.ceil((end - begin) / 7))
    return [10.0**e for e in range(begin, end + 1, each)]


def thinned(values: Sequence[float], axis: Axis, room: float) -> list[float]:
    """Those whose labels do not touch, the last one first."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or axis.at(kept[-1]) - axis.at(value) >= room:
            kept.append(value)
    return kept
