"""Starts Python processes by forking one that has imported torch and v4sdk already: real processes, without seconds of importing.

A line of JSON on stdin starts one: `script` (Python source, or "" for the command `v4sdk`), `argv`, `environ`, and the files
`out`, `err` and `status`. Its pid is the answer on stdout; when it has ended, its exit status is what `status` says. At the end
of stdin all that still runs is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Forked:
    """One process; used as a `subprocess.Popen` is."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status

    def poll(self) -> int | None:
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), seconds)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks the others."""

    def __init__(self) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
        )

    def start(
        self, script: str, argv: list[str], environ: dict[str, str], out: Path, err: Path, status: Path
    ) -> Forked:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        files = {"out": str(out), "err": str(err), "status": str(status)}
        asked = {"script": script, "argv": argv, "environ": environ, **files}
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        self._server.stdin.flush()
        return Forked(int(self._server.stdout.readline()), status)

    def close(self) -> None:
        self._server.communicate()


def _serve() -> dict[str, Any] | None:
    """Fork what is asked for; what to run in the child, None in the server when stdin has ended."""
    running: dict[int, str] = {}
    unread = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return None
            unread += data
        while b"\n" in unread:
            line, _, unread = unread.partition(b"\n")
            asked: dict[str, Any] = json.loads(line)
            pid = os.fork()
            if not pid:
                return asked
            running[pid] = asked["status"]
            os.write(1, b"%d\n" % pid)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                path = running.pop(pid)
                Path(path + ".part").write_text(str(os.waitstatus_to_exitcode(status)))
                os.replace(path + ".part", path)


def _become(asked: dict[str, Any]) -> None:
    os.setsid()
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.argv = asked["argv"]


if __name__ == "__main__":
    import torch.distributed  # noqa: F401

    import v4sdk.cli.run
    import v4sdk.cli.serve
    import v4sdk.session

    if (child := _serve()) is not None:
        _become(child)
        if child["script"]:
            exec(compile(child["script"], "script", "exec"), {"__name__": "__main__"})
        else:
            v4sdk.cli.main()
