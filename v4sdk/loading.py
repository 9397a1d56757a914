"""Opens a model: from a folder, a hub id or the bundled one to everything a session holds. Reads no weight it need not,
unless the backend copies those of small models into memory."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4sdk import __version__, hub, plugins
from v4sdk.backend import Backend, Binding, EngineConfig, ExpertExchange, ExpertPaging, Settling, bind
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.device_errors import translated
from v4sdk.errors import CheckpointError, ConfigError, SamplingError
from v4sdk.expert_parallel import Team
from v4sdk.expert_parallel.exchange import expert_bounds
from v4sdk.expert_parallel.experts import (
    Bound,
    DistributedExperts,
    Share,
    drive,
    exchange_by,
    serve,
    shard,
    unrecorded,
)
from v4sdk.expert_parallel.team import ranks_here
from v4sdk.kv_cache import KVCache
from v4sdk.memory import (
    ExpertSizes,
    FreeMemory,
    check_growth,
    expert_budget,
    free_memory,
    gigabytes,
    plan_memory,
    step_bytes,
)
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import KVFormat, Numerics
from v4sdk.numerics import kv_format as kv_format_of
from v4sdk.numerics import numerics as numerics_of
from v4sdk.ops import routed_experts
from v4sdk.progress import OnProgress, Progress
from v4sdk.prompts import Dialect
from v4sdk.sampling import SamplingParams, eos_from_generation_config, params_from_generation_config
from v4sdk.tokenizer import Tokenizer
from v4sdk.weights import ExpertWeights, WeightSource

log = logging.getLogger("v4sdk")
DEFAULT_NUMERICS = "fast"
_PLANNED_TOKENS = 8192
_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)\.")


@dataclass(frozen=True)
class LoadOptions:
    """What a caller may choose about a model; see `Session.load`."""

    backend: str | Backend | None = None
    numerics: str | Numerics | None = None
    kv_format: str | None = None
    revision: str | None = None
    strict: bool = False
    dialect: str | Dialect | None = None
    context_limit: int | None = None
    team: Team | None = None
    memory_limit: int | str | None = None
    prefill_chunk: int = 1024


@dataclass(frozen=True)
class FolderSettings:
    """What a folder says beside its weights.

    Attributes:
        sampling: defaults of `generation_config.json`. end_ids: end tokens of that file and of `config.json`.
        thinking: whether chat thinks unless told otherwise (`default_mode` of `v4sdk.json`).
        trained_context: length it was trained for, where known.
        raw: the whole of `v4sdk.json`.
    """

    sampling: SamplingParams
    end_ids: frozenset[int]
    thinking: bool = True
    trained_context: int | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Loaded:
    """The parts of a session, assembled.

    Attributes:
        is_bundled: the small demonstration model that comes with the package.
        binding: how every op runs on this backend.
        team: the ranks that hold experts; None where this process holds all.
        paging: how routed experts come from disk; None where all of them fit into memory.
    """

    folder: Path
    is_bundled: bool
    config: ModelConfig
    settings: FolderSettings
    tokenizer: Tokenizer | None
    dialect: Dialect | None
    backend: Backend
    numerics: Numerics
    kv_format: KVFormat
    binding: Binding
    model: V4Model
    cache: KVCache
    fingerprint: str
    team: Team | None = None
    paging: ExpertPaging | None = None


def bundled_folder() -> Path:
    """The folder of the model that comes with the package."""
    return Path(str(files("v4sdk") / "nano"))


def read_settings(folder: Path, config: ModelConfig) -> FolderSettings:
    """Read `generation_config.json` and `v4sdk.json`; both may be absent.

    Raises:
        ConfigError: if one of them is not readable, states an unknown mode, or a value outside its range.
    """
    generation, own = _read_json(folder / "generation_config.json"), _read_json(folder / "v4sdk.json")
    mode, trained = own.get("default_mode", "thinking"), own.get("trained_context")
    if mode not in ("thinking", "chat"):
        raise ConfigError(f"`default_mode` in `v4sdk.json` is {mode!r}, expected `thinking` or `chat`")
    if trained is not None and (type(trained) is not int or trained < 1):
        raise ConfigError(f"`trained_context` in `v4sdk.json` is {trained!r}, expected a positive integer")
    try:
        sampling, ends = params_from_generation_config(generation), eos_from_generation_config(generation)
    except SamplingError as exc:
        raise ConfigError(f"`{folder / 'generation_config.json'}`: {exc.message}") from None
    end_ids = frozenset((config.eos_token_id, *ends))
    return FolderSettings(sampling, end_ids, mode == "thinking", trained, own)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"`{path}` is not readable JSON: {exc}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"`{path}` holds a {type(raw).__name__}, expected a JSON object")
    return raw


def open_model(model: str | Path | None, options: LoadOptions, on_progress: OnProgress) -> Loaded:
    """Open and bind a model; every fault of the folder is found here, before the first token.

    Raises:
        ConfigError, CheckpointError, PromptError, MemoryRefused, UnknownBackend, BackendUnavailable, KernelMismatch,
        RankLost: see their texts.
    """
    chosen, fmt, backend = _choices(options)
    team = options.team
    folder = bundled_folder() if model is None else hub.resolve(model, options.revision, on_progress)
    with Checkpoint(folder) as checkpoint:
        config = checkpoint.config
        backend.check(config, folder)
        if team:
            expert_bounds(config.n_routed_experts, team.processes)
        settings = read_settings(folder, config)
        tokenizer = _tokenizer(folder, config)
        dialect = _dialect(folder, options.dialect)
        engine = EngineConfig(chosen, fmt, backend.capability())
        binding = bind(backend, config, engine, options.strict)
        bare = binding.without_kernel
        if bare:
            names = ", ".join(f"{b.op} ({b.reason})" for b in bare)
            log.info(
                "%d of %d ops run without a kernel of `%s`: %s",
                len(bare),
                len(binding.ops),
                backend.name,
                names,
            )
        paging, settling = _plan(checkpoint, backend, fmt, options, on_progress)
        if team:
            # what every rank would refuse alike has been refused here, once
            team.tell({"do": "load"})
        with translated(backend):
            network = _bind_weights(
                checkpoint, paging or backend, backend.place, chosen, binding, on_progress, team
            )
        if settling:
            _settle(checkpoint, settling, on_progress)
        if paging:
            binding.table.set(routed_experts.name, paging.around(binding.table[routed_experts]))
        if team:
            drive(team, _facts(checkpoint, chosen, backend), backend.device)
            bound = Bound.of(binding, config.swiglu_limit, chosen)
            exchange = exchange_by(backend, team, config, engine)
            distributed = DistributedExperts(team, bound, config.n_routed_experts, exchange)
            binding.table.set(routed_experts.name, distributed)
            backend = unrecorded(backend)
            how = (
                f"experts split over {team.processes} processes ({team.group_name}), schedule {team.schedule}"
            )
            log.info(how)
            on_progress(Progress("notice", text=how))
        cache = KVCache(
            config,
            fmt,
            backend.device,
            admit=lambda num_bytes: check_growth(
                num_bytes, _free(backend) or free_memory(limit=options.memory_limit)
            ),
        )
        return Loaded(
            folder, model is None, config, settings, tokenizer, dialect, backend, chosen, fmt, binding, network, cache,
            checkpoint.fingerprint(), team, paging,
        )  # fmt: skip


def serve_experts(model: str | Path | None, options: LoadOptions, on_progress: OnProgress) -> None:
    """Hold this rank's experts of a model and serve them until the driver closes.

    Raises:
        V4Error: as `open_model`; RankLost too if another rank is gone.
    """
    team = options.team
    assert team is not None
    backend = _choices(options)[2]
    options = replace(options, backend=backend)
    try:
        serve(team, lambda: _open_share(model, options, team, on_progress))
    finally:
        backend.close()
        collect()


def _open_share(model: str | Path | None, options: LoadOptions, team: Team, on_progress: OnProgress) -> Share:
    chosen, fmt, backend = _choices(options)
    folder = bundled_folder() if model is None else hub.resolve(model, options.revision, on_progress)
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        config = checkpoint.config
        engine = EngineConfig(chosen, fmt, backend.capability())
        binding = bind(backend, config, engine)
        source, count = _source(checkpoint), config.n_routed_experts
        layers = []
        for spec in config.layers:
            role = f"{spec.prefix}ffn"
            whole = source.experts(role, count)
            prepare = partial(backend.prepare_experts, f"{role}.experts")
            layers.append(shard(whole, spec.index, team.rank, team.processes, prepare))
            on_progress(Progress("load", len(layers), config.num_hidden_layers, "layers"))
        bound = Bound.of(binding, config.swiglu_limit, chosen)
        exchange = partial(_exchange, backend, config, engine)
        return Share(_facts(checkpoint, chosen, backend), layers, bound, backend.device, exchange)


def _exchange(backend: Backend, config: ModelConfig, engine: EngineConfig, team: Team) -> ExpertExchange:
    return exchange_by(backend, team, config, engine)


def _choices(options: LoadOptions) -> tuple[Numerics, KVFormat, Backend]:
    numerics = options.numerics or DEFAULT_NUMERICS
    chosen = numerics if isinstance(numerics, Numerics) else numerics_of(numerics)
    backend = options.backend if isinstance(options.backend, Backend) else plugins.select(options.backend)
    # one that was handed in may not have been opened yet
    backend.open()
    return chosen, _kv_format(options.kv_format, chosen, backend), backend


def _kv_format(asked: str | None, chosen: Numerics, backend: Backend) -> KVFormat:
    found = kv_format_of(asked, chosen)
    if found in backend.kv_formats:
        return found
    if asked is None:
        return backend.kv_formats[0]
    raise ConfigError(
        f"KV format `{found}` cannot be kept by backend `{backend.name}` here, expected {' or '.join(backend.kv_formats)}",
        hint=f"--kv-format {backend.kv_formats[0]}, or leave the option out",
    )


def _facts(checkpoint: Checkpoint, chosen: Numerics, backend: Backend) -> Mapping[str, str]:
    """What all ranks must have in common."""
    return {
        "v4sdk": __version__,
        "model": checkpoint.fingerprint()[:16],
        "numerics": str(chosen),
        "backend": backend.name,
    }


def _held_bytes(checkpoint: Checkpoint, team: Team | None, backend: Backend) -> int:
    """Bytes of the tensors to be used where this process runs: all, less the experts of ranks that have their own memory."""
    if team is None:
        return checkpoint.nbytes
    bounds = expert_bounds(checkpoint.config.n_routed_experts, team.processes)
    # the host's memory is shared by all ranks on it, and those of a launcher are neighbours
    together = ranks_here() if backend.device.type == "cpu" else 1
    mine = range(bounds[team.rank], bounds[min(team.rank + together, team.processes)])
    return sum(
        tensor.end - tensor.begin
        for name, tensor in checkpoint.headers.tensors.items()
        if not (found := _EXPERT.search(name)) or int(found[1]) in mine
    )


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"`tokenizer.json` has ids up to {tokenizer.vocab_size - 1}, but `vocab_size` is {config.vocab_size}",
            hint="is this the tokenizer this checkpoint belongs to?",
        )
    return tokenizer


def _dialect(folder: Path, asked: str | Dialect | None) -> Dialect | None:
    """What the caller says; of the same name, the folder's own has the wording too."""
    if isinstance(asked, Dialect):
        return asked
    found = Dialect.from_folder(folder)
    if asked is None or (found is not None and found.name == asked):
        return found
    return Dialect.named(asked)


def _free(backend: Backend) -> FreeMemory | None:
    """What the device still has; None where that is main memory."""
    of_device = backend.memory()
    return None if of_device is None else FreeMemory(of_device.free_bytes, f"on {backend.name}")


def _plan(
    checkpoint: Checkpoint, backend: Backend, fmt: KVFormat, options: LoadOptions, on_progress: OnProgress
) -> tuple[ExpertPaging | None, Settling | None]:
    """Say what will be used, refuse what cannot fit, and page experts where that lets it fit.

    Main memory maps the weights, or copies them where the backend likes that better and there is room; a device holds them.
    """
    config, maps = checkpoint.config, backend.device.type == "cpu"
    held_bytes = _held_bytes(checkpoint, options.team, backend)
    plan = plan_memory(
        config,
        mapped_bytes=held_bytes if maps else 0,
        resident_bytes=0 if maps else held_bytes,
        # the cache grows with use: without a limit only a start must fit
        context_tokens=options.context_limit or min(config.max_position_embeddings, _PLANNED_TOKENS),
        kv_format=fmt,
        free=_free(backend) or free_memory(limit=options.memory_limit),
    )
    step = step_bytes(config, min(options.prefill_chunk, plan.context_tokens))
    # ranks of a team map their experts and nothing else
    settling = backend.settling() if maps and options.team is None else None
    if settling:
        num_bytes = _settled_bytes(checkpoint, settling.least_bytes)
        if num_bytes and (settling.demanded_by or plan.is_small(step)):
            plan = plan.settled(num_bytes)
        else:
            settling = None
    log.info("memory: %s", plan.render())
    on_progress(Progress("memory", text=plan.render()))
    plan.check(settling.demanded_by if settling else None)
    warning, paging = plan.warning(), None
    # ranks of a team share the experts out instead
    if warning and backend.pages_experts and options.team is None and settling is None:
        budget = expert_budget(plan, _expert_sizes(checkpoint), step)
        if budget is not None:
            warning, paging = budget.render(), backend.page_experts(budget.nbytes)
    if warning:
        log.warning(warning)
        on_progress(Progress("notice", text=warning))
    return paging, settling


def _settled_bytes(checkpoint: Checkpoint, least_bytes: int) -> int:
    """Bytes of tensors in the files that will be copied: large enough, and with a tensor that is used."""
    headers, specs = checkpoint.headers, checkpoint.binding.specs
    used = {tensor.shard for name, tensor in headers.tensors.items() if specs[name].block == "backbone"}
    large = {shard for shard in used if headers.shard_bytes[shard] >= least_bytes}
    return sum(tensor.end - tensor.begin for tensor in headers.tensors.values() if tensor.shard in large)


def _settle(checkpoint: Checkpoint, settling: Settling, on_progress: OnProgress) -> None:
    files = {
        path: data for path, data in checkpoint.mapped_files().items() if data.nbytes >= settling.least_bytes
    }
    total = sum(data.nbytes for data in files.values())

    def report(done: int) -> None:
        on_progress(Progress("load", done // 10**6, total // 10**6, "MB"))

    moved = settling.settle(files, report)
    log.info("weights: %s of %s copied into memory", gigabytes(moved), gigabytes(total))


def _expert_sizes(checkpoint: Checkpoint) -> ExpertSizes:
    sizes: dict[str, int] = {}
    for name, tensor in checkpoint.headers.tensors.items():
        if found := _EXPERT.search(name):
            one = name[: found.end()]
            sizes[one] = sizes.get(one, 0) + tensor.end - tensor.begin
    return ExpertSizes(sum(sizes.values()), max(sizes.values()), checkpoint.config.num_experts_per_tok)


def _source(checkpoint: Checkpoint) -> WeightSource:
    quantization = checkpoint.config.quantization
    return WeightSource(checkpoint, quantization.block if quantization else (128, 128))


def _bind_weights(
    checkpoint: Checkpoint, prepared: Backend | ExpertPaging, place: Callable[[Tensor], Tensor], chosen: Numerics,
    binding: Binding, on_progress: OnProgress, team: Team | None,
) -> V4Model:  # fmt: skip
    config = checkpoint.config
    blocks, total = 0, config.num_hidden_layers

    def experts(role: str, weights: ExpertWeights) -> ExpertWeights:
        nonlocal blocks
        prepare = partial(prepared.prepare_experts, role)
        placed = shard(weights, blocks, team.rank, team.processes, prepare) if team else prepare(weights)
        blocks += 1
        on_progress(Progress("load", blocks, total, "layers"))
        return placed

    binder = Binder(config, _source(checkpoint), prepared.prepare_weight, experts, place)
    with torch.inference_mode():
        return V4Model(binder, chosen, binding.table)


def collect() -> None:
    """Drop what only cycles keep alive, so that mapped shards disappear with their session."""
    gc.collect()
