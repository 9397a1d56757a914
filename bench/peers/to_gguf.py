"""Runs llama.cpp's own converter on a folder of FP4 experts beside BF16, and compares the file's values with the folder's.

    python -m v4sdk_bench.peers.to_gguf SOURCE OUT.gguf LLAMA_CPP_FOLDER

A process of its own, because the converter is found by path and brings its own `gguf`. A random model has no tokenizer,
so the vocabulary is written as "none".
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors

_EXPERT = re.compile(r"^(layers\.\d+\.ffn)\.experts\.(\d+)\.(w[123])\.weight$")
# formats that hold these weights exactly
_EXACT = {"F32", "BF16", "MXFP4", "I32"}


def convert(source: Path, out: Path, converter: Path) -> None:
    """Write `out`."""
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    gguf: Any = importlib.import_module("gguf")
    deepseek: Any = importlib.import_module("conversion.deepseek")

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    deepseek.DeepseekV4Model.set_vocab = no_vocabulary
    deepseek.DeepseekV4Model(source, gguf.LlamaFileType.MOSTLY_BF16, out).write()


def compare(source: Path, out: Path) -> str | None:
    """What differs between folder and file, in words; None if both hold the same values.

    Names differ between the two, so tensors are told apart by a digest of their values.
    """
    gguf: Any = importlib.import_module("gguf")
    theirs: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(str(out)).tensors:
        if tensor.tensor_type.name not in _EXACT:
            return f"tensor `{tensor.name}` is stored as {tensor.tensor_type.name}, which rounds"
        values = (
            tensor.data
            if tensor.tensor_type.name == "I32"
            else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        )
        theirs[_digest(np.asarray(values))] += 1
    ours = _folder_digests(source)
    missing = [name for name, digest in ours.items() if not theirs[digest]]
    if missing:
        return f"`{missing[0]}` and {len(missing) - 1} other tensors of the folder are not in the file"
    return None if len(theirs) == len(set(ours.values())) else "the file holds tensors that the folder lacks"


def _folder_digests(source: Path) -> dict[str, str]:
    found, stacks = {}, dict[str, list[str]]()
    config = ModelConfig.from_folder(source)
    with Checkpoint(source) as checkpoint:
        values = FloatTensors(config, checkpoint)
        for name in values:
            expert = _EXPERT.match(name)
            if expert:
                stacks.setdefault(f"{expert[1]}.{expert[3]}", []).append(name)
            else:
                found[name] = _digest(_array(values[name]))
        for stack, names in stacks.items():
            found[stack] = _digest(np.stack([_array(values[name]) for name in names]))
    return found


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = (x.float() if x.is_floating_point() else x.to(torch.int32)).numpy()
    return array


def _digest(values: np.ndarray[Any, Any]) -> str:
    kind = np.int32 if values.dtype.kind in "iu" else np.float32
    # the two zeros are one value
    flat = np.ascontiguousarray(values, dtype=kind) + kind(0)
    return hashlib.sha256(flat.tobytes()).hexdigest()


def main() -> int:
    """Convert and compare; 1 with a sentence on stderr if they differ."""
    source, out, converter = (Path(text) for text in sys.argv[1:4])
    convert(source, out, converter)
    wrong = compare(source, out)
    if wrong:
        print(f"the GGUF does not hold the folder's values: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
