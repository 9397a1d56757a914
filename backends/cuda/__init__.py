"""The plugin for NVIDIA GPUs. Its backend is imported when asked for, so that being listed costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4sdk.hookspecs import hookimpl

if TYPE_CHECKING:
    from v4sdk.backend import Backend


@hookimpl
def v4sdk_backend() -> type[Backend]:
    """The backend's class."""
    from .backend import CudaBackend

    return CudaBackend
