"""A device's own exceptions as ours: one line and a way out instead of a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from v4sdk.backend import Backend
from v4sdk.errors import MemoryRefused, V4Error

_ASKED = re.compile(r"Tried to allocate ([\d.]+ [KMGT]?i?B)")
# what torch raises when the device reports an error of its own; older versions have none of this name
_OF_DEVICE: tuple[type[BaseException], ...] = tuple(
    kind for kind in (getattr(torch, "AcceleratorError", None),) if kind is not None
)


class DeviceFailed(V4Error):
    """The device reported an error in the middle of its work; nothing on it can be trusted from here on."""

    way_out = "start again; v4sdk doctor shows the device, and checks of indices where its backend has them"


@contextmanager
def translated(backend: Backend) -> Iterator[None]:
    """Turn what torch raises about the device into errors of v4sdk.

    Raises:
        MemoryRefused: the device has no room: bytes asked, bytes free, and what to make smaller.
        DeviceFailed: the device reported an error.
    """
    try:
        yield
    except torch.OutOfMemoryError as exc:
        asked, memory = _ASKED.search(str(exc)), backend.memory()
        what = f"{asked[1]} more" if asked else "more memory"
        free = (
            f", {memory.free_bytes / 1e9:.2f} of {memory.total_bytes / 1e9:.2f} GB are free" if memory else ""
        )
        raise MemoryRefused(
            f"backend `{backend.name}` needs {what}{free}",
            hint="load with a smaller context_limit, prefill_chunk or max_batch, or end what else uses the device",
        ) from exc
    except _OF_DEVICE as exc:
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise DeviceFailed(f"backend `{backend.name}` failed: {first}") from exc
    except RuntimeError as exc:
        # extensions of torch raise its plainest error for what a device reports; whose it is, only the backend knows
        said = backend.failure(exc)
        if said is None:
            raise
        raise DeviceFailed(f"backend `{backend.name}` failed: {said}") from exc
