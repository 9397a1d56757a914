"""The CPU backend: any machine torch runs on. It has no kernels yet, so every op runs its reference."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from v4sdk.backend import Backend, DoctorRow
from v4sdk.weights import ExpertWeights, Weight

# below this a matrix is cheaper to read wide than to unpack on every call; every matrix of a released model is above
_WIDEN_BELOW_BYTES = 4 << 20


class CpuBackend(Backend):
    """Tensors in main memory."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """Always usable: torch itself needs a CPU."""
        return None

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")

    def prepare_weight(self, role: str, weight: Weight) -> Weight:
        """Widen small quantised matrices to float32 once; leave large ones mapped as they are."""
        return _widened(weight)

    def prepare_experts(self, role: str, experts: ExpertWeights) -> ExpertWeights:
        """Widen small experts; large ones stay mapped, and only those that are chosen are ever read."""
        w1, w2, w3 = (tuple(_widened(w) for w in ws) for ws in (experts.w1, experts.w2, experts.w3))
        return ExpertWeights(w1, w2, w3, experts.packed)

    def doctor(self) -> Sequence[DoctorRow]:
        """Threads, instruction set, and the kernels at hand."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = torch.get_num_threads()
        return (
            DoctorRow(
                "threads",
                f"{threads} of {cores} usable cores",
                ok=threads <= cores,
                hint=None if threads <= cores else f"set OMP_NUM_THREADS={cores}",
            ),
            DoctorRow("instructions", torch.backends.cpu.get_cpu_capability(), ok=True),
            DoctorRow("kernels", "none yet: every op runs its reference", ok=True),
        )


def _widened(weight: Weight) -> Weight:
    if 4 * weight.out_features * weight.in_features >= _WIDEN_BELOW_BYTES:
        return weight
    # the encoding is gone, but GEMM inputs are still rounded as for the stored one
    return Weight(weight.dequantize(), quantised=weight.quantised)
