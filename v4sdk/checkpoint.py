"""A checkpoint folder as a read-only mapping from tensor name to memory-mapped tensor.

Opening reads headers only and binds every name, dtype and shape to the configuration; bytes of a tensor are read by the
system when something computes with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from v4sdk.config import ModelConfig
from v4sdk.errors import CheckpointError
from v4sdk.headers import FolderHeaders, TensorHeader, read_folder_headers
from v4sdk.tensors import TensorSpec, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

_FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Binding:
    """The tensors of a folder matched with what the configuration expects.

    Attributes:
        specs: what is present, by name, in shard order.
        absent_blocks: MTP blocks the configuration announces and the folder leaves out.
        draft_blocks: MTP blocks that are present; the backbone never runs them.
    """

    specs: Mapping[str, TensorSpec]
    absent_blocks: tuple[str, ...]
    draft_blocks: tuple[str, ...]


def bind_headers(config: ModelConfig, headers: FolderHeaders) -> Binding:
    """Check every name, dtype and shape.

    An MTP block may be absent as a whole; everything else must be there, and nothing more.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected, or stored otherwise.
    """
    specs = {spec.name: spec for spec in expected_tensors(config)}
    present = {spec.block for name, spec in specs.items() if name in headers.tensors}
    absent = tuple(sorted({spec.block for spec in specs.values()} - present - {"backbone"}))
    specs = {name: spec for name, spec in specs.items() if spec.block not in absent}
    unexpected = [name for name in headers.tensors if name not in specs]
    missing = [name for name in specs if name not in headers.tensors]
    _check_names(config, missing, unexpected)
    for name, spec in specs.items():
        _check_tensor(config, spec, headers.tensors[name])
    return Binding(MappingProxyType(specs), absent, tuple(sorted(present - {"backbone"})))


class Checkpoint(Mapping[str, "Tensor"]):
    """An open checkpoint: tensors by official name, mapped on first use.

    Nothing is copied here. A backend may copy what is mapped into memory at load (`Backend.settling`); addresses and values stay.

    Args:
        folder: holds `config.json` and the shards.
        config: taken from `config.json` when None.

    Raises:
        ConfigError: if `config.json` is absent or invalid.
        CheckpointError: if any file, name, dtype or shape is wrong.
    """

    def __init__(self, folder: str | Path, config: ModelConfig | None = None) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder)
        self.config = config or ModelConfig.from_folder(self.folder)
        self.headers = read_folder_headers(self.folder)
        self.binding = bind_headers(self.config, self.headers)
        self._shards: dict[str, Tensor] | None = {}

    @property
    def nbytes(self) -> int:
        """Tensor bytes on disk, all of which are mapped once everything has been touched."""
        return self.headers.payload_bytes

    def __getitem__(self, name: str) -> Tensor:
        """Map one tensor.

        Raises:
            KeyError: if the checkpoint has no such tensor.
            CheckpointError: if it has been closed, or the shard has vanished since it was opened.
        """
        # imported here, so that `info` stays without torch
        import torch

        from v4sdk.weight_formats import TORCH_DTYPES

        shard = self.headers.tensors[name].shard
        if self._shards is None:
            raise CheckpointError(f"checkpoint `{self.folder}` is closed, so `{name}` cannot be read")
        if shard not in self._shards:
            path = self.folder / shard
            try:
                # a private mapping: nothing is read here, and nothing written to a tensor reaches the file
                self._shards[shard] = torch.from_file(
                    str(path), shared=False, size=self.headers.shard_bytes[shard], dtype=torch.uint8
                )
            except (OSError, RuntimeError) as exc:
                raise CheckpointError(f"`{path}` cannot be mapped: {exc}") from None
        entry = self.headers.tensors[name]
        data, dtype = self._shards[shard][entry.begin : entry.end], TORCH_DTYPES[entry.dtype]
        # the safetensors library would hand the same view out, but touches a page of every tensor on the way:
        # 64 KB for each of 69,187 tensors before the first token
        if entry.begin % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def mapped_files(self) -> Mapping[Path, Tensor]:
        """Give the shards that tensors have been taken from so far, each as all of its bytes."""
        return {self.folder / shard: data for shard, data in (self._shards or {}).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers.tensors)

    def __len__(self) -> int:
        return len(self.headers.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.headers.tensors

    def fingerprint(self) -> str:
        """Identify the model: configuration, headers, sizes, and the first and last bytes of every shard's payload.

        A saved sequence state names this, so that it is never continued on other weights.
        """
        fields = asdict(self.config)
        if fields["integers"] is None:
            # saved states and records name fingerprints from before converted folders existed
            del fields["integers"]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name, tensor in sorted(self.headers.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        first: dict[str, int] = {}
        for tensor in self.headers.tensors.values():
            first[tensor.shard] = min(tensor.begin, first.get(tensor.shard, tensor.begin))
        for shard, size in sorted(self.headers.shard_bytes.items()):
            start = first.get(shard, 0)
            with (self.folder / shard).open("rb") as file:
                file.seek(start)
                digest.update(file.read(_FINGERPRINT_SAMPLE_BYTES))
                file.seek(max(start, size - _FINGERPRINT_SAMPLE_BYTES))
                digest.update(file.read(_FINGERPRINT_SAMPLE_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of every shard. A mapping disappears when the last tensor taken from it is dropped."""
        self._shards = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(
            f"folder `{folder}` does not exist", hint="name a checkpoint folder or a hub id"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"`{folder}` is a file, expected a checkpoint folder", hint=f"try `{folder.parent}`"
        )
    try:
        empty = next(folder.iterdir(), None) is None
    except OSError as exc:
        raise CheckpointError(f"folder `{folder}` cannot be read: {exc.strerror}") from None
    if empty:
        raise CheckpointError(
            f"folder `{folder}` is empty",
            hint="name a folder with config.json and the model's .safetensors shards",
        )


def _check_names(config: ModelConfig, missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    foreign = next(
        (name for name in unexpected if name.startswith("model.") or name == "lm_head.weight"), None
    )
    if foreign:
        raise CheckpointError(
            f"tensor `{foreign}` has a name of another library, expected official names such as "
            f"`layers.0.attn.wq_a.weight` without the prefix `model.`",
            hint="use the original repository's files; a folder saved by transformers is not in the released layout",
        )
    first, count, what = (
        (missing[0], len(missing), "lacks") if missing else (unexpected[0], len(unexpected), "also holds")
    )
    layers = f"`config.json` describes {config.num_hidden_layers} layers, {config.n_routed_experts} experts"
    raise CheckpointError(
        f"the checkpoint {what} {f'{count:,} tensors, the first' if count > 1 else 'tensor'} `{first}`"
        f"{'' if missing else ', which its configuration does not describe'}",
        hint=f"{layers} and {config.num_mtp_blocks} MTP blocks: is it the one of this checkpoint",
    )


def _check_tensor(config: ModelConfig, spec: TensorSpec, found: TensorHeader) -> None:
    if found.dtype in spec.dtypes and found.shape == spec.shape:
        return
    hint = "is this the checkpoint that config.json belongs to"
    if found.dtype not in spec.dtypes and found.dtype in ("BF16", "F32", "F8_E4M3", "I8", "U8"):
        dense = "with" if config.quantization else "without"
        says = f"is {dense} `quantization_config` and says `expert_dtype` {config.expert_dtype!r}"
        if config.integers:
            says = f"says layout `{config.integers.name}`"
        hint = f"config.json {says}; " + hint
    raise CheckpointError(
        f"tensor `{spec.name}` in `{found.shard}` is {found.dtype} {list(found.shape)}, "
        f"expected {' or '.join(spec.dtypes)} {list(spec.shape)}",
        hint=hint,
    )
