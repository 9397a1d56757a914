"""What a user needs to know about this machine's CUDA software, in words, with the way out of everything that is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from v4sdk.backend import DoctorRow

from .failures import C_COMPILER_VARIABLE, INSTALL_C_COMPILER, c_compiler
from .identity import driver_version
from .target import CHIPS, Target, is_interpreted
from .tiers import TIERS_VARIABLE, Choice, Tier

# the oldest version whose language our kernels are written in
OLDEST_TRITON = (3, 6)
INSTALL_TRITON = "pip install 'v4sdk[cuda]'"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def triton_problem() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TRITON:
        return f"Triton {version} is too old, expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None


def without_gpu() -> str:
    """Why torch, built with CUDA, finds no GPU: no driver, one that is too old, or none to be seen."""
    driver, built = driver_version(), torch.version.cuda
    if driver is None:
        return "there is no NVIDIA driver, or none that answers"
    visible = os.environ.get(_VISIBLE)
    if visible is not None and not visible.strip(" ,"):
        return f"{_VISIBLE} is empty, so no GPU is to be seen"
    if visible is not None and visible.strip().startswith("-1"):
        return f"{_VISIBLE} is {visible}, so no GPU is to be seen"
    return f"NVIDIA driver {driver} serves no GPU to this torch, which was built for CUDA {built}: it may be too old"


def machine_rows(reason: str | None) -> Sequence[DoctorRow]:
    """torch, Triton, driver, C compiler and GPU.

    Args:
        reason: why the backend cannot be used, or None.
    """
    built, problem = torch.version.cuda, triton_problem()
    triton = f"Triton {importlib.metadata.version('triton')}" if problem is None else problem
    rows = [
        DoctorRow(
            "torch", f"{torch.__version__}, " + (f"CUDA {built}" if built else "without CUDA"),
            ok=built is not None or is_interpreted(),
            hint=None if built else "install a CUDA build: pytorch.org/get-started selects one",
        ),
        DoctorRow("triton", triton, ok=problem is None, hint=None if problem is None else INSTALL_TRITON),
    ]  # fmt: skip
    if built and not is_interpreted():
        driver = driver_version()
        rows.append(
            DoctorRow(
                "driver", driver or "none that answers", ok=driver is not None,
                hint=None if driver else "install NVIDIA's driver; in a container, start it with access to the GPU",
            )
        )  # fmt: skip
        rows.append(compiler_row())
    if reason is not None:
        rows.append(DoctorRow("GPU", reason, ok=False, hint="--backend auto takes a backend that works here"))
    return rows


def compiler_row() -> DoctorRow:
    """The C compiler that Triton calls the first time it starts a kernel."""
    found, given = c_compiler(), os.environ.get(C_COMPILER_VARIABLE)
    lacking = (
        f"{C_COMPILER_VARIABLE} is `{given}`, which is no program"
        if given is not None
        else "Triton finds none"
    )
    return DoctorRow(
        "C compiler", found or lacking, ok=found is not None, hint=None if found else INSTALL_C_COMPILER
    )


def chip_row(target: Target) -> DoctorRow:
    """The chip that kernels are made for."""
    capability = f"compute capability {target.arch / 10}"
    if target.evidence == "emulated":
        return DoctorRow(
            "GPU", f"none: kernels are interpreted as {capability}, one program at a time", ok=True
        )
    known = target.arch in CHIPS
    tiles = "" if known else ", not described here: portable tiles, slow but right"
    return DoctorRow("GPU", f"{torch.cuda.get_device_name()}, {capability}{tiles}", ok=True)


def tier_rows(choices: Sequence[Choice], target: Target) -> Sequence[DoctorRow]:
    """Who serves which ops, and why a vendor's library or a kernel of ours does not."""
    rows = []
    tiers: tuple[Tier, ...] = ("vendor", "triton", "torch")
    for tier in tiers:
        for by in dict.fromkeys(c.by for c in choices if c.tier == tier):
            names = [c.op for c in choices if c.tier == tier and c.by == by]
            rows.append(DoctorRow(f"{len(names)} ops by {by}", ", ".join(names), ok=True))
    for choice in choices:
        refused = choice.asked == "vendor" and choice.tier != "vendor"
        rows += [
            DoctorRow(
                f"{choice.op} not by", f"{why}; {TIERS_VARIABLE} asks for it" if refused else why, ok=not refused,
                hint=f"leave {choice.op}=vendor out of {TIERS_VARIABLE}, or do away with the reason" if refused else None,
            )
            for why in choice.passed_over if choice.tier != "torch"
        ]  # fmt: skip
    rows.append(DoctorRow("evidence", target.evidence, ok=True))
    return rows
