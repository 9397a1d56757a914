"""The stage `model/peers`: other engines beside ours, on the same tokens, the same weights and the same threads.

First parity: every engine's logits against `exact` of v4sdk. An engine that computes something else is not comparable; its
row says so, and it has no speed. Then the engines take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.tensors import expected_tensors
from v4sdk_bench.mini import checkpoint as mini
from v4sdk_bench.peers.forms import forms_of
from v4sdk_bench.peers.lanes import (
    ENGINES,
    OURS,
    PHASES,
    EngineSpec,
    Forms,
    Lane,
    Phase,
    candidates,
    is_installed,
    our_lane,
    python_of,
)  # fmt: skip
from v4sdk_bench.peers.neighbour import busy_neighbour
from v4sdk_bench.peers.process import PeerError
from v4sdk_bench.peers.rounds import (
    Depth,
    Running,
    Setup,
    Trial,
    choose,
    logits_of,
    running,
    take_turns,
    warm_up,
)  # fmt: skip
from v4sdk_bench.peers.rows import (
    Subject,
    died_row,
    load_row,
    parity_row,
    ratio_row,
    reads_memory,
    skipped_row,
    speed_row,
    with_ceilings,
)  # fmt: skip
from v4sdk_bench.peers.texts import ParityText, bundled_text, is_bundled, random_ids, random_text
from v4sdk_bench.record import Row, not_run
from v4sdk_bench.speed.ceilings import ReadProbe
from v4sdk_bench.stage import Bench, Stage

_CEILING_S = 3.0


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        depths: tokens of prefill, after which is decoded. steps: tokens decoded each time.
        rounds, least: wanted, and fewest that give a row. trial: tokens of a trial, 0 for none.
        beside: tokens of the run beside a busy neighbour, 0 for none.
        prompt, fed: tokens of the parity test on a random model. dialogues: of each task, on the bundled one.
    """

    depths: tuple[int, ...]
    steps: int
    rounds: int
    least: int
    prompt: int
    fed: int
    dialogues: int
    trial: int
    beside: int = 0


QUICK = Plan((128, 512), 8, 3, 3, 192, 8, 1, 0)
FULL = Plan((128, 512, 2048), 16, 5, 3, 672, 32, 4, 512, 512)


def run(bench: Bench) -> Iterator[Row]:
    """Compare, then measure; see the module."""
    if not bench.wants("model/peers"):
        return
    plan = QUICK if bench.quick else FULL
    if bench.backend.device.type != "cpu":
        yield not_run(
            "model/peers", "other engines beside v4sdk", f"the engines compared run on the host, and backend "
            f"`{bench.backend.name}` does not", command="v4sdk bench run --suite model --only model/peers --backend cpu",
        )  # fmt: skip
        return
    try:
        forms = forms_of(bench)
    except mini.MiniError as exc:
        yield not_run("model/peers", "other engines beside v4sdk", f"{exc.message}; {exc.hint}")
        return
    config = ModelConfig.from_folder(forms.native)
    with Checkpoint(forms.native) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    sizes = {
        "parameters": sum(spec.parameters for spec in expected_tensors(config)),
        "fingerprint": fingerprint,
    }
    bench.record.models.setdefault(forms.name, sizes)
    longest = max(*plan.depths, plan.prompt) + max(plan.steps, plan.fed)
    ids = random_ids(config.vocab_size, longest, bench.seed)
    known = is_bundled(forms.native)
    text = bundled_text(bench.backend, plan.dialogues) if known else random_text(ids, plan.prompt, plan.fed)
    setup = Setup(
        bench.scratch, torch.get_num_threads(), ids, lambda engine: python_of(engine, {**bench.peers, OURS: sys.executable})
    )  # fmt: skip
    subject = Subject(
        forms.name, fingerprint, config, bench.backend.evidence, setup.threads, bench.seed, _command(bench)
    )
    yield from _Run(bench, plan, forms, setup, subject, text).rows()


class _Run:
    """One run of the stage."""

    def __init__(
        self, bench: Bench, plan: Plan, forms: Forms, setup: Setup, subject: Subject, text: ParityText
    ) -> None:
        self.bench, self.plan, self.forms, self.setup, self.subject = bench, plan, forms, setup, subject
        self.text = text
        self.chosen: dict[str, dict[Phase, Lane]] = {}
        self.trials: dict[str, list[Trial]] = {}
        # (engine, phase) that computes another model, with its mean KL
        self.wrong: dict[tuple[str, Phase], str] = {}

    def rows(self) -> Iterator[Row]:
        """Everything."""
        began = time.monotonic()
        reference = self._reference()
        yield from self._choose()
        with ExitStack() as stack:
            alive: list[Running] = []
            for engine, by_phase in self.chosen.items():
                lanes = [by_phase["prefill"]]
                lanes += [by_phase["decode"]] if by_phase["decode"] != lanes[0] else []
                for at, lane in enumerate(lanes):
                    try:
                        one = stack.enter_context(running(self.setup, lane, f"{engine}-{at}"))
                        yield from self._compare(one, by_phase, reference)
                        alive.append(one)
                    except PeerError as exc:
                        yield died_row(self.subject, engine, exc)
                        self.chosen[engine] = {}
                        break
            spent = time.monotonic() - began
            self.bench.say(f"loaded and compared in {spent:.0f} s")
            yield from self._speeds([one for one in alive if self._phases(one)])

    def _phases(self, one: Running) -> list[Phase]:
        """What a lane is measured for."""
        engine = one.lane.engine
        mine = self.chosen[engine]
        return [
            phase for phase in PHASES
            if mine.get(phase) == one.lane and (engine, phase) not in self.wrong and (one.lane.feeds or phase == "prefill")
        ]  # fmt: skip

    def _reference(self) -> tuple[Tensor, Tensor]:
        self.bench.say("v4sdk exact: reference logits")
        lane = our_lane(self.forms, self.bench.backend, numerics="exact")
        with running(self.setup, lane, "v4sdk-exact") as exact:
            prefill, decode = logits_of(exact, self.text, "exact")
        assert decode is not None
        return prefill, decode

    def _choose(self) -> Iterator[Row]:
        """Settle on the settings of each engine; a row for each that is not there or does not run."""
        ours = our_lane(self.forms, self.bench.backend)
        self.chosen[OURS] = dict.fromkeys(PHASES, ours)
        context = 256 * -(-(len(self.setup.ids) + 1) // 256)
        for spec in ENGINES:
            if not is_installed(spec, self.setup.python(spec.name)):
                where = self.bench.peers.get(spec.name, "the Python of v4sdk")
                why = f"{spec.module} is not installed for {where}: {spec.recipe}"
                yield skipped_row(self.subject, spec.name, why)
                continue
            lanes = candidates(spec, self.forms, context)
            if not lanes:
                yield skipped_row(self.subject, spec.name, self.forms.no_gguf)
                continue
            yield from self._settle(spec, lanes)

    def _settle(self, spec: EngineSpec, lanes: list[Lane]) -> Iterator[Row]:
        # what is left after the trials has to carry the rounds
        reserve = self.bench.left() * 0.6
        tokens = self.plan.trial
        try:
            self.chosen[spec.name], self.trials[spec.name] = choose(
                self.setup, lanes if tokens else lanes[:1], tokens, self.plan.steps,
                lambda: self.bench.left() >= reserve, self.bench.say,
            )  # fmt: skip
        except PeerError as exc:
            yield died_row(self.subject, spec.name, exc)

    def _compare(
        self, one: Running, by_phase: dict[Phase, Lane], reference: tuple[Tensor, Tensor]
    ) -> Iterator[Row]:
        """Load and parity rows of a lane."""
        engine = one.lane.engine
        self.bench.say(f"{engine}: comparing logits ({one.lane.label})")
        warm_up(one, self.setup.ids[: min(128, self.plan.prompt)])
        found = logits_of(one, self.text, engine)
        yield load_row(self.subject, one, by_phase)
        for phase, want, got in zip(PHASES, reference, found, strict=True):
            if by_phase[phase] != one.lane:
                continue
            row = parity_row(self.subject, self.text, one, phase, want, got)
            if row.state != "ok":
                self.wrong[engine, phase] = row.note
            yield row

    def _speeds(self, lanes: list[Running]) -> Iterator[Row]:
        """Rows of every depth, while there is time."""
        for (engine, phase), why in self.wrong.items():
            yield not_run(
                self.subject.key(engine, phase), f"{engine}: {phase} speed", f"no speed: {why}",
                command=self.subject.command, seed=self.subject.seed,
            )  # fmt: skip
        if not lanes or lanes[0].lane.engine != OURS:
            why = f"nothing is timed, since {OURS} itself has no result to compare with on {self.forms.name}"
            yield skipped_row(self.subject, "all", why)
            return
        before = self._ceilings(lanes)
        probe = ReadProbe(self.bench.backend.device, self.bench.backend.synchronize) if before else None
        last: Depth | None = None
        for depth in self.plan.depths:
            expected = last.round_s(depth, self.plan.steps) if last else 0.0
            rounds = int(min(self.plan.rounds, self._time() / expected)) if expected else self.plan.rounds
            if rounds < self.plan.least or self._time() <= 0:
                yield skipped_row(
                    self.subject, "all", f"{depth:,} tokens: the stage has {max(0.0, self._time()):.0f} s left, "
                    f"{self.plan.least} rounds would take about {self.plan.least * expected:.0f} s", str(depth),
                )  # fmt: skip
                continue
            try:
                found = take_turns(
                    lanes,
                    self.setup.ids,
                    depth,
                    self.plan.steps,
                    rounds,
                    self.bench.say,
                    probe and probe.rate,
                )
            except PeerError as exc:
                dead = next((one for one in lanes if one.peer.name in exc.message), lanes[0])
                yield died_row(self.subject, dead.lane.engine, exc, str(depth))
                lanes = [one for one in lanes if one is not dead]
                if dead.lane.engine == OURS:
                    return
                continue
            last = found
            yield from self._depth_rows(lanes, found, [*before, *self._ceilings(lanes)])
        if last and self.plan.beside:
            yield from self._beside(lanes, last)

    def _beside(self, lanes: list[Running], last: Depth) -> Iterator[Row]:
        """The same comparison with one core busy elsewhere: what spinning threads cost on a shared machine."""
        tokens, expected = self.plan.beside, 2 * last.round_s(self.plan.beside, self.plan.steps)
        if self._time() < self.plan.least * expected:
            why = f"beside a neighbour: the stage has {max(0.0, self._time()):.0f} s left"
            yield skipped_row(self.subject, "all", why, str(tokens), "beside-a-neighbour")
            return
        try:
            with busy_neighbour():
                found = take_turns(
                    lanes, self.setup.ids, tokens, self.plan.steps, self.plan.least, self.bench.say
                )
        except PeerError as exc:
            yield died_row(self.subject, "all", exc, str(tokens), "beside-a-neighbour")
            return
        # the neighbour has its share of the memory: no share of the ceiling is told
        found.neighbours = 1
        yield from self._depth_rows(lanes, found, [])

    def _ceilings(self, lanes: list[Running]) -> list[Any]:
        # before and after the rounds; not at all where no weights come from memory
        needed = any(reads_memory(self.subject.config, one.lane.stored) for one in lanes)
        return with_ceilings(self.bench, _CEILING_S) if needed else []

    def _time(self) -> float:
        left: float = self.bench.left()
        return left - _CEILING_S

    def _depth_rows(self, lanes: list[Running], found: Depth, ceilings: list[Any]) -> Iterator[Row]:
        for phase in PHASES:
            for one, times in zip(lanes, found.times, strict=True):
                if phase not in self._phases(one):
                    continue
                trials = self.trials.get(one.lane.engine, [])
                yield speed_row(self.subject, one, phase, found, times, ceilings, trials)
            if phase in self._phases(lanes[0]):
                for one, times in zip(lanes[1:], found.times[1:], strict=True):
                    if one.lane.engine != OURS and phase in self._phases(one):
                        yield ratio_row(self.subject, one, phase, found, times)


def _command(bench: Bench) -> str:
    parts = ["v4sdk bench run --suite model --only model/peers", f"--threads {torch.get_num_threads()}"]
    parts += ["--quick"] * bench.quick + ([f"--model {bench.model}"] if bench.model else [])
    parts += [f"--peer {engine}={python}" for engine, python in bench.peers.items()]
    return " ".join([*parts, f"--seed {bench.seed}"])


STAGE = Stage("model/peers", run, quick_s=60, full_s=1800)
