"""Time and memory at context frontiers: `python -m v4sdk_bench.speed.frontier`.

One load, then one walk: read on to the next frontier, keep a snapshot, decode some tokens there, go back, read on. Frontiers that
nobody would wait for are filled with random rows instead of being read (`synthetic`). The walk runs in a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4sdk_bench.record import Value
from v4sdk_bench.speed.long_context import peak_process_bytes
from v4sdk_bench.speed.timing import Sample, device_seconds, percentile
from v4sdk_bench.stage import BenchError

if TYPE_CHECKING:
    import torch

    from v4sdk import Session
    from v4sdk.engine import Engine
    from v4sdk.sequence import SequenceState

QUICK, FULL = (512, 1024, 2048, 4096, 8192), (512, 2048, 8192, 32_768, 129_024, 131_072)
SYNTHETIC, FULL_SYNTHETIC = (131_072, 1_048_576), (262_144, 524_288, 1_048_576)
PROBE = 32
_MODULE = "v4sdk_bench.speed.frontier"
# one sequence is read, and never goes back further than its own snapshot
_NO_SNAPSHOTS = 1 << 62


@dataclass(frozen=True)
class Walk:
    """What to measure.

    Attributes:
        frontiers: tokens, ascending, really read. synthetic: tokens whose rows are made up. probe: tokens decoded at each.
    """

    backend: str
    model: str | None = None
    frontiers: tuple[int, ...] = QUICK
    synthetic: tuple[int, ...] = SYNTHETIC
    probe: int = PROBE
    numerics: str | None = None
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Frontier:
    """What was found at one context length.

    Attributes:
        prefill_s: of all tokens up to here; first_s: from then to the first token drawn. segment: tokens since the last
            frontier, which took segment_s. steps: seconds of every decoded token.
        kv_bytes: of the cache as allocated, spare rows included; kv_formula_bytes: what the tokens need.
        peak_bytes: the most memory so far, of the process or of the device.
        refused: why there is nothing here, else None. kernel_steps: of steps, on the device's own clock; empty on a host.
    """

    tokens: int
    synthetic: bool
    prefill_s: float = 0.0
    first_s: float = 0.0
    segment: int = 0
    segment_s: float = 0.0
    steps: tuple[float, ...] = ()
    kv_bytes: int = 0
    kv_formula_bytes: int = 0
    peak_bytes: int = 0
    finite: bool = True
    refused: str | None = None
    kernel_steps: tuple[float, ...] = ()

    def values(self) -> dict[str, Value]:
        """As values of a row."""
        steps = Sample(self.steps, 0.0, 0.0)
        found: dict[str, Value] = {
            "tpot_s": steps.median, "tpot_low_s": steps.low, "tpot_high_s": steps.high,
            "tpot_p99_s": percentile(self.steps, 0.99), "steps": len(self.steps), "kv_bytes": self.kv_bytes,
            "kv_formula_bytes": self.kv_formula_bytes, "peak_bytes": self.peak_bytes,
        }  # fmt: skip
        if not self.synthetic:
            found["ttft_s"] = self.prefill_s + self.first_s
            found["prefill_tokens_per_s"] = self.segment / self.segment_s
        if self.kernel_steps:
            found["kernel_tpot_s"] = statistics.median(self.kernel_steps)
        return found


def walk(session: Session, plan: Walk) -> Iterator[Frontier]:
    """Walk a loaded model over its frontiers, the synthetic ones last."""
    from v4sdk.errors import MemoryRefused

    engine = engine_of(session)
    _warm(engine)
    limit = session.context_limit - plan.probe - 1
    yield from _read(engine, session, plan, [n for n in plan.frontiers if n <= limit])
    for tokens in plan.synthetic:
        if tokens > session.context_limit:
            yield Frontier(
                tokens, True, refused=f"the model's context ends at {session.context_limit:,} tokens"
            )
            continue
        try:
            # the last tokens of a full context are those that are decoded
            yield _made_up(engine, session, plan, min(tokens, limit), tokens)
        except MemoryRefused as exc:
            yield Frontier(tokens, True, refused=exc.message)


def engine_of(session: Session) -> Engine:
    """The parts of a session without its turns and texts."""
    from v4sdk.engine import Engine
    from v4sdk.session import PREFILL_CHUNK

    parts = session.loaded
    return Engine(parts.model, parts.cache, parts.backend, PREFILL_CHUNK, _NO_SNAPSHOTS)


def random_ids(session: Session, count: int, seed: int) -> list[int]:
    """Token ids for reading; what they say does not matter to the time."""
    import torch

    random = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(session.config.vocab_size, (count,), generator=random).tolist()
    return found


@dataclass(frozen=True)
class Probe:
    """Decoded tokens: seconds of each step, the same on the device's own clock (none on a host), and whether all
    log-probabilities are numbers."""

    seconds: tuple[float, ...]
    kernel_seconds: tuple[float, ...]
    finite: bool


def probe(engine: Engine, states: Sequence[SequenceState], count: int) -> Probe:
    """Decode `count` tokens of every sequence greedily."""
    import math

    from v4sdk.decode import DecodeStep, Sampler, TokenLogprob
    from v4sdk.sampling import SamplingParams

    greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=True)
    sampler = Sampler(
        [greedy] * len(states), states, [None] * len(states), engine.model.config.vocab_size, engine.cache.device
    )  # fmt: skip
    step: DecodeStep | None = None
    seconds, kernels, tokens = list[float](), list[float](), list[TokenLogprob]()
    device, finite = engine.cache.device, True

    def decode() -> None:
        nonlocal tokens
        assert step is not None
        tokens = engine.decode(step, states)

    for _ in range(count):
        began = time.perf_counter()
        if step is None or step.is_spent:
            step = engine.decode_step(states, sampler)
        if device.type == "cpu":
            decode()
        else:
            kernels += device_seconds(decode, device, 1)
        seconds.append(time.perf_counter() - began)
        finite = finite and all(math.isfinite(t.logprob) for t in tokens)
    return Probe(tuple(seconds), tuple(kernels), finite)


def _warm(engine: Engine) -> None:
    state = engine.new_state()
    state.ids = [0] * 16
    engine.advance([state])
    state.ids.append(0)
    probe(engine, [state], 3)
    engine.free(state)


def _read(engine: Engine, session: Session, plan: Walk, frontiers: Sequence[int]) -> Iterator[Frontier]:
    import torch

    from v4sdk.kv_cache import kv_bytes

    ids = random_ids(session, max(frontiers, default=0), plan.seed)
    state, total = engine.new_state(), 0.0
    for tokens in frontiers:
        before = state.num_cached
        state.ids = ids[:tokens]
        began = time.perf_counter()
        logits = engine.advance([state])
        engine.backend.synchronize()
        read = time.perf_counter()
        first = int(logits[0].argmax())
        first_s = time.perf_counter() - read
        total += read - began
        with torch.inference_mode():
            fixed = engine.cache.snapshot_fixed(state.rows)
        state.ids = [*state.ids, first]
        probed = probe(engine, [state], plan.probe)
        yield Frontier(
            tokens, False, total, first_s, tokens - before, read - began, probed.seconds, engine.cache.nbytes,
            kv_bytes(session.config, tokens, session.kv_format), peak_bytes(engine.cache.device), probed.finite,
            kernel_steps=probed.kernel_seconds,
        )  # fmt: skip
        # entries beyond the frontier are overwritten by what is read next
        with torch.inference_mode():
            engine.cache.restore_fixed(state.rows, fixed)
        state.ids, state.num_cached = ids[:tokens], tokens
    engine.free(state)


def _made_up(engine: Engine, session: Session, plan: Walk, filled: int, tokens: int) -> Frontier:
    import torch

    from v4sdk.kv_cache import kv_bytes
    from v4sdk_bench.speed.synthetic_kv import fill

    state = engine.new_state()
    try:
        with torch.inference_mode():
            fill(engine.cache, state.rows, filled, plan.seed)
        state.ids, state.num_cached = [0] * (filled + 1), filled
        probed = probe(engine, [state], plan.probe)
        return Frontier(
            tokens, True, steps=probed.seconds, kernel_steps=probed.kernel_seconds, kv_bytes=engine.cache.nbytes,
            kv_formula_bytes=kv_bytes(session.config, tokens, session.kv_format),
            peak_bytes=peak_bytes(engine.cache.device), finite=probed.finite,
        )  # fmt: skip
    finally:
        engine.free(state)


def peak_bytes(device: torch.device) -> int:
    """The most memory of the device, or on a host of this process, that was in use at once."""
    if device.type != "cpu":
        import torch

        return int(torch.get_device_module(device).max_memory_allocated(device))
    of_process: int = peak_process_bytes()
    return of_process


@dataclass(frozen=True)
class Loading:
    """How long it took to be ready: `load_s` inside `Session.load`, `start_s` from the start of the process."""

    load_s: float
    start_s: float
    peak_bytes: int


def in_a_process(plan: Walk) -> Iterator[Loading | Frontier]:
    """Walk in a child: the loading first, then each frontier as soon as it is found.

    Raises:
        BenchError: with the child's last words, if it ends without finishing.
    """
    job = json.dumps({"plan": asdict(plan), "started": time.time()})
    # not a pipe: nobody would empty it while the results are read, and a child that says much would stand still
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", _MODULE, "--job", job], stdout=subprocess.PIPE, stderr=said, text=True
        )  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                found = json.loads(line)
                if "load_s" in found:
                    yield Loading(**found)
                else:
                    named: dict[str, Any] = {
                        k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
                    }
                    yield Frontier(**named)
            if child.wait():
                said.seek(0)
                last = said.read().strip().splitlines()[-1:] or ["it said nothing"]
                raise BenchError(
                    f"the walk over the frontiers ended with code {child.returncode}: {last[0]}",
                    hint=f"python -m {_MODULE} --backend {plan.backend} shows the whole of it",
                )
        finally:
            if child.poll() is None:
                child.kill()
            child.communicate()


def _job(text: str) -> None:
    raw = json.loads(text)
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["plan"].items()}
    plan = Walk(**named)
    for found in _measure(plan, raw["started"]):
        print(json.dumps(asdict(found)), flush=True)


def _measure(plan: Walk, started: float) -> Iterator[Loading | Frontier]:
    import torch

    from v4sdk import Session

    if plan.threads:
        torch.set_num_threads(plan.threads)
    began = time.perf_counter()
    with Session.load(plan.model, backend=plan.backend, numerics=plan.numerics) as session:
        load_s = time.perf_counter() - began
        yield Loading(load_s, time.time() - started, peak_bytes(session.loaded.backend.device))
        yield from walk(session, plan)


def main() -> int:
    """Walk and print a table."""
    from v4sdk.errors import V4Error

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder; the bundled model by default")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--numerics", choices=("exact", "reference", "fast"))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=QUICK, metavar="N", help="frontiers that are read"
    )
    parser.add_argument(
        "--synthetic", type=int, nargs="*", default=SYNTHETIC, metavar="N", help="frontiers that are made up"
    )
    parser.add_argument("--probe", type=int, default=PROBE, help="tokens decoded at each frontier")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.job:
            _job(args.job)
            return 0
        model = str(args.model) if args.model else None
        plan = Walk(
            args.backend, model, tuple(sorted(args.tokens)), tuple(sorted(args.synthetic)), args.probe, args.numerics
        )  # fmt: skip
        for found in _measure(plan, time.time()):
            print(_line(found), flush=True)
    except V4Error as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


def _line(found: Loading | Frontier) -> str:
    if isinstance(found, Loading):
        return f"loaded in {found.load_s:.2f} s, peak {found.peak_bytes / 1e6:.0f} MB"
    if found.refused:
        return f"{found.tokens:>9,}  not run: {found.refused}"
    v: dict[str, Any] = found.values()
    first = (
        "     synthetic KV"
        if found.synthetic
        else f"{v['ttft_s']:9.3f} s {v['prefill_tokens_per_s']:7,.0f}/s"
    )
    return (
        f"{found.tokens:>9,}  first token {first}  then {1e3 * v['tpot_s']:.2f} ms ({1e3 * v['tpot_low_s']:.2f} to "
        f"{1e3 * v['tpot_high_s']:.2f})  KV {found.kv_bytes / 1e6:.1f} MB  peak {found.peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
