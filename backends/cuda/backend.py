"""The CUDA backend: our Triton kernels on the current NVIDIA GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from v4sdk import ops
from v4sdk.backend import Backend, DoctorRow, EngineConfig, Evidence, Kernel, MemoryInfo, kernel
from v4sdk.config import ModelConfig
from v4sdk.weights import ExpertWeights, stack

from . import target as targets
from .debug import checked, is_debugging
from .doctor import INSTALL_TRITON, chip_row, machine_rows, tier_rows, triton_problem, without_gpu
from .graph import RecordedStep
from .identity import identity, profiled
from .launch import Launch
from .tiers import PROVIDERS, Choice, choose

log = logging.getLogger("v4sdk")

# bfloat16 arithmetic starts here
_OLDEST_CAPABILITY = (8, 0)
# the width of a tile of FP8 weights that kernels can read
_FP8_BLOCK = (128, 128)
# op and case to the cause
INTERPRETED_GAPS: Mapping[str, str] = {
    "index_query/wide-decode-fast": "one of 6,144 values lies within 1e-7 of a BF16 tie, and the other side is another FP4 step",
}


class CudaBackend(Backend):
    """Tensors in the memory of the current NVIDIA GPU; under TRITON_INTERPRET=1 in main memory, one program at a time."""

    name = "cuda"
    # below the CPU until its kernels were measured on a device: `auto` must not choose it before
    priority = -1
    software = ("triton",)

    @property
    def evidence(self) -> Evidence:  # type: ignore[override]
        """`device` on a GPU, `emulated` in the interpreter."""
        return "emulated" if targets.is_interpreted() else "device"

    @property
    def known_gaps(self) -> Mapping[str, str]:  # type: ignore[override]
        """Of the interpreter's order of summation; a GPU adds in another and is held to every case."""
        return INTERPRETED_GAPS if targets.is_interpreted() else {}

    def unavailable(self) -> str | None:
        """Ask torch, which asks the driver; nothing is allocated on the device."""
        if targets.is_interpreted():
            return None if find_spec("triton") else "TRITON_INTERPRET is set, but Triton is not installed"
        if torch.version.hip is not None:
            return f"torch {torch.__version__} was built for ROCm"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        if not torch.cuda.is_available():
            return without_gpu()
        capability = torch.cuda.get_device_capability()
        if capability < _OLDEST_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected 8.0 or newer"
        return None

    @property
    def device(self) -> torch.device:
        """The current GPU, or main memory for the interpreter."""
        if targets.is_interpreted():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def target(self) -> targets.Target:
        """The chip that kernels are made for."""
        return targets.interpreted() if targets.is_interpreted() else targets.present()

    def capability(self) -> Mapping[str, Any]:
        """The chip's compute capability, as major * 10 + minor."""
        return {"arch": self.target.arch}

    @cached_property
    def launch(self) -> Launch:
        """The door through which this backend's kernels start; imports Triton."""
        if targets.is_interpreted():
            from .interpreter import install

            install()
        return Launch(self.target, self.device)

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        """The table; empty where Triton is not installed or too old: then every op runs its parts or its reference."""
        if triton_problem() is not None:
            log.warning("%s: every op runs its reference; %s", triton_problem(), INSTALL_TRITON)
            return ()
        rows = self._chosen[0]
        return checked(rows) if is_debugging() else rows

    @cached_property
    def _ours(self) -> Sequence[Kernel[Any, Any]]:
        return table(self.launch)

    @cached_property
    def _chosen(self) -> tuple[Sequence[Kernel[Any, Any]], tuple[Choice, ...]]:
        # libraries are loaded and tried for it, so once, however many models are bound
        return choose(self.launch, self._ours)

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Stack the experts of one layer in the device's memory, so that a step chooses among them there."""
        if experts.packed is not None and not experts.w1:
            return experts.to(self.device)
        stacks = (stack(experts.w1), stack(experts.w2), stack(experts.w3))
        return ExpertWeights(packed=stacks).to(self.device)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not targets.is_interpreted():
            torch.cuda.synchronize()

    def memory(self) -> MemoryInfo | None:
        """Free and total memory of the GPU, by the driver."""
        if targets.is_interpreted():
            return None
        free, total = torch.cuda.mem_get_info()
        return MemoryInfo(free, total)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture a step as a CUDA graph, after the first run of it."""
        return step if targets.is_interpreted() or is_debugging() else RecordedStep(step, self._pool)

    @cached_property
    def _pool(self) -> Any:
        # one recorded step follows another when a page is full: the next takes over the memory of the last
        return torch.cuda.graph_pool_handle()

    def launches(self, step: Callable[[], object]) -> Mapping[str, int]:
        """Kernels by name: on a GPU as its profiler saw them, in the interpreter our own only."""
        if not targets.is_interpreted():
            return profiled(step)
        self.launch.tally = Counter()
        try:
            step()
            return self.launch.tally
        finally:
            self.launch.tally = None

    def variants(self, op: str) -> Mapping[str, Callable[..., Any]]:
        """`routed_experts` with a launch for every step; `ours` of an op that a vendor's library serves."""
        if triton_problem() is not None:
            return {}
        served = any(choice.op == op and choice.tier == "vendor" for choice in self._chosen[1])
        ours = [("ours", row.function) for row in self._ours if served and row.op.name == op]
        return {**dict(ours), **variants(self.launch, op)}

    def declined(self, op: str) -> Sequence[str]:
        """Vendors' libraries that have a function for an op and do not serve it, each with its reason."""
        if triton_problem() is not None:
            return ()
        known = {provider.op for provider in PROVIDERS}
        return [
            why for choice in self._chosen[1] if choice.op == op and op in known for why in choice.passed_over
        ]

    def close(self) -> None:
        """Give cached memory back to the driver."""
        if not targets.is_interpreted():
            # does nothing where no memory was ever asked for
            torch.cuda.empty_cache()

    def identity(self) -> Mapping[str, str | float] | None:
        """The GPU by name, UUID and driver, and the time of a small kernel by its own clock."""
        return None if targets.is_interpreted() else identity(torch.cuda.current_device())

    def doctor(self) -> Sequence[DoctorRow]:
        """torch's build, the driver, the GPU, Triton, and who serves each op."""
        reason = self.unavailable()
        return (*machine_rows(reason), *(() if reason else self._kernel_rows()))

    def _kernel_rows(self) -> Sequence[DoctorRow]:
        if triton_problem() is not None:
            return ()
        return (chip_row(self.target), *tier_rows(self._chosen[1], self.target))


def table(launch: Launch) -> Sequence[Kernel[Any, Any]]:
    """Every op that has a kernel of ours; imports Triton."""
    from .attention import Attention, too_wide
    from .compressor import Compressor
    from .embedding import Embedding
    from .hyper_connection import HyperConnection
    from .indexer import Indexer
    from .linear import Linear
    from .moe import MoE
    from .norm import Norm
    from .projection import Projection
    from .sample import Sample

    linear, norm, moe = Linear(launch), Norm(launch), MoE(launch)
    compressor = Compressor(launch)
    embedding, hyper = Embedding(launch), HyperConnection(launch)
    projection, sample = Projection(launch), Sample(launch)
    return (
        kernel(ops.linear, linear.linear, matrices_unserved),
        kernel(ops.logits, linear.logits, unserved),
        kernel(ops.rms_norm, norm.rms_norm, unserved),
        kernel(ops.route, moe.route, unserved),
        kernel(ops.route_hash, moe.route_hash, unserved),
        kernel(ops.routed_experts, moe.routed_experts, matrices_unserved),
        kernel(ops.shared_expert, moe.shared_expert, matrices_unserved),
        kernel(ops.compress, compressor.compress, unserved),
        kernel(ops.index_query, compressor.index_query, matrices_unserved),
        kernel(ops.sparse_attn, Attention(launch).sparse_attn, lambda c, e: unserved(c, e) or too_wide(c, e)),
        kernel(ops.embed, embedding.embed, unserved),
        kernel(ops.rope_table, embedding.rope_table, unserved),
        kernel(ops.hc_pre, hyper.hc_pre, unserved),
        kernel(ops.hc_post, hyper.hc_post, unserved),
        kernel(ops.hc_post_pre, hyper.hc_post_pre, unserved),
        kernel(ops.hc_head, hyper.hc_head, unserved),
        kernel(ops.q_project, projection.q_project, matrices_unserved),
        kernel(ops.kv_project_store, projection.kv_project_store, matrices_unserved),
        kernel(ops.grouped_out, projection.grouped_out, matrices_unserved),
        kernel(ops.index_topk, Indexer(launch).index_topk, unserved),
        kernel(ops.sample, sample.sample, unserved),
        kernel(ops.feed, sample.feed, unserved),
    )


def variants(launch: Launch, op: str) -> Mapping[str, Callable[..., Any]]:
    """Other ways to compute an op, for benchmarks that compare; imports Triton."""
    if op != ops.routed_experts.name:
        return {}
    from .unfused import UnfusedExperts

    return {"unfused": UnfusedExperts(launch).routed_experts}


def unserved(config: ModelConfig, engine: EngineConfig) -> str | None:
    """What no kernel of this backend computes."""
    if engine.numerics.float64:
        return "float64 is a witness of the references"
    if config.quantization is not None and config.quantization.block != _FP8_BLOCK:
        return f"FP8 weights in tiles of {config.quantization.block}, expected {_FP8_BLOCK}"
    return None


def matrices_unserved(config: ModelConfig, engine: EngineConfig) -> str | None:
    """The same of ops whose matrices may be integers: the references read them on the GPU, every value as stored."""
    if config.integers is not None:
        return f"integer matrices of layout `{config.integers.name}` are read by the reference"
    return unserved(config, engine)
