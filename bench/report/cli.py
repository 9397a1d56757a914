"""`v4sdk bench report`: records in, one report out, on the terminal, as Markdown or as one HTML page."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from v4sdk.errors import V4Error

if TYPE_CHECKING:
    from v4sdk_bench.report.page import Page

_STDOUT = "-"
# a file that begins so was written by this command and may be written again
_MARK = "v4sdk bench report"
_HEAD_BYTES = 2000


class OutputError(V4Error):
    """A report cannot be written where it was asked for."""

    way_out = "name another file"


@click.command(short_help="Put records side by side: terminal, Markdown, one HTML page.")
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECORD...")
@click.option(
    "--html", is_flag=False, flag_value="", metavar="[FILE]", help="One self-contained page; `-` is stdout."
)
@click.option(
    "--markdown", is_flag=False, flag_value="", metavar="[FILE]", help="The same as Markdown; `-` is stdout."
)
@click.option("--all", "whole", is_flag=True, help="Every row on the terminal, folded tables too.")
@click.option(
    "--strict", is_flag=True, help="Exit code 1 if a row failed or something could not be compared."
)
@click.option("--force", is_flag=True, help="Replace an output that this command did not write.")
def report(
    records: tuple[Path, ...], html: str | None, markdown: str | None, whole: bool, strict: bool, force: bool
) -> int:
    """Report one or more RECORDs that `v4sdk bench run` wrote, the first being what the others are compared with.

    Rows are compared only where setting and model are the same and both sides are right; everything else is listed with
    the reason. Without FILE, --html and --markdown (which then come last) write beside a single record, or
    v4sdk-bench-report.html and .md here.
    """
    from v4sdk_bench.report import verdicts
    from v4sdk_bench.report.build import page
    from v4sdk_bench.report.sources import load

    wanted = {"html": html, "md": markdown}
    places = {suffix: _place(given, suffix, records) for suffix, given in wanted.items() if given is not None}
    if list(places.values()).count(None) > 1:
        raise OutputError("--html and --markdown both go to stdout", hint="give one of them a file")
    for place in places.values():
        if place is not None:
            _check(place, force)
    sources, notes = load(records)
    made, refused = page(sources, notes, shlex.join(["v4sdk", *sys.argv[1:]]))
    for suffix, place in places.items():
        _write(place, _renderer(suffix)(made))
    if None not in places.values():
        from v4sdk_bench.report import terminal

        for note in notes:
            click.echo(f"note: {note}", err=True)
        terminal.render(made, whole=whole)
    return int(strict and bool(refused or any(verdicts.failed(source) for source in sources)))


def _renderer(suffix: str) -> Callable[[Page], str]:
    if suffix == "html":
        from v4sdk_bench.report import html

        as_html: Callable[[Page], str] = html.render
        return as_html
    from v4sdk_bench.report import markdown

    return lambda made: f"<!-- {_MARK} -->\n{markdown.render(made)}"


def _place(given: str, suffix: str, records: Sequence[Path]) -> Path | None:
    """The file to write, None for stdout.

    Raises:
        OutputError: if it would replace a record.
    """
    if given == _STDOUT:
        return None
    option = "--markdown" if suffix == "md" else "--html"
    if not given:
        return (
            records[0].with_suffix(f".{suffix}")
            if len(records) == 1
            else Path(f"v4sdk-bench-report.{suffix}")
        )
    place = Path(given)
    if place.suffix == ".json" or any(_same(place, record) for record in records):
        raise OutputError(
            f"`{option} {given}` would write a page over a record",
            hint=f"name the page, {option} {place.stem}.{suffix}, or put {option} last to have it named",
        )
    return place


def _same(one: Path, two: Path) -> bool:
    return one.exists() and two.exists() and one.samefile(two)


def _check(place: Path, force: bool) -> None:
    if place.is_dir():
        raise OutputError(f"`{place}` is a folder, expected a file")
    if not place.parent.is_dir():
        raise OutputError(
            f"the folder of `{place}` does not exist", hint=f"mkdir -p {shlex.quote(str(place.parent))}"
        )
    if place.exists() and not force:
        try:
            with place.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as exc:
            raise OutputError(f"cannot read `{place}`: {exc.strerror}") from exc
        if head and _MARK.encode() not in head:
            raise OutputError(
                f"`{place}` exists and is no report", hint="name another file, or --force to replace it"
            )


def _write(place: Path | None, text: str) -> None:
    # a record may hold half of a surrogate pair, which no encoding has
    raw = text.encode("utf-8", "replace")
    if place is None:
        click.echo(raw, nl=False)
        return
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        aside.write_bytes(raw)
        os.replace(aside, place)
    except OSError as exc:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write `{place}`: {exc.strerror}") from exc
    click.echo(f"report: {place}", err=True)
