"""The model that engines are compared on, in every format that can be had here."""

from __future__ import annotations

import shutil
from pathlib import Path

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.errors import V4Error
from v4sdk.loading import bundled_folder
from v4sdk.tensors import expected_tensors
from v4sdk_bench.mini import checkpoint as mini
from v4sdk_bench.peers.lanes import Forms
from v4sdk_bench.stage import Bench

# copies in other formats are made of models up to this size
_LARGEST_BYTES = 6_000_000_000


def forms_of(bench: Bench) -> Forms:
    """The model to compare on, in every format that can be had.

    Raises:
        MiniError: if v4-mini cannot be made, or a named model is too large to be copied.
    """
    if bench.model is not None:
        root = bench.model.resolve().parent
        if mini.marker(bench.model) and mini.marker(mini.paths(root)["native"]):
            return _mini_forms(root, bench)
        return _copied(bench.model.resolve(), bench.model.resolve().name, bench)
    if bench.quick:
        return _copied(bundled_folder(), "v4-nano", bench)
    for kind in ("native", "bf16"):
        mini.cached(bench.cache, kind, bench.seed, bench.say)
    return _mini_forms(bench.cache / f"v4-mini-{bench.seed}", bench)


def _mini_forms(root: Path, bench: Bench) -> Forms:
    where = mini.paths(root)
    seed = int(str(mini.marker(where["native"]).get("seed", bench.seed)))
    if not mini.is_whole(root, "bf16", seed):
        mini.lay_out(root, ("bf16",), seed, bench.say)
    has_gguf = mini.is_whole(root, "gguf", seed)
    shown = str(root).replace(str(Path.home()), "~", 1)
    recipe = (
        f"there is no {mini.GGUF_NAME}: v4sdk bench mini {shown} --kind gguf --converter vendor/llama.cpp"
    )
    return Forms(
        "v4-mini",
        where["native"],
        where["bf16"],
        where["gguf"] if has_gguf else None,
        "" if has_gguf else recipe,
    )


def _copied(native: Path, name: str, bench: Bench) -> Forms:
    """Any other model: its exact dequantisation is written to the scratch folder."""
    config = ModelConfig.from_folder(native)
    size = sum(spec.nbytes for spec in expected_tensors(unquantised(config)))
    free = shutil.disk_usage(bench.scratch).free
    if size > min(_LARGEST_BYTES, free):
        raise mini.MiniError(
            f"{name} takes {size / 1e9:.1f} GB as BF16, expected at most {min(_LARGEST_BYTES, free) / 1e9:.1f}",
            hint="leave --model out: then engines are compared on v4-mini",
        )
    floats = bench.scratch / f"{name}-floats"
    bench.say(f"{name}: writing its exact dequantisation")
    try:
        with Checkpoint(native) as checkpoint:
            write_checkpoint(floats, unquantised(config), FloatTensors(config, checkpoint))
    except V4Error as exc:
        raise mini.MiniError(f"{name} cannot be copied: {exc.message}", exc.hint) from exc
    return Forms(
        name, native, floats, None, f"{name} has no GGUF: a full run compares on v4-mini, which has one"
    )
