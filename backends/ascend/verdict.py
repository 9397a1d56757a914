"""Whether a machine can be used, and what its chip can run: in words, with the way out of everything that is missing."""

from __future__ import annotations

from dataclasses import dataclass

from .chip import BOARDS
from .probe import EMULATE_VARIABLE, EMULATED_RUN, STAND_IN_VARIABLE, Device, Machine
from .versions import NEWEST_CANN, cann_of, cpu_build, fits_torch, pair_for, torch_release


@dataclass(frozen=True)
class Refusal:
    """Why Ascend cannot be used here, in words, and the way out."""

    reason: str
    hint: str


def refusal(machine: Machine) -> Refusal | None:
    """Why a machine cannot be used, as far as looking says; None if torch_npu may be loaded."""
    for judge in (_without_package, _with_wrong_torch, _without_runtime, _without_npu):
        found = judge(machine)
        if found is not None:
            return found
    return None


def _without_package(m: Machine) -> Refusal | None:
    if m.has_package:
        return None
    if m.emulates:
        return Refusal(
            f"{EMULATE_VARIABLE} is set, and torch_npu, whose dispatcher takes the calls, is not installed",
            f"in a checkout, {EMULATED_RUN} brings it for one command",
        )
    install = pair_for(m.cann, m.torch)
    if m.toolkit is None and m.missing is not None:
        return Refusal(
            "neither CANN nor torch_npu is installed",
            "--backend auto takes another; or install the NPU's driver and "
            f"CANN {NEWEST_CANN}, source its set_env.sh, then {install}",
        )
    what = f"CANN {m.cann}" if m.cann else "CANN"
    return Refusal(f"{what} is here, but torch_npu is not installed", install)


def _with_wrong_torch(m: Machine) -> Refusal | None:
    if m.torch_npu is not None and not fits_torch(m.torch_npu, m.torch):
        wanted = torch_release(m.torch_npu)
        return Refusal(
            f"torch_npu {m.torch_npu} was built for torch {wanted}, and this is torch {m.torch}",
            f"{cpu_build(wanted)}, or another pair: {pair_for(m.cann, m.torch)}",
        )
    if m.accelerator is not None:
        release = torch_release(m.torch)
        return Refusal(
            f"this torch already serves `{m.accelerator}`, and two vendors' devices cannot share a process",
            f"in an environment of its own: {cpu_build(release)}",
        )
    return None


def _without_runtime(m: Machine) -> Refusal | None:
    if m.missing is None:
        return None
    if m.toolkit is not None:
        return Refusal(
            f"CANN in {m.toolkit} cannot be loaded: {m.missing}",
            f"source {m.toolkit}/set_env.sh, or set_env.sh beside it",
        )
    if m.emulates:
        return Refusal(
            f"{EMULATE_VARIABLE} is set, and torch_npu finds no CANN to start with: {m.missing}",
            f"in a checkout, {EMULATED_RUN} stands in for it",
        )
    paired = cann_of(m.torch_npu or "")
    what = f"CANN {paired}, which torch_npu {m.torch_npu} was released for" if paired else "CANN"
    return Refusal(
        f"torch_npu is installed, but CANN is not found: {m.missing}",
        f"install {what}, and source its set_env.sh",
    )


def _without_npu(m: Machine) -> Refusal | None:
    if m.emulates:
        return None
    if m.is_stand_in:
        return Refusal(
            "CANN is a link-time stand-in here, behind which there is no NPU",
            f"{EMULATE_VARIABLE}=1 computes the vendor's functions on the CPU; unset {STAND_IN_VARIABLE} for a real one",
        )
    if not m.nodes:
        return Refusal(
            "there is no /dev/davinci*: no NPU, no driver, or a container that was given none",
            "npu-smi info lists the NPUs of a host; a container wants --device /dev/davinci0 --device /dev/davinci_manager",
        )
    return None


def verdict(device: Device) -> str:
    """What this chip can run, in one line."""
    if device.family is None:
        return f"SoC code {device.code} is not known here: no vendor's function is called, ops run their references"
    board = f"{device.family} ({BOARDS[device.family]})"
    if device.family == "950":
        return f"{board}: FP8 and FP4 checkpoints as they are"
    return f"{board}: INT8 or INT4 checkpoints, made by v4sdk convert; it has no FP8 or FP4 matrix products"
