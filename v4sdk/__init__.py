"""v4sdk: run DeepSeek V4 checkpoints. The public names load what they need on first use, so importing v4sdk is cheap."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from v4sdk.errors import V4Error

if TYPE_CHECKING:
    from v4sdk.hookspecs import hookimpl
    from v4sdk.session import Piece, Result, SamplingParams, Sequence, Session

__version__ = "0.1.0"

__all__ = ["Piece", "Result", "SamplingParams", "Sequence", "Session", "V4Error", "__version__", "hookimpl"]

# torch would import every vendor's extension that is installed, and fail with one that does not load; here a backend
# loads its own when it is chosen
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# torch takes most of a second to import; `v4sdk --help` and plugin discovery must not pay for it
_HOMES = {
    "Piece": "v4sdk.session",
    "Result": "v4sdk.session",
    "SamplingParams": "v4sdk.session",
    "Sequence": "v4sdk.session",
    "Session": "v4sdk.session",
    "hookimpl": "v4sdk.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `v4sdk` has no attribute `{name}`")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
