"""The chips: families, their SoC codes and names, and what a family can and cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["910B", "910C", "950"]
FAMILIES: tuple[Family, ...] = ("910B", "910C", "950")
# names that users know the boards by
BOARDS: dict[Family, str] = {"910B": "A2", "910C": "A3", "950": "950PR/DT"}


@dataclass(frozen=True)
class Chip:
    """One chip as its driver names it.

    Attributes:
        name: SoC name ("Ascend910B3"). code: SoC code of the vendor's library. family: what its kernels are built for.
    """

    name: str
    code: int
    family: Family


# SoC codes: NpuVariables.h of torch_npu
CHIPS: tuple[Chip, ...] = (
    Chip("Ascend910B1", 220, "910B"), Chip("Ascend910B2", 221, "910B"), Chip("Ascend910B2C", 222, "910B"),
    Chip("Ascend910B3", 223, "910B"), Chip("Ascend910B4", 224, "910B"), Chip("Ascend910B4-1", 225, "910B"),
    Chip("Ascend910_9391", 250, "910C"), Chip("Ascend910_9392", 251, "910C"), Chip("Ascend910_9381", 252, "910C"),
    Chip("Ascend910_9382", 253, "910C"), Chip("Ascend910_9372", 254, "910C"), Chip("Ascend910_9362", 255, "910C"),
    Chip("Ascend910_9363", 256, "910C"), Chip("Ascend950PR", 260, "950"),
)  # fmt: skip


def by_code(code: int) -> Chip | None:
    """The chip of a SoC code; None for one that is not known here, on which only parts and references run."""
    return next((chip for chip in CHIPS if chip.code == code), None)


def by_name(name: str) -> Chip | None:
    """The chip of a SoC name."""
    return next((chip for chip in CHIPS if chip.name == name), None)
