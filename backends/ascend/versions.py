"""Which torch_npu goes with which torch and which CANN: the vendor's table as data, and what it means for a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping

# CANN -> torch_npu versions released for it, newest first: COMPATIBILITY.en.md of Ascend/pytorch at 9e73e70 (2026-08-21)
PAIRS: Mapping[str, tuple[str, ...]] = {
    "9.1.0": ("2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8"),
    "9.0.0": ("2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    "8.5.0": ("2.9.0", "2.8.0.post2", "2.7.1.post2"),
    "8.3.RC1": ("2.8.0", "2.7.1"),
}
NEWEST_CANN = next(iter(PAIRS))


def torch_release(torch_npu: str) -> str:
    """The torch release that a torch_npu was built for: `2.10.0` of `2.10.0.post4`."""
    return _release(torch_npu)


def fits_torch(torch_npu: str, torch: str) -> bool:
    """Whether a torch_npu was built for this torch; both as their metadata say, local parts do not count."""
    return _release(torch_npu) == _release(torch)


def cann_of(torch_npu: str) -> str | None:
    """The CANN that a torch_npu was released for; None for one that is not in the table."""
    plain = torch_npu.split("+")[0]
    return next((cann for cann, versions in PAIRS.items() if plain in versions), None)


def fits_cann(torch_npu: str, cann: str) -> bool | None:
    """Whether a torch_npu was released for this CANN; None where the table does not say.

    A CANN that is newer than the pair's by its last number, or a release candidate of it, is the same line.
    """
    paired = cann_of(torch_npu)
    if paired is None:
        return None
    return _line(paired) == _line(cann)


def pair_for(cann: str | None, torch: str) -> str:
    """The command that installs a pair: for the CANN at hand, and the torch at hand where the table has one for both.

    It ends with the command, so that what is copied from there on can be pasted.
    """
    versions = next(
        (v for known, v in PAIRS.items() if cann and _line(known) == _line(cann)), PAIRS[NEWEST_CANN]
    )
    chosen = next((v for v in versions if fits_torch(v, torch)), versions[0])
    return f"with torch's CPU build, pip install torch=={torch_release(chosen)} torch-npu=={chosen}"


def cpu_build(torch: str) -> str:
    """How to get torch without another vendor's device, beside which torch_npu does not load."""
    return f"install the CPU build of torch {torch}, whose line torch's own selector gives"


def _release(version: str) -> str:
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found[0] if found else version


def _line(cann: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", cann)[:2])
