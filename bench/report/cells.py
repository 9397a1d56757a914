"""Rows of a record as cells: state, values, intervals, and the speed that a wrong result does not get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from v4sdk_bench.record import SPEED_ENDINGS, Row
from v4sdk_bench.report.compare import Joined, Line, ends, withheld, wrong_below
from v4sdk_bench.report.numbers import ABSENT, finite, interval, name_of, show
from v4sdk_bench.report.page import Cell, Table, Tone, unique
from v4sdk_bench.report.sources import Source

TONES: dict[str, Tone] = {"ok": "good", "failed": "bad", "info": "", "not run": "mute"}
# ends of intervals and plain counts stand beside the value they belong to
_ENDS = ("low", "high", "noise", "verdict", "rounds")
MISSING = Cell(ABSENT, "mute")


def state(row: Row) -> Cell:
    """The state in words, the note below."""
    words = {"ok": "within limits", "failed": "failed", "info": "no limit", "not run": "not run"}
    return Cell(words[row.state], TONES[row.state], row.note)


def value(row: Row, name: str) -> Cell:
    """One value, coloured red only if it breaks its own limit."""
    found = row.values.get(name)
    return MISSING if found is None else Cell(show(name, found), _broken(row, name), numeric=True)


def _broken(row: Row, name: str) -> Tone:
    if row.state != "failed":
        return ""
    share = limit_share(row, name)
    return "bad" if share is not None and not share <= 1 else ""


def limit_share(row: Row, name: str) -> float | None:
    """How much of its limit a value uses up; above 1 it is broken. None without a limit.

    For a limit from below, of a share that is 1 at best, it is the distance to 1.
    """
    for key, limit in row.limits.items():
        if key.removeprefix(">=") != name:
            continue
        found = row.values.get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found:
            return float("inf")
        if key.startswith(">="):
            gone, room = 1 - found, 1 - limit
            return gone / room if room > 0 else (0.0 if found >= limit else float("inf"))
        return found / limit if limit > 0 else (0.0 if found <= limit else float("inf"))
    return None


def worst_share(rows: Iterable[Row]) -> float | None:
    """The largest share of a limit among rows, None if none has a limit."""
    names = [(row, key.removeprefix(">=")) for row in rows for key in row.limits]
    return max((s for row, name in names if (s := limit_share(row, name)) is not None), default=None)


def speed(source: Source, row: Row, name: str) -> Cell:
    """A speed with its interval, or why there is none."""
    why = withheld(source, row)
    if row.state == "not run":
        return Cell("not run", "mute", row.note)
    if why is not None:
        return Cell("no speed", "bad" if _is_wrong(source, row) else "warn", why)
    found = finite(row.values.get(name))
    if found is None:
        return MISSING
    low, high = ends(row, name)
    return Cell(show(name, found), note=interval(name, low, high) if low < high else "", numeric=True)


def _is_wrong(source: Source, row: Row) -> bool:
    return row.state == "failed" or wrong_below(source, row) is not None


def speeds(source: Source, row: Row, names: Sequence[str]) -> tuple[Cell, ...]:
    """Several of them; the reason why there is none is said once."""
    if withheld(source, row) is None:
        return tuple(speed(source, row, name) for name in names)
    return (speed(source, row, names[0]), *(MISSING for _ in names[1:]))


def is_speed(name: str) -> bool:
    """Whether a value may not be told beside a wrong result."""
    return name.endswith(SPEED_ENDINGS)


def facts(source: Source, row: Row, most: int = 12) -> str:
    """All values of a row in one line, ends of intervals folded into their value; no speed beside a wrong result."""
    silent = withheld(source, row) is not None
    said = []
    for name, found in row.values.items():
        parts = name.split("_")
        if (
            found is None
            or (silent and is_speed(name))
            or any(end in parts for end in _ENDS[:2])
            or name in _ENDS
        ):
            continue
        low, high = ends(row, name) if name.endswith("_s") and not name.endswith("_per_s") else (0.0, 0.0)
        beside = f" ({interval(name, low, high)})" if low < high else ""
        said.append(f"{name_of(name)} {show(name, found)}{beside}")
    more = len(said) - most
    return "; ".join(said[:most]) + (f"; and {more} more" if more > 0 else "")


def plain(source: Source, row: Row) -> Cell:
    """A row that no other table understands: its word or values, then the rest of them and the note."""
    told, why = facts(source, row), withheld(source, row)
    silent = f"no speed: {why}" if why and row.state not in ("failed", "not run") else ""
    word = str(row.values.get("verdict") or {"ok": "within limits", "info": ""}.get(row.state, row.state))
    note = "; ".join(
        part for part in (told if word else "", row.note if row.note != word else "", silent) if part
    )
    return Cell(word or told or "no value", TONES[row.state], note)


def by_record(
    caption: str, joined: Joined, lines: Sequence[Line], pick: Callable[[Source, Row], Cell], subject: str = "what",
    note: str = "", folded: bool = False,
) -> Table:  # fmt: skip
    """A table with one column per record."""
    rows = [
        (
            Cell(line.what, note=line.key),
            *(
                pick(joined.source(label), line.rows[label]) if label in line.rows else MISSING
                for label in joined.labels
            ),
        )
        for line in lines
    ]
    columns = (subject, *headings(joined))
    return Table(caption, columns, tuple(rows), commands(lines), note, "stack", folded)


def headings(joined: Joined) -> list[str]:
    """Column heads: the label alone says little, so the backend stands beside it."""
    if len(joined.sources) == 1:
        return ["found"]
    return [f"{source.label}: {source.backend}" for source in joined.sources]


def commands(lines: Iterable[Line]) -> tuple[str, ...]:
    """What reproduces them, each once."""
    found: tuple[str, ...] = unique(command for line in lines for command in line.commands)
    return found


def each(joined: Joined, lines: Iterable[Line]) -> list[tuple[Line, Source, Row]]:
    """Every row of every line with its record."""
    return [(line, joined.source(label), row) for line in lines for label, row in line.rows.items()]


def tag(joined: Joined, source: Source) -> tuple[Cell, ...]:
    """The cell that names the record where there are several."""
    return (Cell(source.label, note=source.backend),) if len(joined.sources) > 1 else ()


def tag_column(joined: Joined) -> tuple[str, ...]:
    """Its heading."""
    return ("record",) if len(joined.sources) > 1 else ()
