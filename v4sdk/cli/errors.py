"""How an error is shown: what is wrong, and the way out."""

from __future__ import annotations

import click

from v4sdk.errors import V4Error


def show_error(error: V4Error) -> None:
    """Write `error:` and `hint:` lines to stderr."""
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
