"""The state file: one sequence in one safetensors file, row-major, with a versioned header. Never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from v4sdk.errors import StateError
from v4sdk.kv_cache import KVCache
from v4sdk.numerics import KV_FORMATS, KVFormat
from v4sdk.ops.rows import load_index, load_kv, store_index, store_kv
from v4sdk.sequence import SequenceState, Snapshot

VERSION = 1
_KEY = "v4sdk_state"
_INDEX = "index_keys"
# the open compressor blocks stay float32 in every KV format
_UNFORMATTED = ("state", "index_state")


@dataclass(frozen=True)
class StateHeader:
    """What a state file says about itself.

    Attributes:
        model: fingerprint. numerics: name and roundings. backend: who computed it.
        num_cached: tokens the model has read. seed, stream: the generator; its position is the number of tokens.
        snapshots, turns: positions of the fixed-part copies that are in the file.
    """

    version: int
    model: str
    numerics: dict[str, Any]
    kv_format: KVFormat
    backend: str
    num_cached: int
    seed: int | None
    stream: int
    snapshots: list[int]
    turns: list[int]


def write_state(path: str | Path, header: StateHeader, state: SequenceState, cache: KVCache) -> None:
    """Write a sequence to `path`, which is either the old file or the whole new one at any moment.

    Raises:
        StateError: if the file cannot be written.
    """
    tensors = {"tokens": torch.tensor(state.ids, dtype=torch.int64)}
    _name(tensors, "layers", cache.read_entries(state.rows, state.num_cached))
    _name(tensors, "layers", cache.snapshot_fixed(state.rows))
    for at, snapshot in state.snapshots.items():
        _name(tensors, f"snapshots.{at}", snapshot)
    path = Path(path)
    made = ""
    try:
        handle, made = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        save_file(tensors, made, {_KEY: json.dumps(asdict(header))})
        _flush(made)
        os.replace(made, path)
        _flush(str(path.parent))
    except (OSError, SafetensorError) as exc:
        if made:
            Path(made).unlink(missing_ok=True)
        why = getattr(exc, "strerror", None) or exc
        raise StateError(
            f"state file `{path}` cannot be written: {why}",
            hint="name a file in a folder that can be written to",
        ) from None


def _name(tensors: dict[str, Tensor], prefix: str, layers: Snapshot) -> None:
    for i, named in enumerate(layers):
        for name, tensor in named.items():
            tensors[f"{prefix}.{i}.{name}"] = tensor.detach().cpu().contiguous()


def _flush(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: str | Path) -> StateHeader:
    """Read and check the header alone.

    Raises:
        StateError: if the file is missing, damaged, no state file, or of another version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except FileNotFoundError:
        raise StateError(
            f"state file `{path}` does not exist", hint="v4sdk run --save FILE writes one"
        ) from None
    except (OSError, SafetensorError) as exc:
        raise StateError(f"state file `{path}` cannot be read: {exc}") from None
    if text is None:
        raise StateError(
            f"`{path}` is a safetensors file without a v4sdk state", hint="write one with seq.save(path)"
        )
    try:
        raw = json.loads(text)
        if raw["version"] != VERSION:
            raise StateError(f"state file `{path}` has version {raw['version']}, expected {VERSION}")
        header = StateHeader(**raw)
    except (ValueError, TypeError, KeyError) as exc:
        raise StateError(f"state file `{path}` has a damaged header: {exc}") from None
    wrong = _wrong_field(header)
    if wrong:
        raise StateError(f"state file `{path}` has a damaged header: `{wrong}` is {getattr(header, wrong)!r}")
    return header


def _wrong_field(header: StateHeader) -> str | None:
    """The first field that no state file of this version can hold."""
    h = header

    def counts(value: object, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    def positions(values: object) -> bool:
        return isinstance(values, list) and all(counts(v, 1, h.num_cached) for v in values)

    right = {
        "model": isinstance(h.model, str),
        "backend": isinstance(h.backend, str),
        "numerics": isinstance(h.numerics, dict),
        "kv_format": h.kv_format in KV_FORMATS,
        "num_cached": counts(h.num_cached, 0, 1 << 62),
        "seed": h.seed is None or counts(h.seed, 0, (1 << 63) - 1),
        "stream": counts(h.stream, 0, (1 << 63) - 1),
    }
    wrong = next((name for name, ok in right.items() if not ok), None)
    return wrong or next((n for n in ("snapshots", "turns") if not positions(getattr(h, n))), None)


def read_state(path: str | Path, header: StateHeader, cache: KVCache) -> SequenceState:
    """Read a sequence into new rows of `cache`, converting rows of another KV format.

    Raises:
        StateError: if tensors are missing or have other shapes than this model's.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            # copies: what stays mapped would outlive the session
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise StateError(f"state file `{path}` cannot be read: {exc}") from None
    tokens = found.pop("tokens", torch.empty(0))
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise StateError(
            f"state file `{path}`: tensor `tokens` is {tokens.dtype} {list(tokens.shape)}, expected torch.int64 [n]"
        )
    ids = tokens.tolist()
    bad = [i for i in ids if not 0 <= i < cache.config.vocab_size]
    if len(ids) < header.num_cached or bad:
        raise StateError(
            f"state file `{path}` has {len(ids)} tokens for {header.num_cached} read, {len(bad)} unknown"
        )
    state = SequenceState(cache.allocate(), ids, header.num_cached, seed=header.seed, stream=header.stream)
    reader = _Reader(str(path), found, header.kv_format, cache)
    try:
        cache.reserve(state.rows, header.num_cached)
        cache.restore_fixed(state.rows, reader.layers("layers", "fixed"))
        cache.write_entries(state.rows, reader.layers("layers", "paged", header.num_cached))
        state.snapshots = {at: reader.layers(f"snapshots.{at}", "fixed") for at in header.snapshots}
        state.turns = [at for at in header.turns if at in state.snapshots]
    except BaseException:
        cache.release(state.rows)
        raise
    return state


class _Reader:
    """Takes checked, converted tensors out of a state file."""

    def __init__(self, path: str, found: Mapping[str, Tensor], fmt: KVFormat, cache: KVCache) -> None:
        self._path, self._found, self._cache = path, found, cache
        # an empty cache of the file's format knows every shape
        self._shapes = KVCache(cache.config, fmt, torch.device("cpu"), cache.specs, cache.page_tokens)

    def layers(self, prefix: str, part: str, num_tokens: int = 0) -> Snapshot:
        out = []
        for i, spec in enumerate(self._cache.specs):
            shaped, target = self._shapes.layers[i], self._cache.layers[i]
            wants = shaped.fixed() if part == "fixed" else shaped.paged()
            likes = target.fixed() if part == "fixed" else target.paged()
            named = {}
            for name, like in wants.items():
                rows = list(like.shape[1:])
                if part == "paged":
                    rows = [num_tokens // spec.ratio, like.shape[-1]]
                tensor = self._take(f"{prefix}.{i}.{name}", rows, like.dtype)
                named[name] = self._converted(name, tensor, likes[name])
            out.append(named)
        return out

    def _take(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        tensor = self._found.get(name)
        got = None if tensor is None else (list(tensor.shape), tensor.dtype)
        if tensor is None or got != (shape, dtype):
            raise StateError(
                f"state file `{self._path}`: tensor `{name}` is {got}, expected {(shape, dtype)}"
            )
        return tensor

    def _converted(self, name: str, rows: Tensor, like: Tensor) -> Tensor:
        config, target = self._cache.config, like[:0]
        if name in _UNFORMATTED or rows.dtype == like.dtype:
            converted = rows
        elif name == _INDEX:
            converted = store_index(load_index(rows, config.index_head_dim), target)
        else:
            converted = store_kv(
                load_kv(rows, config.head_dim, config.qk_rope_head_dim), target, config.qk_rope_head_dim
            )
        return converted.to(self._cache.device)
