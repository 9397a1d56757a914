"""Our side of the line protocol: starts a worker, asks it, and says in words how it failed. See `worker.py` for the lines."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from v4sdk.errors import V4Error

WORKER = Path(__file__).parent / "worker.py"
_LAST_WORDS_BYTES = 4096
# of a library: where a process ends through its own check, this line says why
_TELLING = ("error", "assert", "abort", "killed", "cannot", "failed")


class PeerError(V4Error):
    """A peer engine failed: in its own words, or in ours where it could not speak."""

    way_out = "the engine's own log is in the note; try it by itself with the settings given there"


def environment(threads: int, own_wait: bool = False) -> dict[str, str]:
    """The variables that every engine gets, so that none is favoured and none works while another is measured.

    Args:
        own_wait: leave to the engine how its threads wait, instead of putting them to sleep.
    """
    count = str(threads)
    found = {
        "V4SDK_CPU_THREADS": count, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count, "OMP_DYNAMIC": "FALSE",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    }  # fmt: skip
    return found if own_wait else found | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


class Peer:
    """One worker process. It sleeps on its pipe, using no processor, whenever it is not asked.

    Args:
        name: for messages. adapter: file that defines `Engine`. python: interpreter that has the engine.
        scratch: folder for logits and for what the engine prints. env: beside the variables of this process.
    """

    def __init__(
        self, name: str, adapter: Path, python: str, scratch: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self._scratch = name, scratch
        self._log = scratch / f"{name.replace('/', '-').replace(' ', '_')}.log"
        self._buffer = b""
        # a name is looked up in PATH; a path is meant from here, and the worker starts elsewhere
        command = os.path.abspath(python) if os.sep in python else python
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [command, str(WORKER), str(adapter), str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=log, env={**os.environ, **(env or {})}, cwd=scratch,
                )  # fmt: skip
            except OSError as exc:
                raise PeerError(
                    f"peer {name} cannot be started with `{python}`: {exc.strerror}",
                    hint="give the Python that has the engine: --peer ENGINE=PYTHON",
                ) from exc

    def ask(self, do: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            PeerError: if the engine raises, the process ends, stays silent for `timeout_s`, or says what is no answer. After
                anything but an error of the engine, the process is gone.
        """
        line = json.dumps({"do": do, **fields}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended(do) from None
        found = self._answer(do, time.monotonic() + timeout_s, timeout_s)
        if "error" in found:
            raise PeerError(f"peer {self.name} failed in `{do}`: {found['error']}")
        return found

    def close(self) -> None:
        """End the process: by a request, then by force."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"do": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(10)
            except (BrokenPipeError, ValueError, subprocess.TimeoutExpired):
                self._kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._process.poll() is None:
            # it may be in the middle of something long
            self._kill()
        self.close()

    def _answer(self, do: str, deadline: float, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self._kill()
                    raise PeerError(f"peer {self.name} did not answer `{do}` within {timeout_s:.0f} s")
                more = os.read(pipe, 1 << 16)
                if not more:
                    raise self._ended(do)
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self._kill()
            raise PeerError(f"peer {self.name} answered `{do}` with {line[:60]!r}, expected a JSON object")
        return found

    def _ended(self, do: str) -> PeerError:
        code = self._process.wait()
        try:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            how = f"signal {-code}"
        words = self._last_words()
        return PeerError(f"peer {self.name} ended in `{do}` with {how}{f': {words}' if words else ''}")

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LAST_WORDS_BYTES))
            lines = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
            ]
        telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
        return (telling or lines or [""])[-1][:200]

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
