"""The two hooks a plugin may implement, and the marker to do it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    # for the annotation only: a plugin is found and listed without importing torch
    from v4sdk.backend import Backend

hookspec = pluggy.HookspecMarker("v4sdk")
hookimpl = pluggy.HookimplMarker("v4sdk")


@hookspec
def v4sdk_backend() -> type[Backend]:  # type: ignore[empty-body]
    """Return the backend's class.

    Import it inside this function and no vendor library at module level: every installed plugin is imported when backends
    are listed, and two vendors' libraries may not share a process.
    """


@hookspec
def v4sdk_commands(cli: Any) -> None:
    """Add commands to the `v4sdk` command line.

    Args:
        cli: the root `click.Group`.
    """
