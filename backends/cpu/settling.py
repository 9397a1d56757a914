"""Mapped weights copied into large pages, which a processor reads faster than the small pages of a file; nothing else changes."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from v4sdk.backend import DoctorRow, Settling
from v4sdk.errors import ConfigError

from .kernels import Library
from .residency_layout import FileMap, file_maps

log = logging.getLogger("v4sdk")
WEIGHTS_VARIABLE = "V4SDK_CPU_WEIGHTS"
_MODES = ("auto", "mapped", "resident")
# moving a mapping to an address of one's choice is Linux's alone
CAN_SETTLE = sys.platform.startswith("linux")
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_USUAL_LARGE_PAGE = 2 << 20
# both ends of a file lie in small pages: a smaller one would gain nothing
_LEAST_LARGE_PAGES = 4
# what one thread copies at a time: so many large pages, none of which two threads ask the system for
_PIECE_LARGE_PAGES = 2
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


class LargePages(Settling):
    """Copies files of weights into anonymous memory of large pages, and puts that where the files are mapped.

    Args:
        threads: that copy: it is the faults of new pages that take the time. demanded_by: see `Settling`.
    """

    def __init__(self, threads: int, demanded_by: str | None) -> None:
        self.demanded_by = demanded_by
        self.least_bytes = 0 if demanded_by else _LEAST_LARGE_PAGES * large_page_bytes()
        self._threads = threads

    def settle(self, files: Mapping[Path, Tensor], report: Callable[[int], None]) -> int:
        """Move file after file; the first that cannot be moved, and those behind it, stay mapped."""
        moved = 0
        for path, data in files.items():
            try:
                self._settle(path, data.data_ptr(), data.nbytes, moved, report)
            except OSError as exc:
                log.info("weights stay mapped from `%s` on: %s", path.name, exc)
                return moved
            moved += data.nbytes
        return moved

    def _settle(
        self, path: Path, begin: int, nbytes: int, before: int, report: Callable[[int], None]
    ) -> None:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        where = _map_of(begin, size)
        with _opened(path, where, nbytes) as file:
            new = _reserve(size, begin % large_page_bytes())
            # until every thread is known to have stopped, the memory must not be given to anybody else
            copies: list[Future[int]] = []
            try:
                with ThreadPoolExecutor(self._threads) as pool:
                    try:
                        for at, end in _pieces(new, nbytes):
                            copies.append(pool.submit(_copy, file, begin, new, at, end))
                        done = before
                        for copy in as_completed(copies):
                            done += copy.result()
                            report(done)
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
            except BaseException:
                if all(copy.done() for copy in copies):
                    _libc().munmap(new, size)
                raise
            _replace(begin, new, size, file)


def settling(native: Library | None) -> LargePages | None:
    """What `V4SDK_CPU_WEIGHTS` and this machine say; None leaves weights mapped.

    Raises:
        ConfigError: if the variable has another value than `auto`, `mapped` or `resident`.
    """
    mode = _mode()
    if native is None or not CAN_SETTLE or mode == "mapped":
        return None
    if mode == "auto" and not has_large_pages():
        return None
    return LargePages(native.threads, f"{WEIGHTS_VARIABLE}=resident" if mode == "resident" else None)


def has_large_pages() -> bool:
    """Whether the system gives large pages to memory that asks for them."""
    try:
        return "[never]" not in (_SYSTEM / "enabled").read_text()
    except OSError:
        return False


@cache
def large_page_bytes() -> int:
    """Size of a large page."""
    try:
        return int((_SYSTEM / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return _USUAL_LARGE_PAGE


def weights_row(native: Library | None) -> DoctorRow:
    """Where weights lie."""
    chosen = settling(native)
    large = f"{large_page_bytes() >> 20} MB pages" if has_large_pages() else "small pages"
    if chosen is not None and chosen.demanded_by:
        return DoctorRow("weights", f"copied into {large} at load ({chosen.demanded_by})", ok=True)
    if chosen is not None:
        rule = f"copied into {large} where a model takes at most half of the free memory, else mapped"
        return DoctorRow("weights", rule, ok=True)
    if native is None:
        why = "no kernels to read them faster"
    elif _mode() == "mapped":
        why = f"{WEIGHTS_VARIABLE}=mapped"
    else:
        why = "this system has no large pages, or has them off"
    return DoctorRow("weights", f"mapped from their files ({why})", ok=True)


def _mode() -> str:
    mode = os.environ.get(WEIGHTS_VARIABLE) or "auto"
    if mode not in _MODES:
        raise ConfigError(
            f"{WEIGHTS_VARIABLE} is `{mode}`, expected {', '.join(_MODES[:-1])} or {_MODES[-1]}",
            hint=f"unset {WEIGHTS_VARIABLE} to copy weights where memory is plentiful",
        )
    return mode


def _map_of(begin: int, size: int) -> FileMap:
    """The mapping that is exactly these bytes; anything else is not what a checkpoint has made."""
    for one in file_maps():
        if one.begin == begin and one.end == begin + size and one.offset == 0:
            return one
    raise OSError("it is not one whole mapping of a file")


@contextmanager
def _opened(path: Path, where: FileMap, nbytes: int) -> Iterator[int | None]:
    """The file that is mapped there; None if its name means another by now, or the system hides which it is.

    Raises:
        OSError: if it is that file by its number but not of this size: it was written to, or the number is of another disk.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        now = os.fstat(file)
        same = now.st_ino == where.inode
        # its mapping is not read instead: pages beyond the end of a file that was cut off end the process
        if same and now.st_size != nbytes:
            raise OSError(f"it has {now.st_size:,} bytes by now, {nbytes:,} are mapped")
        yield file if same else None
    finally:
        os.close(file)


def _reserve(size: int, phase: int) -> int:
    """Ask for memory of large pages at an address of this remainder, so that whole large pages can be moved later."""
    libc, large = _libc(), large_page_bytes()
    total = size + 2 * large
    base = libc.mmap(
        None, total, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    if base in (None, _FAILED):
        raise _last_error()
    new: int = -(-base // large) * large + phase
    libc.munmap(base, new - base)
    libc.munmap(new + size, base + total - new - size)
    # a system without large pages refuses the advice; the memory is good all the same
    libc.madvise(new, size, mmap.MADV_HUGEPAGE)
    return new


def _pieces(new: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut [0, nbytes) where large pages of the memory at `new` end."""
    step = _PIECE_LARGE_PAGES * large_page_bytes()
    at, end = 0, min(nbytes, step - new % large_page_bytes())
    while at < nbytes:
        yield at, end
        at, end = end, min(nbytes, end + step)


def _copy(file: int | None, begin: int, new: int, at: int, end: int) -> int:
    """Copy a piece: from the file, which costs no page faults there; else from where it is mapped."""
    if file is None:
        ctypes.memmove(new + at, begin + at, end - at)
        return end - at
    target = memoryview((ctypes.c_char * (end - at)).from_address(new + at)).cast("B")
    done = 0
    while done < end - at:
        count = os.preadv(file, [target[done:]], at + done)
        if not count:
            raise OSError("it has become shorter")
        done += count
    return end - at


def _replace(begin: int, new: int, size: int, file: int | None) -> None:
    """Put the copy where the file is mapped, in one step for every thread."""
    libc = _libc()
    if libc.mremap(new, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, begin) == begin:
        return
    error = _last_error()
    libc.munmap(new, size)
    if file is not None:
        # out of kernel memory the old mapping may be gone already
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        libc.mmap(begin, size, protection, mmap.MAP_PRIVATE | _MAP_FIXED, file, 0)
    raise error


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [pointer, size, number, number, number, ctypes.c_long], pointer
    libc.mremap.argtypes, libc.mremap.restype = [pointer, size, size, number, pointer], pointer
    libc.madvise.argtypes = [pointer, size, number]
    libc.munmap.argtypes = [pointer, size]
    return libc
