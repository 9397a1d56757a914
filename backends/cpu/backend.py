"""The CPU backend: compiled kernels where they were built and the processor has the instructions, references elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from v4sdk import ops
from v4sdk.backend import Backend, DoctorRow, EngineConfig, Evidence, ExpertPaging, Kernel, Settling, kernel
from v4sdk.config import ModelConfig
from v4sdk.weights import ExpertWeights, Weight

from .identity import identity
from .kernels import EMPTY_LEVEL, THREADS_VARIABLE, Library, native_library
from .record import RecordedStep
from .residency import CAN_PAGE, Residency, doctor_row
from .settling import settling, weights_row

# below this a matrix is cheaper for torch to read wide than to unpack on every call; every matrix of a released model is above
_WIDEN_BELOW_BYTES = 4 << 20


class CpuBackend(Backend):
    """Tensors in main memory."""

    name = "cpu"
    pages_experts = CAN_PAGE

    @property
    def evidence(self) -> Evidence:  # type: ignore[override]
        """What the results of kernels are worth: the processor is the device, and it is here."""
        return "reference" if native_library() is None else "device"

    def unavailable(self) -> str | None:
        """Always usable: torch itself needs a CPU."""
        return None

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        """The table; empty where nothing was compiled."""
        native = native_library()
        return () if native is None else _table(native)

    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Leave weights mapped as they are; without kernels, widen small quantised matrices to float32 once."""
        return weight if native_library() else _widened(weight)

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Leave experts mapped, so that only those that are chosen are ever read; without kernels, widen small ones."""
        if native_library():
            return experts
        w1, w2, w3 = (tuple(_widened(w) for w in ws) for ws in (experts.w1, experts.w2, experts.w3))
        return ExpertWeights(w1, w2, w3, experts.packed)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Replay a step from argument blocks bound once."""
        native = native_library()
        return step if native is None else RecordedStep(native, step)

    def close(self) -> None:
        """End the kernels' threads."""
        native = native_library()
        if native is not None:
            native.rest()

    def with_threads(self, count: int) -> AbstractContextManager[None]:
        """Resize the team."""
        native = native_library()
        return nullcontext() if native is None else native.at_threads(count)

    def hollow(self) -> AbstractContextManager[None] | None:
        """Run the level whose kernels do nothing."""
        native = native_library()
        return None if native is None else native.at_level(EMPTY_LEVEL)

    def identity(self) -> Mapping[str, str | float] | None:
        """The processor, where its own kernels run."""
        native = native_library()
        return None if native is None else identity(native)

    def page_experts(self, budget_bytes: int) -> ExpertPaging:
        """Map the routed experts and keep `budget_bytes` of them in memory."""
        return Residency(budget_bytes, native_library())

    def settling(self) -> Settling | None:
        """Copy weights into large pages, where kernels were built to read them."""
        return settling(native_library())

    def doctor(self) -> Sequence[DoctorRow]:
        """Threads, instruction set, and the kernels at hand."""
        native = native_library()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = torch.get_num_threads() if native is None else native.threads
        variable = "OMP_NUM_THREADS" if native is None else THREADS_VARIABLE
        return (
            DoctorRow(
                "threads",
                f"{threads} of {cores} usable cores",
                ok=threads <= cores,
                hint=None if threads <= cores else f"set {variable}={cores}",
            ),
            DoctorRow("instructions", torch.backends.cpu.get_cpu_capability(), ok=True),
            _kernels_row(native),
            weights_row(native),
            doctor_row(native),
        )


def _kernels_row(native: Library | None) -> DoctorRow:
    if native is None:
        return DoctorRow(
            "kernels",
            "not built: every op runs its reference",
            ok=False,
            hint="install a C++17 compiler and run pip install --force-reinstall --no-deps on the source",
        )
    others = ", ".join(native.levels[1:])
    return DoctorRow("kernels", f"level {native.level} (also here: {others})", ok=True)


def _table(native: Library) -> Sequence[Kernel[Any, Any]]:
    from .attention import Attention, too_wide
    from .compressor import Compressor, too_long
    from .embedding import Embedding
    from .hyper_connection import HyperConnection
    from .indexer import Indexer
    from .linear import Linear
    from .moe import MoE
    from .norm import Norm
    from .projection import Projection
    from .sample import Sample

    projection, compressor = Projection(native), Compressor(native)
    embedding, sample, moe = Embedding(native), Sample(native), MoE(native)
    linear, norm, hyper = Linear(native), Norm(native), HyperConnection(native)
    return (
        kernel(ops.embed, embedding.embed, _float64),
        kernel(ops.rope_table, embedding.rope_table),
        kernel(ops.sample, sample.sample),
        kernel(ops.feed, sample.feed),
        kernel(ops.q_project, projection.q_project, _matrices),
        kernel(ops.kv_project_store, projection.kv_project_store, _matrices),
        kernel(ops.grouped_out, projection.grouped_out, _matrices),
        kernel(ops.compress, compressor.compress, too_long),
        kernel(ops.index_query, compressor.index_query, _matrices),
        kernel(ops.sparse_attn, Attention(native).sparse_attn, too_wide),
        kernel(ops.index_topk, Indexer(native).index_topk, _float64),
        kernel(ops.route, moe.route, _float64),
        kernel(ops.route_hash, moe.route_hash, _float64),
        kernel(ops.routed_experts, moe.routed_experts, _matrices),
        kernel(ops.shared_expert, moe.shared_expert, _matrices),
        kernel(ops.linear, linear.linear, _matrices),
        kernel(ops.logits, linear.logits, _float64),
        kernel(ops.rms_norm, norm.rms_norm, _float64),
        kernel(ops.hc_pre, hyper.hc_pre, _float64),
        kernel(ops.hc_post, hyper.hc_post, _float64),
        kernel(ops.hc_post_pre, hyper.hc_post_pre, _float64),
        kernel(ops.hc_head, hyper.hc_head, _float64),
    )


def _float64(config: ModelConfig, engine: EngineConfig) -> str | None:
    """Kernels compute in float32."""
    return "float64 is a witness of the references" if engine.numerics.float64 else None


def _matrices(config: ModelConfig, engine: EngineConfig) -> str | None:
    """Of ops whose matrices may be integers: the references read them block by block, every value as stored."""
    if config.integers is not None:
        return f"integer matrices of layout `{config.integers.name}` are read by the reference"
    return _float64(config, engine)


def _widened(weight: Weight) -> Weight:
    if 4 * weight.out_features * weight.in_features >= _WIDEN_BELOW_BYTES:
        return weight
    # the encoding is gone, but GEMM inputs are still rounded as for the stored one
    return Weight(weight.dequantize(), quantised=weight.quantised)
