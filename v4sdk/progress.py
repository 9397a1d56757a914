"""What long operations report to a callback: loading, reading a prompt, and notices. Knows nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes:
        kind: `load`, `prefill` and `convert` count `done` of `total` in `unit`; `memory` says in `text`, before loading, what
            will be mapped, resident and cached against what is free; a `notice` is something to know, said once.
    """

    kind: Literal["load", "prefill", "convert", "memory", "notice"]
    done: int = 0
    total: int = 0
    unit: str = ""
    text: str = ""


OnProgress = Callable[[Progress], None]


def silent(report: Progress) -> None:
    """Nobody listens."""
