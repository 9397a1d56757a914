"""What the safetensors files of a folder say they hold, without reading a tensor: every fault is found and named here."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from v4sdk.errors import CheckpointError
from v4sdk.tensors import ITEM_BYTES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# the file format's own limit
_MAX_HEADER_BYTES = 100_000_000
# sizes of dtypes the format knows and V4 does not use, so that the complaint is about the dtype
_OTHER_BYTES = {
    "BOOL": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "I32": 4,
    "U32": 4,
    "U64": 8,
    "F64": 8,
}
_NUMBERED = re.compile(r"^(.+)-(\d+)-of-(\d+)\.safetensors$")


class TensorHeader(NamedTuple):
    """One tensor as its file announces it; `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int


@dataclass(frozen=True)
class FolderHeaders:
    """All tensors of a folder.

    Attributes:
        tensors: by full name. shard_bytes: file name to its size. payload_bytes: bytes of all tensors.
    """

    tensors: Mapping[str, TensorHeader]
    shard_bytes: Mapping[str, int]

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes, headers excluded."""
        return sum(t.end - t.begin for t in self.tensors.values())


def read_folder_headers(folder: str | Path) -> FolderHeaders:
    """Read the headers of every shard of a checkpoint folder, with or without an index.

    Raises:
        CheckpointError: naming the file, if the folder, its index or a shard is unusable.
    """
    folder = Path(folder)
    index = _read_index(folder)
    names = sorted(set(index.values())) if index is not None else _shards_without_index(folder)
    tensors: dict[str, TensorHeader] = {}
    sizes = {}
    for name in names:
        found, sizes[name] = read_shard_header(folder / name)
        for tensor, header in found.items():
            if tensor in tensors:
                raise CheckpointError(
                    f"tensor `{tensor}` is in both `{tensors[tensor].shard}` and `{name}`, expected once",
                    hint="remove shards of another download or another revision from the folder",
                )
            tensors[tensor] = header
    if index is not None:
        _check_index(index, tensors)
    return FolderHeaders(tensors, sizes)


def read_shard_header(path: Path) -> tuple[dict[str, TensorHeader], int]:
    """Read one file's header: tensors by name, and the file's size.

    Raises:
        CheckpointError: if the file is absent, unreadable, cut short, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start, brace = file.read(8), file.read(1)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise CheckpointError(
                    f"`{path}` is a Git LFS pointer, not the file itself", hint="run `git lfs pull`"
                )
            if brace != b"{" or length > _MAX_HEADER_BYTES:
                raise _not_safetensors(path, f"it begins with {start + brace!r}, expected a length and `{{`")
            if 8 + length > size:
                raise CheckpointError(
                    f"`{path}` is {size:,} bytes, but its header alone is {length:,}, so the file is cut short",
                    hint=_AGAIN,
                )
            text = brace + file.read(length - 1)
    except FileNotFoundError:
        raise CheckpointError(f"shard `{path}` is missing", hint=_AGAIN) from None
    except OSError as exc:
        raise CheckpointError(f"`{path}` cannot be read: {exc.strerror}") from None
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as exc:
        raise _not_safetensors(path, f"its header is not JSON: {exc}") from None
    except _RepeatedNameError as exc:
        raise CheckpointError(
            f"tensor `{exc}` is listed twice in the header of `{path}`, expected once"
        ) from None
    if not isinstance(raw, dict):
        raise _not_safetensors(path, f"its header is a {type(raw).__name__}, expected an object")
    raw.pop("__metadata__", None)
    tensors = {name: _tensor_header(path, name, entry, 8 + length) for name, entry in raw.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors, size


_AGAIN = "download the checkpoint again; files that are complete are not fetched twice"


class _RepeatedNameError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(next(name for name in names if names.count(name) > 1))
    return members


def _not_safetensors(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"`{path}` is not a safetensors file: {why}",
        hint="name a folder with the original safetensors shards",
    )


def _tensor_header(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise _not_safetensors(
            path, f"the entry of `{name}` is {entry!r}, expected dtype, shape and data_offsets"
        )
    item = ITEM_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)
    if item is None:
        raise CheckpointError(f"tensor `{name}` has dtype `{dtype}`, which V4 checkpoints do not use")
    if end - begin != item * math.prod(shape):
        raise CheckpointError(
            f"tensor `{name}` in `{path}` spans {end - begin:,} bytes, expected {item * math.prod(shape):,} "
            f"for {dtype} {list(shape)}"
        )
    return TensorHeader(dtype, shape, path.name, start + begin, start + end)


def _check_extent(path: Path, tensors: Mapping[str, TensorHeader], start: int, size: int) -> None:
    at, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if tensor.begin != at:
            kind = "overlaps" if tensor.begin < at else "leaves a gap after"
            raise _not_safetensors(path, f"tensor `{name}` {kind} {before}")
        at, before = tensor.end, f"`{name}`"
    if at != size:
        what = "so the file is cut short" if at > size else "so something was appended"
        raise CheckpointError(
            f"`{path}` is {size:,} bytes, but its header announces {at:,}, {what}", hint=_AGAIN
        )


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CheckpointError(f"`{folder}` is a file, expected a checkpoint folder") from None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"`{path}` is not a readable index: {exc}") from None
    where = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"`{path}` has no `weight_map` from tensor names to files")
    for tensor, shard in where.items():
        # an index must not reach outside its folder
        if Path(shard).name != shard:
            raise CheckpointError(
                f"`{path}` puts `{tensor}` into `{shard}`, expected the name of a file beside it"
            )
    return where


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for name, shard in index.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(
                f"`{INDEX_NAME}` puts `{name}` into `{shard}`, but that file does not hold it",
                hint="index and shards come from different revisions; download the checkpoint again",
            )
    for name, tensor in tensors.items():
        if name not in index:
            raise CheckpointError(f"`{tensor.shard}` holds `{name}`, which `{INDEX_NAME}` does not list")


def _shards_without_index(folder: Path) -> list[str]:
    try:
        present = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
        other = sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        raise CheckpointError(f"folder `{folder}` does not exist") from None
    except OSError as exc:
        raise CheckpointError(f"folder `{folder}` cannot be read: {exc.strerror}") from None
    if SINGLE_NAME in present:
        return [SINGLE_NAME]
    if len(present) == 1 and not _NUMBERED.match(present[0]):
        return present
    if not present:
        what = f"it holds {', '.join(f'`{name}`' for name in other[:4])}" if other else "it is empty"
        raise CheckpointError(
            f"folder `{folder}` has no safetensors files: {what}",
            hint="name a folder with config.json and the model's .safetensors shards",
        )
    return _numbered_set(folder, present)


def _numbered_set(folder: Path, present: list[str]) -> list[str]:
    found = {name: m for name in present if (m := _NUMBERED.match(name))}
    stems = {(m[1], m[3]) for m in found.values()}
    if len(found) != len(present) or len(stems) != 1:
        raise CheckpointError(
            f"folder `{folder}` has {len(present)} safetensors files and no `{INDEX_NAME}`, "
            f"expected an index or one numbered set"
        )
    (stem, total) = stems.pop()
    for n in range(1, int(total) + 1):
        name = f"{stem}-{n:0{len(total)}d}-of-{total}.safetensors"
        if name not in found:
            raise CheckpointError(f"shard `{folder / name}` is missing", hint=_AGAIN)
    return sorted(found)
