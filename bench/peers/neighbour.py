"""One busy neighbour: a process that keeps a core at work while engines are measured, as other people's jobs do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WORK = "x = 1\nwhile True:\n    x = (x * 48271) % 2147483647\n"


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep one core busy inside the block; the process ends with it, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WORK], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()
