"""Converts a checkpoint folder to integer matrices that a device multiplies by itself, and says what the rounding cost.

The source is read and the target written one tensor at a time. The target appears under its name when it is complete.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.encodings import IntegerLayout
from v4sdk.errors import CheckpointError
from v4sdk.headers import INDEX_NAME
from v4sdk.hub import SMALL_FILES
from v4sdk.memory import gigabytes
from v4sdk.progress import OnProgress, Progress, silent
from v4sdk.tensors import TensorSpec, expected_tensors

# written anew; all other small files of a folder are the same for every form of its weights
_OWN_FILES = frozenset(("config.json", INDEX_NAME))
_COMPANIONS = (*SMALL_FILES, "LICENSE*")
_WORDS = {
    "F8_E4M3": "FP8 E4M3", "I8": "FP4 E2M1", "BF16": "BF16", "F32": "float32",
    "int8": "INT8", "int4": "INT4", "float": "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Rounding:
    """What happened to the matrices of one kind.

    Attributes:
        before, after: how they are stored. matrices: how many. unchanged: those that kept every value.
        largest, mean: relative error of a matrix, |stored - given| / |given| over all of its values.
        worst: the matrix with the largest.
    """

    before: str
    after: str
    matrices: int
    unchanged: int
    largest: float
    mean: float
    worst: str


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        source_bytes, target_bytes: of all tensors. roundings: by how matrices were stored before and are now.
    """

    folder: Path
    layout: IntegerLayout
    source_bytes: int
    target_bytes: int
    roundings: tuple[Rounding, ...]


def convert(
    source: str | Path, target: str | Path, layout: IntegerLayout, on_progress: OnProgress = silent
) -> Conversion:
    """Write the model in `source` as folder `target`: integers where the layout says so, all else float (BF16, or float32).

    Raises:
        CheckpointError: if the source is not whole or already converted, if the target exists, or cannot be written.
        ConfigError: if the layout does not fit the model's shapes.
    """
    target = Path(target)
    check_target(target)
    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
        if config.integers:
            raise CheckpointError(
                f"`{source}` is already converted, to layout `{config.integers.name}`",
                hint="convert the checkpoint that it was made from: integers of integers would round twice",
            )
        wanted = replace(unquantised(config), integers=layout)
        total = sum(spec.nbytes for spec in _kept(wanted, checkpoint))
        _check_room(target, total)
        tally = _Tally(checkpoint, total, on_progress)
        try:
            written = _write(Path(source), target, wanted, FloatTensors(config, checkpoint), tally)
        except OSError as exc:
            raise CheckpointError(
                f"`{target}` cannot be written: {exc.strerror}", hint="name a folder on a disk with room"
            ) from None
        return Conversion(target, layout, checkpoint.nbytes, written, tally.roundings())


def _write(source: Path, target: Path, config: ModelConfig, tensors: FloatTensors, tally: _Tally) -> int:
    # beside the target, so that the last step is a rename
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder = staging / "folder"
        written = write_checkpoint(folder, config, tensors, on_shard=tally.shard, on_rounded=tally.rounded)
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                name = file.relative_to(source)
                if file.is_file() and str(name) not in _OWN_FILES:
                    (folder / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, folder / name)
        check_target(target)
        folder.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return written


def check_target(target: Path) -> None:
    """Refuse a place that cannot become a converted folder.

    Raises:
        CheckpointError: if something is there, or the folder around it is missing.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            f"`{target}` exists, and a conversion overwrites nothing",
            hint="name a folder that does not exist",
        )
    if not target.parent.is_dir():
        raise CheckpointError(
            f"`{target}` cannot be written: folder `{target.parent}` does not exist",
            hint="make it first, or name another",
        )


def _check_room(target: Path, total: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if total > free:
        raise CheckpointError(
            f"`{target}` takes {gigabytes(total)}, but `{target.parent}` has {gigabytes(free)} free",
            hint="name a folder on another disk",
        )


def _kept(config: ModelConfig, checkpoint: Checkpoint) -> list[TensorSpec]:
    absent = checkpoint.binding.absent_blocks
    return [spec for spec in expected_tensors(config) if spec.block not in absent]


class _Tally:
    """Counts bytes and errors while the writer works."""

    def __init__(self, checkpoint: Checkpoint, total: int, on_progress: OnProgress) -> None:
        self._checkpoint, self._total, self._report = checkpoint, total, on_progress
        self._done = self._of_shard = 0
        self._errors: dict[tuple[str, str], list[tuple[float, str]]] = {}

    def shard(self, name: str, num_bytes: int) -> None:
        """A file is complete."""
        self._done, self._of_shard = self._done + num_bytes, 0
        self._say()

    def rounded(self, spec: TensorSpec, given: Tensor, stored: Tensor) -> None:
        """A matrix is stored with other values than it was given."""
        given = given.float()
        size = float(given.norm())
        error = float((stored.float() - given).norm()) / size if size else 0.0
        kind = _WORDS[self._checkpoint.headers.tensors[spec.name].dtype], _WORDS[spec.encoding]
        self._errors.setdefault(kind, []).append((error, spec.name))
        self._of_shard += spec.nbytes
        self._say()

    def _say(self) -> None:
        done = (self._done + self._of_shard) // 10**6
        self._report(Progress("convert", done, max(1, self._total // 10**6), "MB"))

    def roundings(self) -> tuple[Rounding, ...]:
        """By kind, in order of appearance."""
        found = []
        for (before, after), errors in self._errors.items():
            sizes = [error for error, _ in errors]
            largest, worst = max(errors)
            found.append(
                Rounding(
                    before, after, len(errors), sizes.count(0.0), largest, sum(sizes) / len(sizes), worst
                )
            )
        return tuple(found)
