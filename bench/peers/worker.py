"""The worker's side of the line protocol: one engine in one process, run by the Python that has that engine.

    PYTHON worker.py ADAPTER.py SCRATCH

Needs numpy and the engine, nothing of v4sdk. One JSON object per line comes in on stdin, one goes out for each:

    {"do": "load", "model": PATH, "threads": N, "options": {...}}  ->  {"version", "settings", "seconds", ...}
    {"do": "prefill", "ids": [...], "every": BOOL, "save": NAME}    ->  {"seconds", "cpu_s", "peak_bytes", "logits"}
    {"do": "decode", "ids": [...], "save": NAME}                    ->  {"seconds": [...], "cpu_s", "peak_bytes", "logits"}
    {"do": "quit"}

Prefill starts from an empty state and gives the logits after the last token, or after every one. Decode feeds the given ids
one by one and gives the logits after each. Logits go to SCRATCH/NAME as float32 .npy where `save` asks for them; the clock
stops before they are written. An error of the engine is an answer too: {"error": TEXT}.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Engine(Protocol):
    """What an adapter file defines under the name `Engine`."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Load a model; gives at least `version`, and the settings that the engine really uses."""

    def prefill(self, ids: list[int], every: bool) -> Logits:
        """Read a prompt into an empty state: logits [n, V], or [1, V] of the last token."""

    def decode(self, token: int) -> Logits:
        """Read one more token: logits [1, V]."""


def adapter(path: Path) -> Engine:
    """The engine that a file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine: Engine = module.Engine()
    return engine


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def answer(engine: Engine, ask: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Carry out one line."""
    wall, cpu = time.perf_counter(), time.process_time()
    if ask["do"] == "load":
        about = engine.load(ask["model"], ask["threads"], ask["options"])
        return about | {"seconds": time.perf_counter() - wall, "peak_bytes": peak_bytes()}
    if ask["do"] == "prefill":
        logits = engine.prefill(ask["ids"], ask["every"])
        found: dict[str, Any] = {"seconds": time.perf_counter() - wall}
    elif ask["do"] == "decode":
        rows, seconds = [], []
        for token in ask["ids"]:
            begun = time.perf_counter()
            rows.append(engine.decode(token))
            seconds.append(time.perf_counter() - begun)
        logits, found = np.concatenate(rows), {"seconds": seconds}
    else:
        raise ValueError(f"`{ask['do']}` is no request")
    found |= {"cpu_s": time.process_time() - cpu, "peak_bytes": peak_bytes(), "logits": None}
    if ask.get("save"):
        path = scratch / ask["save"]
        np.save(path, np.asarray(logits, dtype=np.float32))
        found["logits"] = str(path)
    return found


def main() -> None:
    """Answer lines until there are no more."""
    # engines print; the pipe carries answers only, everything else goes where errors go
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # the folder of this script would shadow modules of the engine
    sys.path.pop(0)
    scratch = Path(sys.argv[2])
    engine: Engine | None = None
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "quit":
            return
        try:
            engine = engine or adapter(Path(sys.argv[1]))
            found = answer(engine, ask, scratch)
        except Exception as exc:  # whatever an engine raises is the answer
            found = {"error": " ".join(f"{type(exc).__name__}: {exc}".split())[:500]}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
