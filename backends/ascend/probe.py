"""What this machine has of Ascend: first by looking, without any vendor's import; then, where asked for, by loading torch_npu."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from v4sdk.errors import BackendUnavailable

from .chip import Chip, Family, by_code
from .versions import cann_of

TOOLKIT_VARIABLE = "ASCEND_HOME_PATH"
VISIBLE_VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
EMULATE_VARIABLE = "V4SDK_ASCEND_EMULATE"
# set for the link-time stand-in of `testing`, whose libraries no NPU stands behind
STAND_IN_VARIABLE = "V4SDK_ASCEND_STUB_SOC"
# runs a command with both, and with the vendor's wheel
EMULATED_RUN = "python -m v4sdk_ascend.testing.run --soc Ascend910B3 -- v4sdk ..."
RUNTIME = "libascendcl.so"
# distributions that bring functions, or that a user may think of; only their metadata is read
PACKS: Mapping[str, str] = {
    "cann_ops_transformer": "cann-ops-transformer",
    "vllm_ascend": "vllm-ascend",
    "triton-ascend": "triton-ascend",
    "onnxruntime-cann": "onnxruntime-cann",
}
_TOOLKIT_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
_DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")
_NODES = Path("/dev")
# set by torchrun: the number of a process among those of its host
_LOCAL_RANK = "LOCAL_RANK"
# in every CANN that torch_npu can start with, and not among what the stand-in has
_REAL_SYMBOL = "aclrtSetDeviceSatMode"


@dataclass(frozen=True)
class Machine:
    """What looking shows; no vendor's Python was imported for it.

    Attributes:
        torch, torch_npu, cann, driver: versions, None where absent or not said. toolkit: folder of CANN.
        missing: why CANN's runtime library cannot be loaded, None if it can.
        nodes: names of device nodes (`davinci0`). packs: versions of other distributions, by our name for them.
        accelerator: another vendor's device that this torch already serves.
        is_stand_in: CANN is the link-time stand-in of `testing`. emulates: `V4SDK_ASCEND_EMULATE` is set.
        has_package: torch_npu can be imported, as far as finding it says.
    """

    torch: str
    torch_npu: str | None
    has_package: bool
    toolkit: Path | None
    cann: str | None
    driver: str | None
    missing: str | None
    nodes: tuple[str, ...]
    accelerator: str | None
    is_stand_in: bool
    emulates: bool
    packs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Device:
    """The NPU in use, by torch_npu.

    Attributes:
        count: of devices to be seen. index: of this one. name, code: of its SoC. chip: None for a code nobody described.
        torch_npu, cann: versions, by themselves. memory: free and total bytes, None where nothing says.
    """

    count: int
    index: int
    name: str
    code: int
    chip: Chip | None
    torch_npu: str
    cann: str | None
    memory: tuple[int, int] | None = None

    @property
    def family(self) -> Family | None:
        """What kernels are built for; None for an unknown chip."""
        return self.chip.family if self.chip else None


def look() -> Machine:
    """Look at files, environment and metadata; loads CANN's runtime library where there is one, and starts nothing."""
    toolkit = _toolkit()
    missing = _unloadable(RUNTIME)
    return Machine(
        torch.__version__, version("torch-npu"), find_spec("torch_npu") is not None, toolkit, _cann_of(toolkit),
        _said(_DRIVER_FILE, "version"), missing,
        tuple(sorted(p.name for p in _NODES.glob("davinci[0-9]*"))), _other_accelerator(),
        missing is None and is_stand_in(), os.environ.get(EMULATE_VARIABLE, "") not in ("", "0"),
        {name: found for name, dist in PACKS.items() if (found := version(dist)) is not None},
    )  # fmt: skip


def load() -> Any:
    """Import torch_npu; the only place that does.

    Raises:
        BackendUnavailable: it cannot be imported: which library is missing, and which CANN it goes with.
    """
    # without this, torch would import it by itself in every process that this one starts
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    installed = version("torch-npu") or "of unknown version"
    try:
        # it prints, and stdout is for answers
        with redirect_stdout(sys.stderr):
            return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError, AttributeError) as exc:
        paired = cann_of(installed)
        released = (
            f"was released for CANN {paired}" if paired else "is newer than the vendor's table of pairs"
        )
        raise BackendUnavailable(
            f"torch_npu {installed} cannot be loaded: {why(exc)}",
            hint=f"source the set_env.sh of CANN; torch_npu {installed} {released}",
        ) from exc


def emulate() -> None:
    """Let the CPU compute the vendor's functions, from the vendor's documents; `load` came before.

    Raises:
        BackendUnavailable: this installation is without the emulators.
    """
    try:
        emulators = importlib.import_module(".testing.emulators", __package__)
    except ModuleNotFoundError as exc:
        raise BackendUnavailable(
            f"{EMULATE_VARIABLE} is set, but the emulators are not part of this installation",
            hint=f"pip install -e . in a checkout of v4sdk brings them; unset {EMULATE_VARIABLE} for an NPU",
        ) from exc
    emulators.install()


def why(error: BaseException) -> str:
    """The library or the symbol that is missing, or the first line of what was said."""
    text = str(error)
    if found := re.search(r"(\S+\.so[.\d]*): cannot open shared object file", text):
        return f"{found[1]} is not found"
    if found := re.search(r"(\S+\.so[.\d]*): undefined symbol: (\w+)", text):
        return f"{Path(found[1]).name} wants {found[2]}, which this CANN does not have"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def find(npu: Any, emulates: bool = False) -> Device:
    """Ask torch_npu for the NPU in use.

    Args:
        npu: what `load` gave. emulates: nothing may be asked that needs a device.

    Raises:
        BackendUnavailable: it sees none.
    """
    devices = torch.get_device_module("npu")
    count = devices.device_count()
    if count == 0:
        visible = os.environ.get(VISIBLE_VARIABLE)
        raise BackendUnavailable(
            "torch_npu sees no NPU" + (f" with {VISIBLE_VARIABLE}={visible}" if visible is not None else ""),
            hint="npu-smi info lists the NPUs of this host; who else uses one, it says too",
        )
    index = 0 if emulates else _current(devices, count)
    # the function of the same name in torch.npu would start the device
    code = int(npu._C._npu_get_soc_version())
    cann = str(npu.npu.utils.get_cann_version()) or None
    return Device(
        count, index, str(devices.get_device_name(index)), code, by_code(code), str(npu.__version__), cann,
        None if emulates else _memory(devices),
    )  # fmt: skip


def version(distribution: str) -> str | None:
    """What a distribution's metadata say; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_stand_in() -> bool:
    """Whether CANN's runtime library is not CANN's."""
    if STAND_IN_VARIABLE in os.environ:
        return True
    try:
        return not hasattr(ctypes.CDLL(RUNTIME), _REAL_SYMBOL)
    except OSError:
        return False


@cache
def _unloadable(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as exc:
        return why(exc)
    return None


def _current(devices: Any, count: int) -> int:
    """The device of this process; those that torchrun starts on a host take one each."""
    local = os.environ.get(_LOCAL_RANK, "")
    if not local.isdecimal():
        return int(devices.current_device())
    if int(local) >= count:
        raise BackendUnavailable(
            f"process {local} of this host has no NPU of its own: {count} are to be seen",
            hint=f"start at most {count} processes on this host: torchrun --nproc-per-node {count}",
        )
    devices.set_device(int(local))
    return int(local)


def _memory(devices: Any) -> tuple[int, int] | None:
    try:
        free, total = devices.mem_get_info()
    except RuntimeError:
        return None
    return int(free), int(total)


def _other_accelerator() -> str | None:
    """A device of another vendor that torch was built for, or that an extension has brought."""
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if found is not None and found.type not in ("cpu", "npu"):
        return found.type
    renamed = torch._C._get_privateuse1_backend_name()
    return None if renamed in ("privateuseone", "npu") else renamed


def _toolkit() -> Path | None:
    for folder in (os.environ.get(TOOLKIT_VARIABLE), *_TOOLKIT_FOLDERS):
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


def _cann_of(toolkit: Path | None) -> str | None:
    if toolkit is None:
        return None
    files = (*toolkit.glob("ascend_*_install.info"), *toolkit.glob("*/ascend_*_install.info"))
    return next((said for file in sorted(files) if (said := _said(file, "version")) is not None), None)


def _said(file: Path, key: str) -> str | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}\s*=\s*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else None
