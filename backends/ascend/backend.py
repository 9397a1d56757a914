"""The Ascend backend: what is on this machine, and where tensors live. It has no kernels yet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from v4sdk.backend import Backend, DoctorRow, MemoryInfo

_TOOLKIT_VARIABLE = "ASCEND_HOME_PATH"
_TOOLKIT_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")


class AscendBackend(Backend):
    """Tensors in the memory of the current Huawei Ascend NPU."""

    name = "ascend"
    # below the CPU until it has kernels that were measured on a device: `auto` must not choose it before
    priority = -1

    def unavailable(self) -> str | None:
        """Look for torch_npu, then ask it for a device; nothing is allocated there."""
        if find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        reason = _import_vendor()
        if reason is not None:
            return reason
        if not torch.get_device_module("npu").is_available():
            return "torch_npu finds no usable NPU"
        return None

    @property
    def device(self) -> torch.device:
        """The current NPU."""
        return torch.device("npu", torch.get_device_module("npu").current_device())

    def synchronize(self) -> None:
        """Wait for the NPU."""
        torch.get_device_module("npu").synchronize()

    def memory(self) -> MemoryInfo | None:
        """Free and total memory of the NPU, by the driver."""
        free, total = torch.get_device_module("npu").mem_get_info()
        return MemoryInfo(free, total)

    def doctor(self) -> Sequence[DoctorRow]:
        """torch_npu and the torch it was built for, the CANN toolkit, the NPU, and the kernels at hand."""
        installed = find_spec("torch_npu") is not None
        toolkit = _toolkit()
        rows = [
            DoctorRow(
                "torch_npu",
                f"{_version()} beside torch {torch.__version__}" if installed else "not installed",
                ok=installed,
                hint=None if installed else "pip install 'v4sdk[ascend]', which also chooses its torch",
            ),
            DoctorRow(
                "CANN toolkit",
                str(toolkit) if toolkit else "not found",
                ok=toolkit is not None,
                hint=None if toolkit else f"source the toolkit's set_env.sh, which sets {_TOOLKIT_VARIABLE}",
            ),
        ]
        if installed:
            reason = self.unavailable()
            rows.append(DoctorRow("NPU", reason or "found, not measured yet", ok=reason is None))
        rows.append(DoctorRow("kernels", "none yet: every op runs its reference on the NPU", ok=True))
        return tuple(rows)


def _import_vendor() -> str | None:
    """Import torch_npu; give the reason in words if its libraries are missing."""
    try:
        __import__("torch_npu")
    except (ImportError, OSError, RuntimeError) as exc:
        return f"torch_npu cannot be loaded: {' '.join(str(exc).split())}"
    return None


def _version() -> str:
    for name in ("torch-npu", "torch_npu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown version"


def _toolkit() -> Path | None:
    for folder in (os.environ.get(_TOOLKIT_VARIABLE), *_TOOLKIT_FOLDERS):
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None
