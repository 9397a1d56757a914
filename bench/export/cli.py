"""`v4sdk export-onnx`: the model as portable ONNX files. Arguments in, text out; nothing heavy is imported before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from v4sdk_bench.export.trace import Traced
    from v4sdk_bench.export.write import Part

# of logits and streams; how far float32 in another order of summation goes
_CHECK_RELATIVE = 1e-5


@click.command(name="export-onnx", short_help="Write the model as ONNX, and check it on onnxruntime.")
@click.option("--model", metavar="FOLDER", help="Checkpoint folder or hub id (default: v4-nano).")
@click.option(
    "--blocks",
    "what",
    flag_value="blocks",
    help="The embedding, one layer of each kind and the head, a file each.",
)
@click.option(
    "--prefill",
    "what",
    flag_value="prefill",
    default="prefill",
    help="The whole model, ids to logits (default).",
)
@click.option(
    "--tokens",
    type=click.IntRange(2),
    metavar="N",
    help="Only for prompts of N tokens; faster to export (default: any).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; with --blocks, folder (default: MODEL.onnx, MODEL-blocks).",
)
@click.option(
    "--check", is_flag=True, help="Run the files on onnxruntime's CPU provider and compare with v4sdk."
)
@click.option("--seed", default=0, show_default=True, help="Of the ids --check runs.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
def export_onnx(
    model: str | None, what: str, tokens: int | None, output: Path | None, check: bool, seed: int, force: bool
) -> int:
    """Write the model as ONNX in `exact` numerics: float32, one sequence from an empty state.

    \b
    prefill   token_ids [T] int64  ->  logits [T, V]
    a block   streams_i [T, M, N]    ->  streams_i+1, the experts and entries it chose
              (and token_ids, where experts are chosen by them)

    T is open unless --tokens fixes it; memory grows with T squared. Logits of a position do not depend on later tokens, so
    a file of fixed length serves shorter prompts that are filled up with any id. The files describe themselves under
    `v4sdk.*` in their metadata. Weights above 1.5 GB lie beside a file, in FILE.data.

    Exit code 1 if --check finds a difference above a relative 1e-5, or another choice.
    """
    from v4sdk import hub
    from v4sdk.checkpoint import Checkpoint
    from v4sdk.config import ModelConfig
    from v4sdk.loading import bundled_folder
    from v4sdk_bench.export import write as e
    from v4sdk_bench.export.trace import Source, chain, layers_of_each_kind, trace

    e.require()
    # of a hub id the configuration alone, until it is known to fit
    folder = bundled_folder() if model is None else hub.resolve(model, weights=False)
    name, config = "v4-nano" if model is None else folder.resolve().name, ModelConfig.from_folder(folder)
    layers = layers_of_each_kind(config) if what == "blocks" else tuple(range(config.num_hidden_layers))
    small = chain(config, layers)
    parts = e.block_parts(small, layers) if what == "blocks" else [e.prefill_part(small)]
    paths = _paths(name, parts, what == "blocks", output)
    for path in paths.values():
        e.check_target(path, force, may_make=what == "blocks")
    e.check_size(name, small, next(iter(paths.values())))
    _say(f"{name}: {len(layers)} layers, {e.float_bytes(small):,} bytes of weights in float32")
    with Checkpoint(folder if model is None else hub.resolve(model)) as checkpoint:
        source = Source.read(name, checkpoint.fingerprint(), config, checkpoint, layers)
    traced = trace(source, tokens, _say)
    for part in parts:
        _say(f"writing {part.name}")
        size = e.write(e.model_of(traced, part), paths[part.name])
        click.echo(f"{paths[part.name]}  {size:,} bytes  {part.what}")
    return 0 if not check or _agrees(traced, parts, paths, seed) else 1


def _say(text: str) -> None:
    click.echo(text, err=True)


def _paths(name: str, parts: Sequence[Part], is_folder: bool, output: Path | None) -> dict[str, Path]:
    if not is_folder:
        return {parts[0].name: output or Path(f"{name}.onnx")}
    folder = output or Path(f"{name}-blocks")
    return {part.name: folder / f"{part.name}.onnx" for part in parts}


def _agrees(traced: Traced, parts: Sequence[Part], paths: Mapping[str, Path], seed: int) -> bool:
    """Print how far every file is from the references, and say whether all are close."""
    from v4sdk_bench.export.trace import boundary_tokens
    from v4sdk_bench.export.witness import compare, ours, random_ids

    config = traced.source.config
    num_tokens = traced.tokens or boundary_tokens(config)
    _say(f"running {num_tokens} random ids through v4sdk and onnxruntime")
    found = ours(config, traced.source.tensors, random_ids(config, num_tokens, seed))
    agree = True
    for part in parts:
        values = compare(paths[part.name], part, found).values
        shares = {key: value for key, value in values.items() if key.endswith("_equal")}
        close = values["relative_l2"] <= _CHECK_RELATIVE and all(share == 1.0 for share in shares.values())
        agree &= close
        told = [
            f"relative L2 {values['relative_l2']:.1e}",
            f"max-abs {values['max_abs']:.1e} of {values['largest']:.3g}",
        ]
        told += [f"{key.replace('_', ' ')} {share:.1%}" for key, share in shares.items()]
        click.echo(f"{'ok' if close else 'DIFFERS':8}{part.name:12}{', '.join(told)}")
    return agree
