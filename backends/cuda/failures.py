"""What Triton raises while it starts a kernel, as one line and a way out: its own exceptions end in a traceback."""

from __future__ import annotations

import os
import shutil
from subprocess import CalledProcessError

from v4sdk.errors import V4Error

C_COMPILER_VARIABLE = "CC"
INSTALL_C_COMPILER = f"install gcc or clang, or set {C_COMPILER_VARIABLE} to the path of a C compiler"


class KernelFailed(V4Error):
    """Triton cannot compile or start a kernel on this machine."""

    way_out = "v4sdk doctor --backend cuda shows what it needs; V4SDK_CUDA_TIERS=OP=torch runs an op without its kernel"


def c_compiler() -> str | None:
    """The C compiler that Triton takes for what it calls the driver with, looked for as it does; None if there is none."""
    given = os.environ.get(C_COMPILER_VARIABLE)
    if given is not None:
        # one word: Triton hands it to the system as it is
        return shutil.which(given)
    return shutil.which("gcc") or shutil.which("clang")


def explained(kernel: str, error: Exception) -> KernelFailed | None:
    """The error in our words; None for one that is not of Triton's compiler or of what it needs.

    Args:
        kernel: the name of the one that was started.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    failed, said = f"kernel `{kernel}` cannot be started: ", _first_line(error)
    if isinstance(error, OutOfResources):
        what = f"it needs {error.required:,} of {error.name}, the chip has {error.limit:,}"
        return KernelFailed(failed + what)
    if isinstance(error, PTXASError):
        return KernelFailed(
            f"{failed}its assembler refuses it: {said}",
            hint="unset TRITON_PTXAS_PATH if it is set, so that Triton takes its own; else another version of Triton",
        )
    if isinstance(error, CompilationError):
        # Triton prints the source first and the reason last
        reason = (error.error_message or "").strip().splitlines()
        return KernelFailed(
            f"{failed}Triton cannot compile it: {reason[0] if reason else type(error).__name__}"
        )
    if isinstance(error, CalledProcessError):
        words = [error.cmd] if isinstance(error.cmd, str) else [str(word) for word in error.cmd]
        return KernelFailed(
            f"{failed}the C compiler `{words[0]}` ended with {error.returncode}",
            hint="install Python's headers (python3-dev), which what Triton compiles for the driver includes",
        )
    text = str(error)
    if isinstance(error, RuntimeError) and "find C compiler" in text:
        return KernelFailed(f"{failed}Triton finds no C compiler", hint=INSTALL_C_COMPILER)
    if isinstance(error, FileNotFoundError) and error.filename == os.environ.get(C_COMPILER_VARIABLE, ""):
        what = f"{C_COMPILER_VARIABLE} is `{error.filename}`, which is no program"
        return KernelFailed(failed + what, hint=INSTALL_C_COMPILER)
    if _is_of_driver(error):
        return KernelFailed(
            f"{failed}Triton does not find libcuda.so.1, the driver's library",
            hint="set TRITON_LIBCUDA_PATH to its folder, or run ldconfig as root where the driver was installed",
        )
    return None


def _is_of_driver(error: Exception) -> bool:
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return "ldconfig" in str(error.filename)
    return (isinstance(error, AssertionError) and "libcuda" in text) or (
        isinstance(error, RuntimeError) and "0 active drivers" in text
    )


def _first_line(error: Exception) -> str:
    # what the assembler itself says comes after a line that only says that it failed
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ptxas")]
    return (told or lines or [type(error).__name__])[0]
