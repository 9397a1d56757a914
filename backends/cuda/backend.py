"""The CUDA backend: what is on this machine, and where tensors live. It has no kernels yet."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from v4sdk.backend import Backend, DoctorRow, MemoryInfo

# bfloat16 arithmetic starts here
_OLDEST_CAPABILITY = (8, 0)


class CudaBackend(Backend):
    """Tensors in the memory of the current NVIDIA GPU."""

    name = "cuda"
    # below the CPU until it has kernels that were measured on a device: `auto` must not choose it before
    priority = -1

    def unavailable(self) -> str | None:
        """Ask torch, which asks the driver; nothing is allocated on the device."""
        if torch.version.hip is not None:
            return f"torch {torch.__version__} was built for ROCm"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        if not torch.cuda.is_available():
            return "torch finds no usable NVIDIA driver or GPU"
        capability = torch.cuda.get_device_capability()
        if capability < _OLDEST_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected 8.0 or newer"
        return None

    @property
    def device(self) -> torch.device:
        """The current GPU."""
        return torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def memory(self) -> MemoryInfo | None:
        """Free and total memory of the GPU, by the driver."""
        free, total = torch.cuda.mem_get_info()
        return MemoryInfo(free, total)

    def doctor(self) -> Sequence[DoctorRow]:
        """torch's build, the GPU, Triton, and the kernels at hand."""
        built = torch.version.cuda
        rows = [
            DoctorRow(
                "torch",
                f"{torch.__version__}, " + (f"CUDA {built}" if built else "without CUDA"),
                ok=built is not None,
                hint=None if built else "install a CUDA build: pytorch.org/get-started selects one",
            ),
            self._gpu_row(),
            DoctorRow(
                "triton",
                "installed" if find_spec("triton") else "not installed",
                ok=find_spec("triton") is not None,
                hint=None if find_spec("triton") else "pip install 'v4sdk[cuda]'",
            ),
            DoctorRow("kernels", "none yet: every op runs its reference on the GPU", ok=True),
        ]
        return tuple(rows)

    def _gpu_row(self) -> DoctorRow:
        reason = self.unavailable()
        if reason is not None:
            return DoctorRow("GPU", reason, ok=False)
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return DoctorRow("GPU", f"{name}, compute capability {major}.{minor}, not measured yet", ok=True)
