"""ONNX files of the model: what each holds, whether it fits, what it says about itself, and how it lands on the disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from v4sdk import __version__
from v4sdk.config import ModelConfig
from v4sdk.errors import V4Error
from v4sdk.memory import free_memory, gigabytes
from v4sdk.tensors import expected_tensors
from v4sdk_bench.export.trace import Traced, choices, cut, layer_label

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

# one file of the format holds at most 2 GB; larger weights lie beside it
EXTERNAL_BYTES = 1_500_000_000
PROVIDER = "CPUExecutionProvider"
# of the float32 weights at the same time: as read, with experts stacked, and as written
_COPIES = 3
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ERRORS_ONLY = 3


class ExportError(V4Error):
    """A model cannot be exported, or its file cannot be written."""

    way_out = "v4sdk export-onnx --help describes the options"


@dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
        name: `prefill`, `embed`, `head`, or a block's kind. what: in words.
        inputs, outputs: value names of a traced graph; a file takes those it needs.
        layer: place of a block in the traced chain.
    """

    name: str
    what: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None = None


def require() -> None:
    """Check that the packages are there.

    Raises:
        ExportError: naming those that are missing.
    """
    missing = [f"`{name}`" for name in _NEEDED if find_spec(name) is None]
    if missing:
        is_ = "is" if len(missing) == 1 else "are"
        raise ExportError(f"{' and '.join(missing)} {is_} not installed", hint="pip install 'v4sdk[onnx]'")


def float_bytes(config: ModelConfig) -> int:
    """Bytes of an unquantised configuration's weights in a graph: float32, and int64 tables."""
    return sum(
        math.prod(spec.shape) * (8 if spec.dtypes[0] == "I64" else 4) for spec in expected_tensors(config)
    )


def check_size(name: str, config: ModelConfig, path: Path) -> None:
    """Refuse what cannot be held, before anything is read.

    Args:
        config: of the layers to export, unquantised. path: a file that will be written.

    Raises:
        ExportError: with the bytes needed and those there are.
    """
    size, free = float_bytes(config), free_memory()
    if free is not None and size * _COPIES > free.nbytes:
        raise ExportError(
            f"`{name}` takes {size:,} bytes as float32 and {_COPIES} times that while it is exported, "
            f"expected at most {gigabytes(free.nbytes)} ({free.bound})",
            hint="ONNX files hold float32; run the quantised checkpoint itself, or export a smaller one",
        )
    folder = next(at for at in path.resolve().parents if at.is_dir())
    room = shutil.disk_usage(folder).free
    if size > room:
        raise ExportError(
            f"`{name}` takes {size:,} bytes as float32, expected at most the {room:,} that are free in `{folder}`",
            hint="name a place with more room with --output",
        )


def prefill_part(config: ModelConfig, with_choices: bool = False) -> Part:
    """Ids [T] to logits [T, V]; with choices also what the indexers and routers picked."""
    picked = [name for spec in config.layers for name in choices(spec)] if with_choices else []
    return Part("prefill", "whole prefill", ("token_ids",), ("logits", *picked))


def block_parts(config: ModelConfig, names: Sequence[int], layers: Sequence[int] | None = None) -> list[Part]:
    """The embedding, blocks of a chain of layers (all by default) and the head, each on its own.

    A block takes streams [T, M, N], with hashed routing also `token_ids` [T], and gives streams and what it chose.

    Args:
        names: where each layer of the chain stands in its checkpoint. layers: places in the chain.
    """
    parts = [Part("embed", "token rows in all streams", ("token_ids",), ("streams_0",))]
    for i in range(config.num_hidden_layers) if layers is None else layers:
        spec, name = config.layers[i], layer_label(config.layers[i])
        if any(part.name == name for part in parts):
            name = f"{name}-{names[i]}"
        what = (
            f"layer {names[i]}: {_KINDS[spec.kind]}, {'hashed' if spec.hash_routing else 'learned'} routing"
        )
        outputs = (f"streams_{i + 1}", *choices(spec))
        parts.append(Part(name, what, ("token_ids", f"streams_{i}"), outputs, i))
    last = f"streams_{config.num_hidden_layers}"
    return [
        *parts,
        Part("head", "collapse of the streams, norm and logits", ("token_ids", last), ("logits",)),
    ]


_KINDS: Mapping[str, str] = {
    "swa": "sliding window",
    "csa": "compressed sparse attention",
    "hca": "heavily compressed attention",
}


def model_of(traced: Traced, part: Part) -> ir.Model:
    """Cut a part out of a traced graph, with its description inside."""
    source = traced.source
    model: ir.Model = cut(traced, part.inputs, part.outputs)
    model.producer_name, model.producer_version = "v4sdk", __version__
    opset = model.graph.opset_imports.get("", 0)
    about = {
        "version": __version__,
        "model": source.name,
        "fingerprint": source.fingerprint,
        "numerics": "exact",
        "part": part.name,
        "what": part.what,
        "layers": json.dumps([source.layers[part.layer]] if part.layer is not None else source.layers),
        "tokens": "any" if traced.tokens is None else str(traced.tokens),
        "opset": str(opset),
        "inputs": ",".join(str(value.name) for value in model.graph.inputs),
        "outputs": ",".join(part.outputs),
        "torch": torch.__version__,
    }
    model.metadata_props.update({f"v4sdk.{key}": value for key, value in about.items()})
    return model


def targets(path: Path) -> tuple[Path, Path]:
    """The file of a graph, and the one beside it that takes weights above 1.5 GB."""
    return path, path.with_name(f"{path.name}.data")


def check_target(path: Path, force: bool, may_make: bool = False) -> None:
    """Refuse to overwrite.

    Args:
        may_make: the folder need not be there, `write` makes it.

    Raises:
        ExportError: if a file is there and `force` is not set, or the folder cannot be.
    """
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"`{folder}` is a file, expected a folder", hint="give another --output")
    if not (folder.parent if may_make else folder).is_dir():
        missing = folder.parent if may_make else folder
        raise ExportError(f"folder `{missing}` does not exist", hint=f"mkdir -p {missing}")
    if path.is_dir():
        raise ExportError(
            f"`{path}` is a folder, expected a file", hint=f"for example --output {path}/model.onnx"
        )
    there = next((p for p in targets(path) if p.exists()), None)
    if there is not None and not force:
        raise ExportError(f"`{there}` is already there", hint="--force replaces it; --output names another")


def write(model: ir.Model, path: Path) -> int:
    """Write a graph, check it with `onnx.checker`, and only then move it to its place.

    Returns:
        bytes written.

    Raises:
        ExportError: with the system's reason, for instance a full disk.
    """
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    path, data = targets(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    beside = size > EXTERNAL_BYTES
    try:
        path.parent.mkdir(exist_ok=True)
        ir.save(model, aside, format="protobuf", external_data=data.name if beside else None)
        onnx.checker.check_model(aside, full_check=True)
        os.replace(aside, path)
        if not beside:
            data.unlink(missing_ok=True)
        return path.stat().st_size + (data.stat().st_size if beside else 0)
    except OSError as exc:
        raise ExportError(
            f"cannot write `{path}`: {exc.strerror or exc}", hint="make room, or give another --output"
        ) from exc
    finally:
        aside.unlink(missing_ok=True)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Load a file on onnxruntime's CPU provider, on as many threads as torch uses, none of which spins."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # below that it tells which nodes it could not fold
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])


def evaluate(path: Path, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a file on those of `values` it takes; outputs by name."""
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {given.name: values[given.name].numpy() for given in session.get_inputs()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
