"""Time from typing `v4sdk run` to the first token, beside the time of importing torch: `python -m v4sdk_bench.speed.first_token`.

The two are measured in turns, so that whatever else the machine does falls on both. The figure is the median difference.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LIMIT_S = 1.0
PROMPT = "What is 347 + 285?"
_IMPORT = [sys.executable, "-c", "import torch"]
_RUN = [sys.executable, "-m", "v4sdk", "run", "--json"]


def time_import() -> float:
    """Seconds that `import torch` takes in a process of its own."""
    began = time.perf_counter()
    subprocess.run(_IMPORT, check=True)
    return time.perf_counter() - began


def time_first_token(prompt: str) -> float:
    """Seconds from the start of the process to its first token, of reasoning or of the answer."""
    began = time.perf_counter()
    with subprocess.Popen(
        [*_RUN, prompt], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if '"reasoning"' in line or '"content"' in line:
                elapsed = time.perf_counter() - began
                run.stdout.read()
                return elapsed
    raise RuntimeError("`v4sdk run` ended without a token")


def pairs(count: int, prompt: str = PROMPT) -> list[tuple[float, float]]:
    """Seconds of (import, first token), measured in turns; once each before, so that files are in memory."""
    time_import()
    time_first_token(prompt)
    return [(time_import(), time_first_token(prompt)) for _ in range(count)]


def main() -> int:
    """Measure pairs; exit 1 above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    measured = pairs(args.pairs, args.prompt)
    differences = [run - imported for imported, run in measured]
    middle = statistics.median(differences)
    print(f"import torch      {statistics.median(p[0] for p in measured):.2f} s (median of {args.pairs})")
    print(f"first token       {statistics.median(p[1] for p in measured):.2f} s")
    print(
        f"{'ok  ' if middle <= LIMIT_S else 'FAIL'} difference   {middle:.2f} s, from {min(differences):.2f} to "
        f"{max(differences):.2f}, limit {LIMIT_S:.1f} s"
    )
    return int(middle > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
