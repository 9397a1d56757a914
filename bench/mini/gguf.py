"""A GGUF of v4-mini, by llama.cpp's own converter where its sources are at hand; every value is compared afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, write_checkpoint
from v4sdk.errors import V4Error
from v4sdk_bench.peers.formats import gguf_config


class MiniError(V4Error):
    """v4-mini cannot be made here."""

    way_out = "v4sdk bench mini --help describes the options"


def require_converter(converter: Path | None) -> Path:
    """Give the folder if it holds llama.cpp's converter.

    Raises:
        MiniError: with the recipe.
    """
    recipe = (
        "pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36, unpack it, and give its vendor/llama.cpp "
        "with --converter"
    )
    if converter is None:
        raise MiniError("a GGUF needs llama.cpp's converter, and none was named", hint=recipe)
    if not (converter / "conversion" / "deepseek.py").is_file() or not (converter / "gguf-py").is_dir():
        raise MiniError(
            f"`{converter}` holds no conversion/deepseek.py beside gguf-py, expected a llama.cpp source folder",
            hint=recipe,
        )
    return converter


def write_gguf(native: Path, out: Path, converter: Path, say: Callable[[str], None]) -> None:
    """Convert a native folder and compare every value; `out` appears only if all are equal.

    It goes through a folder of FP4 experts beside BF16, since the converter would round FP8 tensors to another format.

    Raises:
        MiniError: with the converter's last line, or the tensor that differs.
    """
    with tempfile.TemporaryDirectory(prefix=".v4-mini-", dir=out.parent) as scratch:
        source, unfinished = Path(scratch) / "source", Path(scratch) / out.name
        say("gguf: writing the converter's source")
        with Checkpoint(native) as checkpoint:
            config = checkpoint.config
            write_checkpoint(source, gguf_config(config), _Fp4BesideBf16(config, checkpoint))
        say("gguf: converting, then comparing every value")
        script = [sys.executable, "-m", "v4sdk_bench.peers.to_gguf"]
        done = subprocess.run(
            [*script, str(source), str(unfinished), str(converter.resolve())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise MiniError(
                f"the converter in {converter} failed: {last}",
                hint="it needs torch, transformers, numpy and PyYAML of this environment; 0.3.36 is known to work",
            )
        shutil.move(unfinished, out)


class _Fp4BesideBf16:
    """Experts as stored, everything else as float."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._stored, self._floats = checkpoint, FloatTensors(config, checkpoint)

    def __contains__(self, name: object) -> bool:
        return (self._is_expert(str(name)) and name in self._stored) or name in self._floats

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name] if self._is_expert(name) else self._floats[name]

    @staticmethod
    def _is_expert(name: str) -> bool:
        return ".ffn.experts." in name
