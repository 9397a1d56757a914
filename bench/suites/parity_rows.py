"""What the stages of the parity suite share: how a row is made, judged and reproduced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from v4sdk.backend import Evidence
from v4sdk.loading import bundled_folder
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.stage import Bench

NUMERICS = ("exact", "reference", "fast")
_NO_TIME = "the stage's time was used up: run it alone with --only, or without --quick"


def judged_row(
    bench: Bench, key: str, what: str, values: Mapping[str, Value], limits: Mapping[str, float], note: str = "",
    evidence: Evidence | None = None, **setting: Value,
) -> Row:  # fmt: skip
    """A judged row of this run.

    Args:
        evidence: what computed it, where that is not the backend under test.
    """
    state = judged(values, limits)
    return Row(
        key,
        what,
        state,
        evidence or bench.backend.evidence,
        values,
        limits,
        setting,
        note,
        bench.command(key),
        bench.seed,
    )


def late_row(bench: Bench, key: str, what: str) -> Row | None:
    """The row that says a part was left out, where no time is left."""
    return not_run(key, what, _NO_TIME, command=bench.command(key)) if bench.left() <= 0 else None


def model_folder(bench: Bench) -> Path:
    """Folder of the model the suite runs."""
    return bench.model or bundled_folder()


def model_name(bench: Bench) -> str:
    """Its name in settings."""
    return bench.model.resolve().name if bench.model else "v4-nano"


def slug(text: str) -> str:
    """Words as a part of a key."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
