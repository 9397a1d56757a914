"""Memory and agreement at long context: `python -m v4sdk_bench.speed.long_context`.

Every measurement is a process of its own, so that its peak resident size is its own. Prints what the KV formula says
beside what was measured, and how far two chunk sizes differ in exact numerics. Minutes of work; shows progress. The suite `model`
of `v4sdk bench run` measures the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from v4sdk_bench.stage import BenchError

_MIB = 1 << 20
SHORT, LONG = 16_384, 131_072
CHUNKS = (512, 1000)
RSS_SLACK_BYTES = 64_000_000
WORKSPACE_LIMIT_BYTES = 512_000_000
CHUNK_LIMIT = 1e-4


def measure(
    model: str | None, num_tokens: int, numerics: str | None, chunk: int | None, logits: Path | None,
    backend: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read `num_tokens` random tokens in this process and report peak memory; optionally keep the last logits."""
    import torch

    from v4sdk import Session
    from v4sdk.kv_cache import kv_bytes

    options: dict[str, Any] = {"prefill_chunk": chunk} if chunk else {}
    with Session.load(model, backend=backend, numerics=numerics, **options) as session:
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(0, session.config.vocab_size, (num_tokens,), generator=generator).tolist()
        before, began = peak_process_bytes(), time.perf_counter()
        last = session.logits(ids, positions=[num_tokens - 1])
        elapsed = time.perf_counter() - began
        if logits:
            torch.save(last, logits)
        return {
            "tokens": num_tokens, "numerics": session.numerics.name, "kv_format": session.kv_format, "chunk": chunk,
            "elapsed_s": elapsed, "rss_before_bytes": before, "rss_peak_bytes": peak_process_bytes(),
            "kv_bytes": kv_bytes(session.config, num_tokens, session.kv_format),
            "kinds": sorted({layer.kind for layer in session.config.layers}), "index_topk": session.config.index_topk,
        }  # fmt: skip


def peak_process_bytes() -> int:
    """The most memory that this process held at once.

    Not `ru_maxrss` where the system tells better: that starts from the memory of whoever started the process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(
    model: str | None, num_tokens: int, numerics: str | None, chunk: int | None, logits: Path | None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr), backend: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run `measure` in a process of its own, so that the peak is its own.

    Raises:
        BenchError: if it fails.
    """
    job = json.dumps([model, num_tokens, numerics, chunk, str(logits) if logits else None, backend])
    say(f"reading {num_tokens:,} tokens ({numerics or 'default numerics'}, chunk {chunk or 'default'}) ...")
    done = subprocess.run(
        [sys.executable, "-m", "v4sdk_bench.speed.long_context", "--job", job],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(
            f"reading {num_tokens:,} tokens ended with code {done.returncode}",
            hint=f"python -m v4sdk_bench.speed.long_context --job '{job}' shows why",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(f"  {found['elapsed_s']:.0f} s, peak {found['rss_peak_bytes'] / _MIB:.0f} MiB")
    return found


def growth(short: dict[str, Any], long: dict[str, Any]) -> tuple[int, int, float]:
    """Peak memory from the short to the long context: (measured, by the KV formula, limit)."""
    formula = long["kv_bytes"] - short["kv_bytes"]
    return long["rss_peak_bytes"] - short["rss_peak_bytes"], formula, 1.1 * formula + RSS_SLACK_BYTES


def workspace(run: dict[str, Any]) -> int:
    """Memory beside weights and KV rows while a prompt was read."""
    return int(run["rss_peak_bytes"] - run["rss_before_bytes"] - run["kv_bytes"])


def chunk_difference(runs: Sequence[Path]) -> float:
    """Relative L2 of the last logits of two runs."""
    import torch

    one, two = (torch.load(path, weights_only=True).double() for path in runs)
    return float((one - two).norm() / two.norm())


def main() -> int:
    """Run all measurements; exit 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder; the bundled model by default")
    parser.add_argument("--tokens", type=int, nargs=2, default=(SHORT, LONG), metavar=("SHORT", "LONG"))
    parser.add_argument("--no-chunks", action="store_true", help="leave out the two exact runs")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        model, num_tokens, numerics, chunk, logits, backend = json.loads(args.job)
        found = measure(model, num_tokens, numerics, chunk, Path(logits) if logits else None, backend)
        print(json.dumps(found))
        return 0
    short, long = (in_a_process(args.model, n, None, None, None) for n in args.tokens)
    grown, formula, limit = growth(short, long)
    workspaces = [workspace(run) for run in (short, long)]
    span = f"peak RSS({long['tokens']:,}) - peak RSS({short['tokens']:,})"
    kinds = f"{', '.join(long['kinds'])}; {long['index_topk']}"
    rows = [
        (span, _mb(grown), _mb(limit), grown <= limit),
        ("KV formula for the difference", _mb(formula), "", True),
        (f"layer kinds; picks of {long['tokens'] // 4:,} entries", kinds, "", True),
    ]
    for run, used in zip((short, long), workspaces, strict=True):
        fits = used <= WORKSPACE_LIMIT_BYTES
        rows.append((f"workspace at {run['tokens']:,}", _mb(used), _mb(WORKSPACE_LIMIT_BYTES), fits))
    record: dict[str, Any] = {"runs": [short, long]}
    if not args.no_chunks:
        rows.append(_compare_chunks(args.model, args.tokens[1], record))
    for name, value, allowed, ok in rows:
        print(f"{'ok  ' if ok else 'FAIL'} {name:52} {value:>16} {'limit ' + allowed if allowed else ''}")
    if args.json:
        from v4sdk_bench.machine import machine

        args.json.write_text(json.dumps({"about": machine(), **record}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(ok for *_, ok in rows) else 1


def _compare_chunks(model: str | None, num_tokens: int, record: dict[str, Any]) -> tuple[str, str, str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{chunk}.pt" for chunk in CHUNKS]
        for chunk, path in zip(CHUNKS, paths, strict=True):
            record["runs"].append(in_a_process(model, num_tokens, "exact", chunk, path))
        error = chunk_difference(paths)
    record["chunk_relative_l2"] = error
    name = f"exact, last logits, chunks of {CHUNKS[0]} and {CHUNKS[1]:,}"
    return name, f"{error:.1e}", f"{CHUNK_LIMIT:.0e}", error <= CHUNK_LIMIT


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / _MIB:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
