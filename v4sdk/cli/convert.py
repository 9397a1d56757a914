"""`v4sdk convert`: rewrites a checkpoint's weights as a device wants them, and prints what that cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from v4sdk import plugins
from v4sdk.cli.stream import ProgressLine
from v4sdk.cli.tables import show_table
from v4sdk.errors import V4Error

if TYPE_CHECKING:
    from v4sdk.conversion import Conversion
    from v4sdk.encodings import IntegerLayout


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "layout",
    metavar="LAYOUT",
    required=True,
    help="A layout of an installed backend; a wrong name lists them.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def convert(source: str, target: Path, layout: str, revision: str | None, as_json: bool) -> None:
    """Write checkpoint SOURCE, a folder or a hub id, to the new folder TARGET, with weights as LAYOUT stores them.

    Values are rounded: the answers of the new folder differ from those of the old one.
    """
    chosen = _layout(layout)
    from v4sdk.conversion import check_target
    from v4sdk.conversion import convert as write
    from v4sdk.hub import resolve

    # before a long download
    check_target(target)
    progress = ProgressLine()
    try:
        found = write(resolve(source, revision, progress), target, chosen, progress)
    finally:
        progress.clear()
    if as_json:
        plain = asdict(found) | {"folder": str(found.folder)}
        click.echo(json.dumps(plain))
    else:
        _show(found)


def _layout(name: str) -> IntegerLayout:
    known = plugins.convert_targets()
    if name not in known:
        listed = ", ".join(f"`{one}` (backend {backend})" for one, (backend, _) in known.items()) or "none"
        close = get_close_matches(name, known, n=1, cutoff=0.5)
        raise V4Error(
            f"layout `{name}` is unknown, installed backends have {listed}",
            hint=f"did you mean `{close[0]}`?" if close else "v4sdk convert SOURCE TARGET --for LAYOUT",
        )
    return known[name][1]


def _show(found: Conversion) -> None:
    rows = [
        [
            f"{r.before} to {r.after}", f"{r.matrices:,}", f"{r.unchanged:,}", f"{r.largest:.2e}", f"{r.mean:.2e}",
            r.worst.removesuffix(".weight") if r.largest else "",
        ]
        for r in found.roundings
    ]  # fmt: skip
    columns = ("matrices", "count", "unchanged", "largest error", "mean error", "largest in")
    show_table(columns, rows, "relative error of each matrix's values")
    click.echo(
        f"{found.folder}: {found.target_bytes:,} bytes of tensors, from {found.source_bytes:,}; layout {found.layout.name}"
    )
    click.echo("values were rounded: compare answers with those of the source before relying on them")
