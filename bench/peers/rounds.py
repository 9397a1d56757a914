"""Runs engines: tries their settings in processes of their own, then measures the chosen ones in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v4sdk_bench.peers.lanes import PHASES, Lane, Phase, combined
from v4sdk_bench.peers.process import Peer, PeerError, environment
from v4sdk_bench.peers.texts import ParityText
from v4sdk_bench.speed.timing import load

LOAD_TIMEOUT_S = 300.0
_LEAST_TIMEOUT_S = 60.0
# enough for a layer that has never been touched; an engine this slow has stopped
_SECONDS_PER_TOKEN = 1.0


@dataclass
class Running:
    """A loaded lane.

    Attributes:
        about: what the engine said when it was loaded. cold: seconds of its first prefill and first decoded token, then of the
            second of each, of the same prompt.
    """

    lane: Lane
    peer: Peer
    about: dict[str, Any]
    cold: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def prefill(self, ids: Sequence[int], every: bool = False, save: str | None = None) -> dict[str, Any]:
        """Read a prompt into an empty state."""
        return self._ask("prefill", len(ids), ids=list(ids), every=every, save=save)

    def decode(self, ids: Sequence[int], save: str | None = None) -> dict[str, Any]:
        """Feed tokens one by one."""
        return self._ask("decode", len(ids), ids=list(ids), save=save)

    def _ask(self, do: str, tokens: int, **fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.peer.ask(do, _LEAST_TIMEOUT_S + _SECONDS_PER_TOKEN * tokens, **fields)
        self.peak_bytes = max(self.peak_bytes, int(found["peak_bytes"]))
        return found


@dataclass(frozen=True)
class Setup:
    """What all engines of a stage share.

    Attributes:
        scratch: for logits and logs. threads: of each engine. ids: the tokens everybody reads.
        python: interpreter of an engine by name.
    """

    scratch: Path
    threads: int
    ids: Sequence[int]
    python: Callable[[str], str]


@contextmanager
def running(setup: Setup, lane: Lane, name: str) -> Iterator[Running]:
    """Start a lane and load its model; the process ends with the block."""
    with Peer(
        name, lane.adapter, setup.python(lane.engine), setup.scratch, environment(setup.threads, lane.own_wait)
    ) as peer:  # fmt: skip
        about = peer.ask(
            "load", LOAD_TIMEOUT_S, model=str(lane.model), threads=setup.threads, options=dict(lane.options)
        )
        yield Running(lane, peer, about, peak_bytes=int(about["peak_bytes"]))


def warm_up(run: Running, ids: Sequence[int]) -> None:
    """Fill `run.cold`: the first calls after loading beside the same calls once more."""
    for name in ("cold", "warm"):
        run.cold[f"{name}_prefill_s"] = float(run.prefill(ids)["seconds"])
        if run.lane.feeds:
            run.cold[f"{name}_decode_s"] = float(run.decode([ids[0]])["seconds"][0])


@dataclass(frozen=True)
class Trial:
    """One setting tried: tokens per second of each phase, or what went wrong."""

    lane: Lane
    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    error: str = ""

    def speed(self, phase: Phase) -> float:
        """Tokens per second."""
        return self.prefill_per_s if phase == "prefill" else self.decode_per_s

    def to_json(self) -> dict[str, Any]:
        """As a row keeps it."""
        if self.error:
            return {"setting": self.lane.label, "error": self.error}
        return {
            "setting": self.lane.label,
            "prefill_per_s": self.prefill_per_s,
            "decode_per_s": self.decode_per_s,
        }


def attempt(setup: Setup, lane: Lane, name: str, tokens: int, steps: int) -> Trial:
    """Load one setting in a process of its own and time it shortly; a crash is a result."""
    try:
        with running(setup, lane, name) as run:
            prompt, more = setup.ids[:tokens], setup.ids[tokens : tokens + steps]
            best = min(float(run.prefill(prompt)["seconds"]) for _ in range(2))
            decode = statistics.median(run.decode(more)["seconds"]) if lane.feeds else 0.0
    except PeerError as exc:
        return Trial(lane, error=exc.message)
    return Trial(lane, tokens / best, 1 / decode if decode else 0.0)


def choose(
    setup: Setup, lanes: Sequence[Lane], tokens: int, steps: int, may_go_on: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[dict[Phase, Lane], list[Trial]]:  # fmt: skip
    """Try settings, then the best values of each together; give the fastest for each phase and all that was tried.

    A single candidate is taken as it is. Where time runs out, what was not tried is missing from the list.
    """
    if len(lanes) == 1:
        return dict.fromkeys(PHASES, lanes[0]), []
    trials: list[Trial] = []
    for at, lane in enumerate(lanes):
        if trials and not may_go_on():
            break
        say(f"{lane.engine}: trying {lane.label}")
        trials.append(attempt(setup, lane, f"{lane.engine}-try{at}", tokens, steps))
    for phase in PHASES:
        ran = [(trial.lane, trial.speed(phase)) for trial in trials if not trial.error]
        together = combined(ran)
        new = together is not None and not any(trial.lane == together for trial in trials)
        if together is not None and new and may_go_on():
            say(f"{together.engine}: trying {together.label}")
            trials.append(
                attempt(setup, together, f"{together.engine}-try-{phase}", tokens, steps),
            )
    worked = [trial for trial in trials if not trial.error]
    if not worked:
        raise PeerError(trials[0].error, hint="; ".join(f"{t.lane.label}: {t.error}" for t in trials[1:]))
    return {phase: max(worked, key=lambda t: t.speed(phase)).lane for phase in PHASES}, trials


def logits_of(run: Running, text: ParityText, name: str) -> tuple[Tensor, Tensor | None]:
    """Logits after every token of every prompt, and after each token that is fed; None where an engine takes none."""
    rows = []
    for number, ids in enumerate(text.prompts):
        rows.append(_read(run.prefill(ids, every=True, save=f"{name}-{number}.npy")["logits"]))
    if not run.lane.feeds:
        return torch.cat(rows), None
    run.prefill(text.prompts[-1][: text.split])
    return torch.cat(rows), _read(run.decode(text.fed, save=f"{name}-fed.npy")["logits"])


def _read(path: str) -> Tensor:
    try:
        logits = torch.from_numpy(np.load(path))
    except (OSError, ValueError, TypeError) as exc:
        raise PeerError(f"the logits a peer wrote cannot be read: {exc}") from exc
    Path(path).unlink()
    return logits


@dataclass
class Times:
    """What one lane took at one depth, round by round.

    Attributes:
        prefill: seconds of the whole prompt. decode: median seconds of a token. cpu: processor seconds per token, by phase.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    cpu: dict[Phase, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    def of(self, phase: Phase) -> list[float]:
        """Seconds by phase."""
        return self.prefill if phase == "prefill" else self.decode


@dataclass
class Depth:
    """All rounds at one depth: `times` by place in the line; the first lane runs a second time at the end of each round.

    Attributes:
        neighbours: processes that kept a core busy meanwhile. bandwidth: bytes per second that memory gave before the first
            round and after each; empty where it was not measured.
    """

    tokens: int
    times: list[Times]
    again: Times
    load: float = 0.0
    neighbours: int = 0
    bandwidth: list[float] = field(default_factory=list)

    @property
    def parts(self) -> tuple[str, ...]:
        """The end of a row's key."""
        return (str(self.tokens), *(("beside-a-neighbour",) if self.neighbours else ()))

    def round_s(self, tokens: int, steps: int) -> float:
        """What a round at another depth will take: prefill in proportion, decoding as here."""
        every = [*self.times, self.again]
        read = sum(statistics.median(times.prefill) for times in every) * tokens / self.tokens
        return read + steps * sum(statistics.median(times.decode) for times in every if times.decode)


def take_turns(
    lanes: Sequence[Running], ids: Sequence[int], depth: int, steps: int, rounds: int, say: Callable[[str], None],
    bandwidth: Callable[[], float] | None = None,
) -> Depth:  # fmt: skip
    """Run every lane once per round, A B C A, backwards in every second round.

    Args:
        bandwidth: measures what memory gives at a moment.

    Raises:
        PeerError: if one fails; the others are not measured further at this depth.
    """
    found = Depth(depth, [Times() for _ in lanes], Times())
    line = [*zip(lanes, found.times, strict=True), (lanes[0], found.again)]
    if bandwidth:
        found.bandwidth.append(bandwidth())
    for number in range(rounds):
        for run, times in line if number % 2 == 0 else reversed(line):
            say(f"{depth:,} tokens, round {number + 1} of {rounds}: {run.lane.engine}")
            once(run, times, ids, depth, steps)
        if bandwidth:
            found.bandwidth.append(bandwidth())
    found.load = load()
    return found


def once(run: Running, times: Times, ids: Sequence[int], depth: int, steps: int) -> None:
    """One prefill and the decoding behind it."""
    read = run.prefill(ids[:depth])
    times.prefill.append(float(read["seconds"]))
    times.cpu["prefill"].append(float(read["cpu_s"]) / depth)
    if run.lane.feeds:
        fed = run.decode(ids[depth : depth + steps])
        times.decode.append(statistics.median(fed["seconds"]))
        times.cpu["decode"].append(float(fed["cpu_s"]) / steps)
