"""What a kernel may know about the chip it is made for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from v4sdk.backend import Evidence
from v4sdk.errors import V4Error

# Triton's own switch: kernels run on the CPU, one program after the other
INTERPRET_VARIABLE = "TRITON_INTERPRET"
# which chip's numbers and tiles an interpreted run takes
ARCH_VARIABLE = "V4SDK_CUDA_ARCH"
_DEFAULT_ARCH = 90


@dataclass(frozen=True)
class Chip:
    """Facts of one compute capability.

    Attributes:
        shared_bytes: most shared memory of one block. multiprocessors: of its largest common card.
        names: cards that users know it by.
    """

    shared_bytes: int
    multiprocessors: int
    names: str


# CUDA programming guide, table of technical specifications per compute capability
CHIPS: Mapping[int, Chip] = {
    80: Chip(163 << 10, 108, "A100"),
    89: Chip(99 << 10, 142, "L40S, RTX 4090"),
    90: Chip(227 << 10, 132, "H100, H200"),
    100: Chip(227 << 10, 148, "B200, GB200"),
    103: Chip(227 << 10, 148, "B300, GB300"),
    120: Chip(99 << 10, 188, "RTX PRO 6000, RTX 5090"),
}
# a chip nobody described: what the smallest of the known ones has
_UNKNOWN = Chip(99 << 10, 80, "unknown")


@dataclass(frozen=True)
class Target:
    """The chip that wrappers choose tiles for.

    Attributes:
        arch: compute capability, major * 10 + minor. multiprocessors: how many blocks run at once.
        shared_bytes: most shared memory of one block. evidence: what a result computed here is worth.
    """

    arch: int
    multiprocessors: int
    shared_bytes: int
    evidence: Evidence

    @property
    def family(self) -> str:
        """The row of a tile table: chips of one generation share it; `any` for chips nobody described."""
        return {80: "80", 89: "89", 90: "90", 100: "100", 103: "100", 120: "120"}.get(self.arch, "any")

    @property
    def has_fp8(self) -> bool:
        """Whether the chip converts and multiplies E4M3 by itself."""
        return self.arch >= 89


def described(arch: int, evidence: Evidence) -> Target:
    """A target from the table alone, for chips that are not here."""
    chip = CHIPS.get(arch, _UNKNOWN)
    return Target(arch, chip.multiprocessors, chip.shared_bytes, evidence)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as the environment says now."""
    return os.environ.get(INTERPRET_VARIABLE, "0") not in ("", "0")


def interpreted() -> Target:
    """The chip that an interpreted run stands for.

    Raises:
        V4Error: the variable names no known chip.
    """
    given = os.environ.get(ARCH_VARIABLE, str(_DEFAULT_ARCH))
    if not given.isdigit() or int(given) not in CHIPS:
        raise V4Error(
            f"{ARCH_VARIABLE} is `{given}`, expected one of {', '.join(map(str, CHIPS))}",
            hint=f"unset it to interpret kernels as compute capability {_DEFAULT_ARCH / 10}",
        )
    return described(int(given), "emulated")


def present() -> Target:
    """The current GPU. Asks the driver."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or CHIPS.get(arch, _UNKNOWN).shared_bytes
    return Target(arch, properties.multi_processor_count, shared, "device")
