"""The CPU backend: any machine torch runs on. It has no kernels yet, so every op runs its reference."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from v4sdk.backend import Backend, DoctorRow


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
