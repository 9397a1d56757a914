"""What every compiled kernel must be like: it fits its chip, keeps values in registers, and multiplies where the chip does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .compilation import Compiled
from .target import Target


@dataclass(frozen=True)
class Multipliers:
    """Matrix instructions of one chip, as patterns.

    Attributes:
        small: for tiles of any size. large: for tiles with at least `LARGE_ROWS` rows, which have instructions of their own on
            newer chips.
    """

    small: str
    large: str


# a group of four warps multiplies 64 rows at once where the chip can
LARGE_ROWS = 64
_WARP_GROUP = 4
MULTIPLIERS: Mapping[int, Multipliers] = {
    80: Multipliers("HMMA", "HMMA"),
    89: Multipliers("HMMA|QMMA", "HMMA|QMMA"),
    90: Multipliers("HMMA|HGMMA|QGMMA", "HGMMA|QGMMA"),
    100: Multipliers("HMMA|UTC[A-Z]*MMA", "UTC[A-Z]*MMA"),
    103: Multipliers("HMMA|UTC[A-Z]*MMA", "UTC[A-Z]*MMA"),
    120: Multipliers("HMMA|QMMA|OMMA", "HMMA|QMMA|OMMA"),
}
# what tensor cores multiply without loss of the stored values
NARROW_TYPES = ("bf16", "f16", "f8E4M3FN", "f8E5M2")
# kernel to reason: products that stay in float32 in every numerics
FLOAT32_PRODUCTS: Mapping[str, str] = {
    "sums_kernel": "mixes of streams feed Sinkhorn: float32 by three TF32 products each",
}
# (kernel, chip) to reason: large tiles that the compiler gives the instructions of small ones
SMALL_PRODUCTS: Mapping[tuple[str, int], str] = {}
# (kernel, chip, version of Triton) to reason: registers that do not suffice there
SPILLS: Mapping[tuple[str, int, str], str] = {
    (
        "prompt_kernel",
        90,
        "3.6",
    ): "sums of 64 rows leave 3.6 too few registers, with 16, 32 or 64 keys a step; 3.9 fits",
}
# bytes of the widest load of a kernel that reads weights; exceptions as kernel to (bytes, reason)
WIDE_LOAD = 16
NARROW_LOADS: Mapping[str, tuple[int, str]] = {}


def complaints(made: Compiled, target: Target, reads_weights: bool, is_exact: bool) -> list[str]:
    """What is wrong with one compiled variant, in words.

    Args:
        reads_weights: whether a stored matrix is among its arguments. is_exact: whether it serves the numerics that multiply in
            float32, which are there to be compared with: they must fit the chip, and may be slow.
    """
    found = []
    if made.shared_bytes > target.shared_bytes:
        found.append(f"{made.shared_bytes:,} bytes of shared memory, the chip has {target.shared_bytes:,}")
    if is_exact:
        return found
    accepted = (made.kernel, made.arch, made.triton) in SPILLS
    if made.stack_bytes and not accepted:
        found.append(f"{made.stack_bytes} bytes of stack, expected none")
    if not made.instructions:
        return found
    if made.spills and not accepted:
        found.append(f"{made.spills} loads and stores of spilled registers, expected none")
    least = NARROW_LOADS.get(made.kernel, (WIDE_LOAD, ""))[0]
    if reads_weights and made.widest_load < least:
        found.append(f"its widest load has {made.widest_load} bytes, expected {least}")
    return found + _products(made)


def _products(made: Compiled) -> list[str]:
    found = []
    for kind, rows, columns in made.dots:
        if kind not in NARROW_TYPES and made.kernel not in FLOAT32_PRODUCTS:
            found.append(f"a {rows} x {columns} product of {kind}, expected one of {', '.join(NARROW_TYPES)}")
    narrow = [rows for kind, rows, _ in made.dots if kind in NARROW_TYPES]
    if not narrow:
        return found
    known = MULTIPLIERS[made.arch]
    is_large = max(narrow) >= LARGE_ROWS and _warps(made) >= _WARP_GROUP
    is_large = is_large and (made.kernel, made.arch) not in SMALL_PRODUCTS
    family = known.large if is_large else known.small
    if not any(re.fullmatch(family, name) for name in made.tensor_cores):
        said = ", ".join(made.tensor_cores) or "none"
        found.append(f"matrix instructions {said} for {max(narrow)} rows, expected {family}")
    return found


def _warps(made: Compiled) -> int:
    found = re.search(r"\bwarps=(\d+)", made.variant)
    return int(found[1]) if found else _WARP_GROUP
