"""The compiled kernels: found, loaded once, run from argument blocks at one instruction level by one team of threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from v4sdk.errors import ConfigError, MemoryRefused

LEVEL_VARIABLE = "V4SDK_CPU_LEVEL"
THREADS_VARIABLE = "V4SDK_CPU_THREADS"
AFFINITY_VARIABLE = "V4SDK_CPU_AFFINITY"
# another build of the same sources, e.g. one with sanitizers
LIBRARY_VARIABLE = "V4SDK_CPU_LIBRARY"
# kernels that do nothing: what is left of a step's time is this package's own
EMPTY_LEVEL = "empty"


class Call(ctypes.Structure):
    """One kernel to run: its body, its arguments, and what tells its scratch."""

    _fields_ = (
        ("body", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Entry:
    """A kernel of one level, as the library names it."""

    body: int
    scratch: int | None
    argument_bytes: int


class Recording:
    """What a step called, in order, with everything that must stay alive for calling it again."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.held: list[Any] = []


class Library:
    """The shared library. All numbers it is given are addresses; it checks nothing.

    Args:
        path: of the shared object.
    """

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        self._lib.v4_level.restype = ctypes.c_char_p
        self._lib.v4_run.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._lib.v4_run.restype = ctypes.c_size_t
        found, index = [], 0
        while (name := self._lib.v4_level(index)) is not None:
            found.append(name.decode())
            index += 1
        self.levels: tuple[str, ...] = tuple(name for name in found if name)
        self.known_levels: tuple[str, ...] = tuple(found)
        self._entries: dict[tuple[str, str], Entry] = {}
        self._recording = threading.local()
        self.level = self.levels[0]
        self.threads = 1
        self.affinity: tuple[int, ...] = ()
        # whoever limits the threads of one library in a process means all of them, e.g. a launcher of several processes
        limit = os.environ.get("OMP_NUM_THREADS", "")
        self.set_threads(
            min(_usable_cores(), int(limit)) if limit.isdigit() and int(limit) else _usable_cores()
        )
        self._from_environment()

    def _from_environment(self) -> None:
        if level := os.environ.get(LEVEL_VARIABLE):
            self.set_level(level)
        if threads := os.environ.get(THREADS_VARIABLE):
            self.set_threads(_count(threads))
        if affinity := os.environ.get(AFFINITY_VARIABLE):
            self.set_affinity(_processors(affinity))

    def set_level(self, level: str) -> None:
        """Run the kernels of one instruction level.

        Raises:
            ConfigError: if this processor lacks it.
        """
        if level not in (*self.levels, EMPTY_LEVEL):
            raise ConfigError(
                f"instruction level `{level}` is not available, this processor has {', '.join(self.levels)}",
                hint=f"unset {LEVEL_VARIABLE} to take the best",
            )
        self.level = level

    @contextmanager
    def at_level(self, level: str) -> Iterator[None]:
        """Run another level for a while."""
        before = self.level
        self.set_level(level)
        try:
            yield
        finally:
            self.level = before

    def set_threads(self, count: int) -> None:
        """Resize the team; its threads start with the next kernel."""
        self._lib.v4_threads(count)
        self.threads = count

    @contextmanager
    def at_threads(self, count: int) -> Iterator[None]:
        """Run a team of another size for a while."""
        before = self.threads
        self.set_threads(count)
        try:
            yield
        finally:
            self.set_threads(before)

    def set_affinity(self, processors: Sequence[int]) -> None:
        """Pin team members 1.. to processors, one after another; the caller's thread is left where it is."""
        array = (ctypes.c_int * len(processors))(*processors)
        self._lib.v4_affinity(array, len(processors))
        self.affinity = tuple(processors)

    def entry(self, kernel: str) -> Entry:
        """Look a kernel up at the current level."""
        key = self.level, kernel
        if key not in self._entries:
            body, scratch, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
            if not self._lib.v4_kernel(
                self.level.encode(),
                kernel.encode(),
                ctypes.byref(body),
                ctypes.byref(scratch),
                ctypes.byref(size),
            ):
                raise KeyError(f"level {self.level} has no kernel {kernel}")
            self._entries[key] = Entry(body.value or 0, scratch.value, size.value)
        return self._entries[key]

    @property
    def functions(self) -> ctypes.CDLL:
        """Functions of the library that are no kernels."""
        return self._lib

    def run(self, kernel: str, arguments: ctypes.Structure, *held: object) -> None:
        """Run one kernel now, and note it if a step is being recorded.

        Args:
            held: what the addresses in `arguments` belong to; kept with the recording.
        """
        found = self.entry(kernel)
        if ctypes.sizeof(arguments) != found.argument_bytes:
            raise TypeError(
                f"arguments of `{kernel}` have {ctypes.sizeof(arguments)} bytes, "
                f"the library expects {found.argument_bytes}: it is of another version"
            )
        call = Call(found.body, ctypes.addressof(arguments), found.scratch)
        self._check(self._lib.v4_run(ctypes.byref(call), 1))
        recording: Recording | None = getattr(self._recording, "current", None)
        if recording is not None:
            recording.calls.append(call)
            recording.held.append((arguments, held))

    def record(self) -> Recording:
        """Begin to note calls of this thread; `stop` ends it."""
        recording = Recording()
        self._recording.current = recording
        return recording

    def stop(self) -> None:
        """End the recording."""
        self._recording.current = None

    def replay(self, recording: Recording) -> _Replay:
        """Give a function that runs all noted calls again."""
        return _Replay(self, recording)

    def rest(self) -> None:
        """End the threads and free the scratch; the next kernel makes both again."""
        self._lib.v4_rest()

    @staticmethod
    def _check(short: int) -> None:
        if short:
            raise MemoryRefused(
                f"a kernel needs {short} bytes of scratch, which cannot be had",
                hint="use a smaller prefill chunk",
            )


class _Replay:
    """All calls of a step in one."""

    def __init__(self, library: Library, recording: Recording) -> None:
        self._held = recording.held
        self._array = (Call * len(recording.calls))(*recording.calls)
        self._address, self.num_calls = ctypes.addressof(self._array), len(recording.calls)
        self._run = library._lib.v4_run

    def __call__(self) -> None:
        Library._check(self._run(self._address, self.num_calls))


@cache
def native_library() -> Library | None:
    """The library that was built with the package; None where it was not, or cannot be loaded."""
    named = os.environ.get(LIBRARY_VARIABLE)
    for path in [Path(named)] if named else sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            return Library(path)
        except OSError:
            continue
    return None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise ConfigError(f"{THREADS_VARIABLE} is `{text}`, expected a number of threads from 1 to 1024")
    return int(text)


def _processors(text: str) -> tuple[int, ...]:
    """Processors from a list such as `0,2,4-7`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"{AFFINITY_VARIABLE} is `{text}`, expected processors such as `0,2,4-7`")
        found += range(int(first), int(last or first) + 1)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(found)
    if missing := sorted(set(found) - usable):
        raise ConfigError(
            f"{AFFINITY_VARIABLE} names processor {missing[0]}, this process may use {sorted(usable)}"
        )
    return tuple(found)
