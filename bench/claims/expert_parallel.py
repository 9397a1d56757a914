"""Does exchanging rows in waves, while experts compute, gain time over exchanging first and computing then? Ours against ours.

    python -m v4sdk_bench.claims.expert_parallel --processes 2

One mixture-of-experts layer with FP4 weights of one seed; every process has its own tokens and a share of the experts. The two
schedules are checked bit by bit against one process first; then they run in turns in the same processes. What is printed is no
published ratio: those compare fused kernels on accelerators. Two cores that compute and move the rows as well gain little; the
second row shows what overlap is for, over a link that is emulated by waiting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4sdk import plugins
from v4sdk.errors import V4Error
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.speed import timing
from v4sdk_bench.stage import Bench, BenchError, Stage, now

if TYPE_CHECKING:
    from v4sdk_bench.claims.expert_parallel_rank import Load

PREFIX = "claims/expert-parallel/"
PROCESSES = (2, 4)
TOKENS, QUICK_TOKENS = 256, 64
_LIMITS = {"unequal_elements": 0.0}
# starting the processes, drawing the experts and checking them
_START_S = 120.0
_NAMES = {"gloo": "gloo", "emulated-link": "emulated link"}


def bound(compute_s: float, transfer_s: float, waves: int) -> float:
    """The most that waves can gain: all of the shorter part hides behind the longer one, but for one wave of it."""
    together = max(compute_s, transfer_s) + min(compute_s, transfer_s) / waves
    return (compute_s + transfer_s) / together


def what(link: str, processes: int) -> str:
    """The name of a row."""
    over = _NAMES[link] if link == "gloo" else f"{_NAMES[link]} on gloo"
    return f"wave overlap vs our sequential exchange ({over}, {processes} processes)"


def command(load: Load) -> str:
    """What reproduces a row."""
    return (
        f"python -m v4sdk_bench.claims.expert_parallel --processes {load.processes} --tokens {load.tokens} --seed {load.seed} "
        f"--backend {load.backend}"
    )


def measure(load: Load, scratch: Path) -> dict[str, Any]:
    """Start the processes and wait for what they find.

    Raises:
        BenchError: with what the first of them said, if one fails or they do not end in time.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        folder = Path(made)
        result, errors = folder / "result.json", [folder / f"{rank}.err" for rank in range(load.processes)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        processes = []
        try:
            for rank, path in enumerate(errors):
                line = [
                    sys.executable,
                    "-m",
                    "v4sdk_bench.claims.expert_parallel_rank",
                    str(rank),
                    json.dumps(asdict(load)),
                ]
                with path.open("wb") as err:
                    processes.append(
                        subprocess.Popen(
                            [*line, str(folder / "meeting"), str(result)], stderr=err, stdout=err, env=environ
                        )
                    )
            _wait(processes, errors, _START_S + 4 * load.budget_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _wait(processes: list[subprocess.Popen[bytes]], errors: list[Path], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        failed = next((r for r, p in enumerate(processes) if p.poll() not in (None, 0)), None)
        if failed is not None or time.monotonic() > end:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll() is None and all(p.poll() in (None, 0) for p in processes):
            raise BenchError(f"rank {rank} of {len(processes)} did not end within {seconds:.0f} s")
        if process.poll():
            said = errors[rank].read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise BenchError(
                f"rank {rank} of {len(processes)} ended with status {process.poll()}: {said[-1] if said else 'it said nothing'}"
            )


def rows(found: dict[str, Any], load: Load, evidence: Any, seconds: float) -> Iterator[Row]:
    """The rows of one measurement; a wrong result has no speed."""
    for link in _NAMES:
        setting: dict[str, Value] = {**load.setting(), "backend": load.backend, "transport": "gloo"}
        values: dict[str, Value] = {"unequal_elements": found["unequal"]}
        note = "a layer of FP4 experts, each process with its own tokens; a: sequential, b: waves"
        if link == "emulated-link":
            setting |= {
                "link": "emulated link",
                "link_bytes_per_s": load.bandwidth_bytes_per_s,
                "link_latency_s": load.latency_s,
            }
            note += (
                f"; emulated link of {load.bandwidth_bytes_per_s / 1e6:g} MB/s each way and {load.latency_s * 1e3:g} ms: "
                "a transfer is held back until it would have been done"
            )
        if not found["unequal"]:
            part = found[link]
            pair = timing.judge([(a, b, c) for a, b, c in part["rounds"]], *part["cpu_s"])
            most = bound(part["compute_s"], part["transfer_s"], load.waves)
            verdict = pair.verdict
            if pair.ratio > most:
                # more than overlap can give is something else: cores that were shared, or a neighbour
                verdict = f"no verdict: {pair.ratio:.2f} is above what overlap could give, {most:.2f}"
            values |= pair.values() | {
                "compute_s": part["compute_s"],
                "transfer_s": part["transfer_s"],
                "bound_ratio": most,
                "verdict": verdict,
            }
            note += f"; {verdict}; overlap could give at most {most:.2f}"
            cores = os.cpu_count() or 1
            if load.processes >= cores:
                # then waiting for a core is part of every time, and waves shorten that too
                note += f" if each process had cores to itself, but {load.processes} share {cores}"
        yield Row(
            f"{PREFIX}{link}/{load.processes}", what(link, load.processes), judged(values, _LIMITS), evidence, values,
            _LIMITS, setting, note, command(load), load.seed, seconds, now(),
        )  # fmt: skip


def stage(bench: Bench) -> Iterator[Row]:
    """Both numbers of processes, as far as the budget goes."""
    from v4sdk_bench.claims.expert_parallel_rank import Load

    tokens = QUICK_TOKENS if bench.quick else TOKENS
    base = Load(backend=bench.backend.name, tokens=tokens, seed=bench.seed, least=5 if bench.quick else 15)
    for processes in PROCESSES:
        load = replace(base, processes=processes, budget_s=3.0 if bench.quick else 30.0)
        keys = [f"{PREFIX}{link}/{processes}" for link in _NAMES]
        if not any(bench.wants(key) for key in keys):
            continue
        why = _obstacle(bench, processes)
        if why:
            yield from (
                not_run(key, what(link, processes), why, command=command(load))
                for key, link in zip(keys, _NAMES, strict=True)
            )
            continue
        bench.say(f"expert parallelism, {processes} processes")
        start = time.monotonic()
        found = measure(load, bench.scratch)
        yield from rows(found, load, bench.backend.evidence, round(time.monotonic() - start, 1))


def _obstacle(bench: Bench, processes: int) -> str:
    if bench.backend.device.type != "cpu":
        return f"each process needs a {bench.backend.device.type} device of its own; measured between processes on the CPU only"
    # that long it takes to start, draw and check, before the first round
    return "" if bench.left() > 5 * processes else "the budget of this stage is used up"


STAGE = Stage("claims/expert-parallel", stage, 45, 300)


@click.command()
@click.option("--processes", type=click.IntRange(2, 64), default=2, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=TOKENS, show_default=True, help="Of each process.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600),
    default=20.0,
    show_default=True,
    help="For the rounds of each link.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--backend", default="cpu", show_default=True)
def main(processes: int, tokens: int, seconds: float, seed: int, backend: str) -> None:
    """Print the rows as a table."""
    from v4sdk_bench.claims.expert_parallel_rank import Load

    load = Load(backend=backend, processes=processes, tokens=tokens, seed=seed, budget_s=seconds)
    start = time.monotonic()
    evidence = plugins.select(backend).evidence
    found = measure(load, Path(tempfile.gettempdir()))
    failed = False
    for row in rows(found, load, evidence, round(time.monotonic() - start, 1)):
        failed |= row.state == "failed"
        click.echo(f"\n{row.what}: {row.state}")
        for name, value in row.values.items():
            click.echo(f"  {name:22} {value:.4g}" if isinstance(value, float) else f"  {name:22} {value}")
        with suppress(KeyError):
            click.echo(
                f"  {'link':22} {row.setting['link_bytes_per_s']} bytes/s, {row.setting['link_latency_s']} s"
            )
    sys.exit(int(failed))


if __name__ == "__main__":
    try:
        main()
    except V4Error as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(1)
