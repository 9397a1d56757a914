"""`v4sdk bench mini`: write the exchangeable checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(short_help="Write v4-mini, one random model in every format, with identical values.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(["native", "bf16", "gguf", "all"]),
    help="May be repeated (default: native and bf16; the others are read from native).",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes everywhere.")
@click.option(
    "--converter", type=click.Path(path_type=Path), metavar="FOLDER",
    help="llama.cpp sources with conversion/ and gguf-py/, for gguf: vendor/llama.cpp of the llama-cpp-python sdist.",
)  # fmt: skip
def mini(folder: Path, kinds: tuple[str, ...], seed: int, converter: Path | None) -> None:
    """Write v4-mini under FOLDER: native/ (FP8 and FP4), bf16/ (its exact dequantisation), v4-mini.gguf.

    935M parameters in the layer pattern of V4. What is written is read back, and every value compared. FOLDER must be new,
    empty, or hold forms of the same seed, which are kept.
    """
    from v4sdk_bench.mini import checkpoint as maker

    named = kinds or ("native", "bf16")
    chosen = maker.KINDS if "all" in named else tuple(kind for kind in maker.KINDS if kind in named)
    missing = maker.missing_kinds(folder, chosen, seed)
    if missing:
        room = sum(maker.needed_bytes(kind) for kind in missing)
        click.echo(f"{', '.join(missing)}: {room / 1e9:.1f} GB in {folder}", err=True)
    found = maker.lay_out(folder, chosen, seed, _Line(), converter=converter)
    for kind, path in found.items():
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))
        click.echo(f"{kind}: {path} ({size:,} bytes{'' if kind in missing else ', kept'})")
    click.echo(f"values: {maker.marker(found['native'])['values']}, the same in every form, each compared")


class _Line:
    """Progress on stderr, in place on a terminal."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        end = "" if self._tty and text else "\n"
        click.echo(f"\r\x1b[K{text}" if self._tty else text, nl=bool(end), err=True)
