"""What a checkpoint is, from its headers or from `config.json` alone: sizes, memory, dialect, what is unused or missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from v4sdk.checkpoint import bind_headers
from v4sdk.config import ARCHITECTURE, ModelConfig
from v4sdk.encodings import IntegerLayout
from v4sdk.errors import V4Error
from v4sdk.headers import FolderHeaders, TensorHeader, read_folder_headers
from v4sdk.kv_cache import kv_bytes, layer_row_bytes
from v4sdk.memory import gigabytes
from v4sdk.numerics import KV_FORMATS, KVFormat
from v4sdk.prompts import Dialect
from v4sdk.tensors import TensorSpec, dense_encoding, expected_tensors, expert_encoding

CONTEXTS = (8_192, 131_072, 1_048_576)
_COMPANIONS = {
    "tokenizer.json": "text cannot be encoded or decoded",
    "generation_config.json": "built-in sampling defaults apply",
}


@dataclass(frozen=True)
class KVInfo:
    """Cache of one sequence in one row format.

    Attributes:
        growing_bytes_per_token: averaged over compressed blocks. fixed_bytes: windows and open blocks.
        at: context length to bytes in all.
    """

    growing_bytes_per_token: float
    fixed_bytes: int
    at: Mapping[int, int]


@dataclass(frozen=True)
class ModelInfo:
    """Everything `v4sdk info` says, as data.

    Attributes:
        source: `headers` where shards were read, `configuration` where sizes follow from `config.json` alone.
        layer_kinds: how many layers of each kind; `hash` counts layers routed by token id.
        parameters: weights of the backbone. active_parameters: those one token uses, without the embedding table.
        draft_parameters: weights of MTP or DSpark blocks.
        component_bytes: payload by part of the backbone, then one entry per draft block.
        encodings: how projections, experts and scales are stored.
        dialect: prompt dialect and where it was found, None if the folder does not say.
        unused: present and never run. missing: absent, with what that means.
    """

    name: str
    source: str
    architecture: str
    layers: int
    layer_kinds: Mapping[str, int]
    shape: Mapping[str, int]
    parameters: int
    active_parameters: int
    draft_parameters: int
    tensors: int
    payload_bytes: int
    shards: int
    component_bytes: Mapping[str, int]
    encodings: Mapping[str, str]
    kv: Mapping[KVFormat, KVInfo]
    context: int
    dialect: str | None
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give plain data for `json.dumps`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def render(self) -> list[str]:
        """Give lines of text."""
        return [f"{key:<18}{value}" for key, value in _rows(self)]


def describe(path: str | Path) -> ModelInfo:
    """Describe a checkpoint folder, a folder with no weights in it, or a bare `config.json`. Reads headers only.

    Raises:
        ConfigError: if the configuration is absent, invalid, or of another architecture.
        CheckpointError: if shards are present and damaged, or disagree with the configuration.
    """
    path = Path(path)
    config = ModelConfig.from_folder(path)
    folder = path if path.is_dir() else None
    headers = read_folder_headers(folder) if folder and _has_shards(folder) else None
    specs = {spec.name: spec for spec in expected_tensors(config)}
    absent: tuple[str, ...] = ()
    draft = tuple(sorted({spec.block for spec in specs.values()} - {"backbone"}))
    if headers is not None:
        binding = bind_headers(config, headers)
        specs, absent, draft = dict(binding.specs), binding.absent_blocks, binding.draft_blocks
    missing = [f"{block} (announced by config.json; the backbone does not need it)" for block in absent]
    dialect = None
    if folder:
        dialect, trouble = _dialect(folder)
        missing += trouble + _absent_files(folder, headers is None)
    backbone = [spec for spec in specs.values() if spec.block == "backbone"]
    total = sum(spec.parameters for spec in backbone)
    announced = "" if headers else ", announced by config.json"
    return ModelInfo(
        name=path.resolve().name if folder else path.name,
        source="configuration" if headers is None else "headers",
        architecture=ARCHITECTURE,
        layers=config.num_hidden_layers,
        layer_kinds=_kinds(config),
        shape=_shape(config),
        parameters=total,
        active_parameters=_active(config, backbone, total),
        draft_parameters=sum(spec.parameters for spec in specs.values()) - total,
        tensors=len(specs),
        payload_bytes=sum(_nbytes(spec, headers) for spec in specs.values()),
        shards=len({spec.shard for spec in specs.values()}) if headers is None else len(headers.shard_bytes),
        component_bytes=_components(specs, headers),
        encodings=_encodings(config, headers),
        kv={fmt: kv_info(config, fmt) for fmt in KV_FORMATS},
        context=config.max_position_embeddings,
        dialect=dialect,
        unused=tuple(f"{block} ({_draft_word(config)}{announced}, not run)" for block in draft),
        missing=tuple(missing),
    )


def kv_info(config: ModelConfig, fmt: KVFormat) -> KVInfo:
    """Size one sequence's cache in one format."""
    rows = [(layer.ratio, *layer_row_bytes(config, layer, fmt)) for layer in config.layers]
    growing = sum(entry / ratio for ratio, entry, _ in rows if ratio)
    return KVInfo(growing, sum(fixed for *_, fixed in rows), {n: kv_bytes(config, n, fmt) for n in CONTEXTS})


def _has_shards(folder: Path) -> bool:
    return any(entry.name.endswith(".safetensors") for entry in folder.iterdir())


def _kinds(config: ModelConfig) -> dict[str, int]:
    layers = config.layers
    kinds = {kind: sum(layer.kind == kind for layer in layers) for kind in ("swa", "csa", "hca")}
    return kinds | {"hash": sum(layer.hash_routing for layer in layers)}


def _shape(config: ModelConfig) -> dict[str, int]:
    names = (
        "vocab_size hidden_size num_attention_heads head_dim sliding_window index_topk n_routed_experts "
        "num_experts_per_tok moe_intermediate_size hc_mult"
    ).split()
    return {name: int(getattr(config, name)) for name in names}


def _active(config: ModelConfig, backbone: list[TensorSpec], total: int) -> int:
    experts = sum(spec.parameters for spec in backbone if spec.component == "routed experts")
    embedding = sum(spec.parameters for spec in backbone if spec.component == "embedding")
    # a table row is looked up, not multiplied
    return total - embedding - experts + experts * config.num_experts_per_tok // config.n_routed_experts


def _nbytes(spec: TensorSpec, headers: FolderHeaders | None) -> int:
    if headers is None:
        return spec.nbytes
    tensor: TensorHeader = headers.tensors[spec.name]
    return tensor.end - tensor.begin


def _components(specs: Mapping[str, TensorSpec], headers: FolderHeaders | None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in specs.values():
        part = spec.component if spec.block == "backbone" else f"draft block {spec.block}"
        sizes[part] = sizes.get(part, 0) + _nbytes(spec, headers)
    return dict(
        sorted(sizes.items(), key=lambda item: (item[0] if item[0].startswith("draft") else "", -item[1]))
    )


def _encodings(config: ModelConfig, headers: FolderHeaders | None) -> dict[str, str]:
    words = {"fp8": "FP8 E4M3", "fp4": "FP4 E2M1", "float": "float", "int8": "INT8", "int4": "INT4"}
    if config.integers:
        return _integers(config.integers, words)
    found = {"projections": words[dense_encoding(config)], "routed experts": words[expert_encoding(config)]}
    if "fp8" in (dense_encoding(config), expert_encoding(config)):
        ue8m0 = config.quantization is None or config.quantization.scale_fmt == "ue8m0"
        dtype = "F8_E8M0" if ue8m0 else "F32"
        if headers is not None:
            dtype = (
                headers.tensors["layers.0.ffn.shared_experts.w1.scale"].dtype
                if config.quantization
                else dtype
            )
        found["scales"] = "UE8M0" if dtype == "F8_E8M0" else "float32"
    return found


def _integers(layout: IntegerLayout, words: Mapping[str, str]) -> dict[str, str]:
    expert = "layers.0.ffn.experts.0.w1"
    found = {"projections": "float", "routed experts": words[layout.encoding(expert)]}
    for encoding, patterns in (("int8", layout.int8), ("int4", layout.int4)):
        others = [p for p in patterns if not fnmatchcase(expert, p)]
        if others:
            found["projections"] += f" ({words[encoding]}: {' '.join(others)})"
    group = f" or {layout.int4_group} columns" if layout.int4_group else ""
    return found | {"scales": f"float32 per row{group}", "layout": layout.name}


def _dialect(folder: Path) -> tuple[str | None, list[str]]:
    try:
        found = Dialect.from_folder(folder)
    except V4Error as error:
        return None, [f"prompt dialect ({error.message})"]
    if found is None:
        return None, [
            "prompt dialect (chat needs a `dialect` in v4sdk.json or the encoding folder; raw text works)"
        ]
    return f"{found.name} ({found.source})", []


def _absent_files(folder: Path, no_shards: bool) -> list[str]:
    lines = ["weights (sizes above follow from config.json)"] if no_shards else []
    return lines + [f"{name} ({why})" for name, why in _COMPANIONS.items() if not (folder / name).exists()]


def _draft_word(config: ModelConfig) -> str:
    return "DSpark draft stage" if config.is_dspark else "multi-token prediction"


def _rows(info: ModelInfo) -> list[tuple[str, str]]:
    s, k = info.shape, info.layer_kinds
    kinds = ", ".join(
        f"{n} {kind}" for kind, n in (("SWA", k["swa"]), ("CSA", k["csa"]), ("HCA", k["hca"])) if n
    )
    rows = [
        ("model", f"{info.name} ({info.architecture})"),
        ("layers", f"{info.layers}: {kinds}; {k['hash']} with hash routing"),
        ("width", f"{s['hidden_size']} x {s['hc_mult']} streams, {s['num_attention_heads']} heads of {s['head_dim']}, "
                  f"window {s['sliding_window']}, top-{s['index_topk']} entries"),
        ("experts", f"{s['n_routed_experts']} of width {s['moe_intermediate_size']}, "
                    f"{s['num_experts_per_tok']} per token, 1 shared"),
        ("vocabulary", f"{s['vocab_size']:,} tokens; context {info.context:,}"),
        ("parameters", f"{count(info.parameters)} total, {count(info.active_parameters)} active per token"
                       + (f", {count(info.draft_parameters)} in draft blocks" if info.draft_parameters else "")),
        ("stored as", ", ".join(f"{part} {how}" for part, how in info.encodings.items())),
        ("bytes", f"{info.payload_bytes:,} in {info.tensors:,} tensors, {info.shards} shard{'s' * (info.shards != 1)}"
                  + ("" if info.source == "headers" else " (from the configuration)")),
    ]  # fmt: skip
    rows += [("", f"{part:<18}{size:>19,}") for part, size in info.component_bytes.items()]
    for fmt, kv in info.kv.items():
        at = ", ".join(f"{gigabytes(size)} at {_context(n)}" for n, size in kv.at.items())
        rows.append((f"KV {fmt}", f"{kv.growing_bytes_per_token:,.2f} bytes per token: {at}"))
    rows.append(("dialect", info.dialect or "unknown"))
    rows += [("unused" if not i else "", text) for i, text in enumerate(info.unused)]
    rows += [("missing" if not i else "", text) for i, text in enumerate(info.missing)]
    return rows


def count(n: int) -> str:
    """Write a number of weights as published counts do: 284.33B, 1,573.0B, 3.1M."""
    if n >= 1e12:
        return f"{n / 1e9:,.1f}B"
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def _context(n: int) -> str:
    return f"{n >> 20}M" if n % (1 << 20) == 0 else f"{n >> 10}K"
