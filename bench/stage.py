"""What a suite is made of: stages that yield rows. A run that was cut off goes on at the first stage that is not finished."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from v4sdk.backend import Backend
from v4sdk.errors import V4Error
from v4sdk_bench.record import Record, Row

# why a row was not run where a stage's budget was short: a run without --quick, or of this row alone, has the time for it
OUT_OF_TIME = "the time of this stage was used up"


class BenchError(V4Error):
    """A benchmark was asked for something it cannot do."""

    way_out = "v4sdk bench run --help describes the options"


@dataclass
class Bench:
    """What a stage gets to know about its run.

    Attributes:
        backend: what is measured. record: what was found so far; a stage that measures speed reads the verdicts there first.
        quick: small budgets, frontiers up to 8,192 tokens. seed: of everything random.
        model: checkpoint folder of the whole-model suites; None is the bundled v4-nano.
        scratch: a folder that disappears after the run; big files go there. cache: a folder that stays (made checkpoints).
        peers: engine name to the Python that has it installed.
        golden: folder of golden activations, None if there is none. only: key prefixes that are wanted; empty is all.
        say: one line of progress, replaced by the next.
    """

    backend: Backend
    record: Record
    scratch: Path
    cache: Path
    quick: bool = False
    seed: int = 0
    model: Path | None = None
    peers: dict[str, str] = field(default_factory=dict)
    golden: Path | None = None
    only: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        # whatever a row says of a device rests on the device's own name, whichever suites are run
        if self.record.device is None and self.backend.evidence == "device":
            found = self.backend.identity()
            self.record.device = None if found is None else dict(found)

    def left(self) -> float:
        """Seconds left of this stage's budget; a stage that has none left stops early and says what it skipped."""
        return self.deadline - time.monotonic()

    def wants(self, key: str) -> bool:
        """Whether rows of this key, or under it, were asked for; lets a stage leave the others out."""
        return not self.only or any(key.startswith(p) or p.startswith(key) for p in self.only)

    def command(self, key: str) -> str:
        """The shell command that measures the row of a key again, with everything this run chose that its value depends on."""
        threads = self.record.options.get("threads")
        words = ["v4sdk", "bench", "run", "--suite", key.partition("/")[0], "--backend", self.backend.name]
        words += ["--quick"] if self.quick else []
        words += ["--model", str(self.model)] if self.model else []
        words += ["--threads", str(threads)] if threads else []
        words += ["--seed", str(self.seed)] if self.seed else []
        return shlex.join([*words, "--only", key])

    def wrong(self, prefix: str) -> Row | None:
        """A row under `prefix` that failed: whatever it stands for has no speed."""
        return next((row for row in self.record.under(prefix) if row.state == "failed"), None)


@dataclass(frozen=True)
class Stage:
    """A resumable part of a suite.

    Attributes:
        name: `suite/part`. run: yields rows; may raise `V4Error`, which breaks this stage only.
        quick_s, full_s: seconds it may take. emulated_s: without --quick, where the backend only emulates its device.
    """

    name: str
    run: Callable[[Bench], Iterator[Row]]
    quick_s: float
    full_s: float
    emulated_s: float | None = None

    def budget_s(self, quick: bool, backend: Backend) -> float:
        """Seconds it may take on this backend."""
        if self.emulated_s is not None and not quick and backend.evidence == "emulated":
            return self.emulated_s
        return self.quick_s if quick else self.full_s

    @property
    def suite(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
