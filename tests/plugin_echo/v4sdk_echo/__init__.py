"""The plugin: one hook that names the backend, and one that adds a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from v4sdk import hookimpl

if TYPE_CHECKING:
    from v4sdk.backend import Backend


@hookimpl
def v4sdk_backend() -> type[Backend]:
    """The backend's class, imported only when it is asked for."""
    from .backend import EchoBackend

    return EchoBackend


@hookimpl
def v4sdk_commands(cli: Any) -> None:
    """Add `v4sdk echo`."""

    @cli.command("echo")
    def echo() -> None:
        """Say that the plugin is here."""
        print("echo is here")
