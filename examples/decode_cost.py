"""Decode a few tokens of a checkpoint of any size and say what each cost: seconds, and bytes of the files it touched.

    python examples/decode_cost.py FOLDER --tokens 4

Weights stay in their files and are read as they are used, so a mixture of experts touches a small part of them.
Random ids are decoded with the reference ops; no tokenizer is needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from v4sdk.checkpoint import Checkpoint
from v4sdk.errors import V4Error
from v4sdk.kv_cache import KVCache
from v4sdk.memory import gigabytes, plan_memory
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.weights import WeightSource


def touched_bytes(folder: Path) -> int:
    """Bytes of this folder's files that this process has read through its mappings."""
    total, inside, root = 0, False, str(folder.resolve())
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = root in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def peak_bytes() -> int:
    """The most memory this process has held at once, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Open, decode, report."""
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4)
    arguments = parser.parse_args()
    try:
        with Checkpoint(arguments.folder) as checkpoint, torch.inference_mode():
            decode(checkpoint, arguments.tokens)
    except V4Error as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


def decode(checkpoint: Checkpoint, num_tokens: int) -> None:
    """Decode `num_tokens` tokens one at a time and print a line for each."""
    config = checkpoint.config
    plan = plan_memory(
        config,
        mapped_bytes=checkpoint.nbytes,
        resident_bytes=0,
        context_tokens=num_tokens,
        kv_format="native",
    )
    print(plan.render())
    started = time.perf_counter()
    block = config.quantization.block if config.quantization else (128, 128)
    model = V4Model(Binder(config, WeightSource(checkpoint, block)), FAST)
    print(
        f"bound in {time.perf_counter() - started:.2f} s, {gigabytes(touched_bytes(checkpoint.folder))} touched"
    )
    cache = KVCache(config, "native")
    row, g = cache.allocate(), torch.Generator().manual_seed(0)
    for position in range(num_tokens):
        token = int(torch.randint(config.vocab_size, (), generator=g))
        before, started = touched_bytes(checkpoint.folder), time.perf_counter()
        logits = model.logits(model.forward(cache.batch([row], [[token]], [position]), cache))
        elapsed = time.perf_counter() - started
        if not bool(torch.isfinite(logits).all()):
            raise V4Error(f"logits at position {position} are not finite")
        total = touched_bytes(checkpoint.folder)
        print(
            f"token {position}: {elapsed:.2f} s, {gigabytes(total - before)} new, {gigabytes(total)} touched in all"
        )
    print(f"peak memory {gigabytes(peak_bytes())}, most of it file pages the system can drop")


if __name__ == "__main__":
    sys.exit(main())
