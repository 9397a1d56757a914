"""v4-mini: one random model of the real layer pattern, in every format an engine may want, with identical values in all.

935M parameters from one seed. The native form holds FP8 projections and FP4 experts in the released layout. Its BF16 twin
and its GGUF hold the same numbers: an FP8 or FP4 value times a power of two is exact in BF16, and so is every float tensor
here. So engines that read different formats still compute with the same weights, and what is left between them is arithmetic.

Numbers are sums of random bytes, scaled by one multiplication: the same on every processor and in every version of a library.
The answers of such a model mean nothing; its work is real.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.tensors import expected_tensors
from v4sdk_bench.mini.gguf import MiniError, require_converter, write_gguf
from v4sdk_bench.mini.values import DrawnTensors
from v4sdk_bench.peers.formats import gguf_config

Kind = Literal["native", "bf16", "gguf"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OnProgress = Callable[[str], None]

# real attention geometry and layer pattern, everything else small. 64 experts, because some engines route only to certain
# counts; widths in multiples of 256, so that other engines' block formats fit too
MINI = shrunk(
    V4_FLASH, (0, 0, 4, 128, 4, 128, 4, 128), vocab_size=16384, hidden_size=1024, num_attention_heads=16, q_lora_rank=512,
    o_groups=4, o_lora_rank=256, index_n_heads=16, n_routed_experts=64, moe_intermediate_size=512,
)  # fmt: skip
# every layer kind in seconds, for tests; 16 index heads, because few of them often score nothing and then entries tie
TINY_MINI = shrunk(
    V4_FLASH, (0, 4, 128, 4), vocab_size=256, hidden_size=256, num_attention_heads=4, head_dim=128, qk_rope_head_dim=32,
    q_lora_rank=128, o_groups=2, o_lora_rank=64, index_n_heads=16, index_head_dim=64, index_topk=8, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, rope_original_context=64,
)  # fmt: skip

# counts the ways of drawing: files of another recipe hold other values
RECIPE = 1
# of the native values of seed 0: what this machine made is what every other machine makes
SEED_0_DIGEST = "d20dee6fc59a7dd10fca951efcda4b983d1dac2dca748e222c213f98b675b7c2"
MARKER = "v4-mini.json"
GGUF_NAME = "v4-mini.gguf"

_ROOM = 1.02


def needed_bytes(kind: Kind, config: ModelConfig = MINI) -> int:
    """Disk that making `kind` takes, temporary files included."""
    native = _size(config)
    if kind == "native":
        return int(native * _ROOM)
    if kind == "bf16":
        return int(_size(unquantised(config)) * _ROOM)
    # the folder that the converter reads, and the file it writes
    return int(2 * _size(gguf_config(config)) * _ROOM)


def _size(config: ModelConfig) -> int:
    return sum(spec.nbytes for spec in expected_tensors(config))


def make(
    folder: Path, kind: Kind = "native", seed: int = 0, on_progress: OnProgress | None = None, *,
    config: ModelConfig = MINI, native: Path | None = None,
) -> Path:  # fmt: skip
    """Write v4-mini as a checkpoint folder, read it back and compare every value; give the folder.

    Args:
        folder: missing or empty. kind: `native` or `bf16`. seed: the same seed gives the same bytes on every machine.
        on_progress: told in words. config: other sizes, for tests.
        native: where the native form of the same seed lies, if it does; `bf16` is read from it.

    Raises:
        MiniError: if the folder is not empty, the disk is too small, or what was written is not what was meant.
    """
    say = on_progress or _silent
    if kind == "bf16" and native is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".v4-mini-", dir=folder.parent) as scratch:
            source = make(Path(scratch) / "native", "native", seed, say, config=config)
            return make(folder, "bf16", seed, say, config=config, native=source)
    _require_empty(folder)
    _require_room(folder, needed_bytes(kind, config))
    files, written = config.num_hidden_layers + 2, 0

    def on_shard(name: str, size: int) -> None:
        nonlocal written
        written += 1
        say(f"{kind}: file {written} of {files}, {size / 1e6:.0f} MB")

    if kind == "native":
        write_checkpoint(folder, config, DrawnTensors(config, seed), on_shard=on_shard)
        digest = digest_of(folder, say)
        if config == MINI and seed == 0 and SEED_0_DIGEST not in ("", digest):
            raise MiniError(
                f"v4-mini of seed 0 has the digest {digest[:12]}, expected {SEED_0_DIGEST[:12]}",
                hint="remove the folder; this build draws other values than the one whose numbers were published",
            )
    elif kind == "bf16":
        assert native is not None
        with Checkpoint(native) as checkpoint:
            write_checkpoint(folder, unquantised(config), FloatTensors(config, checkpoint), on_shard=on_shard)
        different = differences(native, folder, say)
        if different:
            raise MiniError(
                f"{len(different)} tensors differ between {native} and {folder}, the first is `{different[0]}`"
            )
        digest = str(marker(native)["values"])
    else:
        raise MiniError(f"`{kind}` is no checkpoint folder, expected native or bf16", hint="use lay_out")
    _mark(folder, kind, seed, config, digest)
    return folder


def lay_out(
    root: Path, kinds: tuple[Kind, ...] = ("native", "bf16"), seed: int = 0, on_progress: OnProgress | None = None, *,
    converter: Path | None = None, config: ModelConfig = MINI,
) -> dict[Kind, Path]:  # fmt: skip
    """Make the asked forms under one folder: `native/`, `bf16/`, `v4-mini.gguf`. What is there and whole is kept.

    Args:
        converter: a llama.cpp source folder with `conversion/` and `gguf-py/`, for `gguf`.

    Raises:
        MiniError: if `root` holds something else, another seed, or a form cannot be made.
    """
    say = on_progress or _silent
    found = paths(root)
    strangers = sorted(p.name for p in root.iterdir() if p not in found.values()) if root.is_dir() else []
    if strangers:
        raise MiniError(
            f"`{root}` is not empty: it holds `{strangers[0]}`", hint="name a new or an empty folder"
        )
    wanted = [kind for kind in KINDS if kind in kinds or kind == "native"]
    missing = missing_kinds(root, kinds, seed, config)
    if "gguf" in missing:
        require_converter(converter)
    _require_room(root, sum(needed_bytes(kind, config) for kind in missing))
    for kind in missing:
        if kind == "gguf":
            assert converter is not None
            write_gguf(found["native"], found["gguf"], converter, say)
            digest = str(marker(found["native"])["values"])
            _mark(found["native"], "native", seed, config, digest, gguf_values=digest)
        else:
            make(
                found[kind],
                kind,
                seed,
                say,
                config=config,
                native=None if kind == "native" else found["native"],
            )
    return {kind: found[kind] for kind in wanted}


def cached(cache: Path, kind: Kind, seed: int = 0, on_progress: OnProgress | None = None) -> Path:
    """Give one form of v4-mini from the cache, made first if it is not there (`gguf` never: it needs a converter).

    Raises:
        MiniError: as `lay_out`.
    """
    root = cache / f"v4-mini-{seed}"
    if is_whole(root, kind, seed):
        return paths(root)[kind]
    return lay_out(root, (kind,), seed, on_progress)[kind]


def missing_kinds(
    root: Path, kinds: tuple[Kind, ...], seed: int = 0, config: ModelConfig = MINI
) -> list[Kind]:
    """What `lay_out` would have to make; `native` belongs to every form, which is read from it."""
    wanted = [kind for kind in KINDS if kind in kinds or kind == "native"]
    return [kind for kind in wanted if not is_whole(root, kind, seed, config)]


def paths(root: Path) -> dict[Kind, Path]:
    """Where the forms lie under one folder."""
    return {"native": root / "native", "bf16": root / "bf16", "gguf": root / GGUF_NAME}


def is_whole(root: Path, kind: Kind, seed: int = 0, config: ModelConfig = MINI) -> bool:
    """Whether a form of this seed and recipe was written to its end and compared."""
    if kind == "gguf":
        native = marker(root / "native")
        return (root / GGUF_NAME).is_file() and native.get("gguf_values") == native.get("values", "-")
    found = marker(root / kind)
    return (found.get("seed"), found.get("recipe"), found.get("layers")) == (
        seed,
        RECIPE,
        config.num_hidden_layers,
    )


def marker(folder: Path) -> dict[str, object]:
    """What `make` left in a folder it finished; empty if it did not."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(folder: Path, kind: Kind, seed: int, config: ModelConfig, values: str, **more: object) -> None:
    about = {
        "name": "v4-mini", "kind": kind, "seed": seed, "recipe": RECIPE, "layers": config.num_hidden_layers,
        "parameters": sum(spec.parameters for spec in expected_tensors(config)), "values": values,
    }  # fmt: skip
    (folder / MARKER).write_text(json.dumps(about | more, indent=1) + "\n", encoding="utf-8")


def digest_of(folder: Path, on_progress: OnProgress | None = None) -> str:
    """SHA-256 over names and stored bytes of every tensor, in the order of the released layout."""
    digest = hashlib.sha256()
    (on_progress or _silent)("reading it back")
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint:
            x = checkpoint[name]
            digest.update(name.encode())
            digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(a: Path, b: Path, on_progress: OnProgress | None = None) -> list[str]:
    """Names of tensors of which any value differs between two folders, quantised ones read as float32."""
    (on_progress or _silent)("comparing every value")
    found = []
    with Checkpoint(a) as left, Checkpoint(b) as right:
        ours, theirs = FloatTensors(left.config, left), FloatTensors(right.config, right)
        for name in sorted(set(ours) | set(theirs)):
            same = name in ours and name in theirs and torch.equal(ours[name].float(), theirs[name].float())
            if not same:
                found.append(name)
    return found


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MiniError(f"`{folder}` is not an empty folder", hint="name a new one, or remove what is there")


def _require_room(folder: Path, needed: int) -> None:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MiniError(
            f"`{folder}` has {free:,} bytes free, expected {needed:,}",
            hint="name a folder on another disk, or fewer kinds with --kind",
        )


def _silent(text: str) -> None:
    pass
