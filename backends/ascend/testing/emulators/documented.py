"""What every emulator shares: which chip is stood in for, how a call outside the vendor's documents is refused, and the list.

An emulator that is lenient proves nothing: what a document lists as unsupported on a chip, or does not list at all, is refused.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...chip import FAMILIES, Family, by_name
from ..stub import SOC

P = ParamSpec("P")
R = TypeVar("R")

HALF = (torch.bfloat16, torch.float16)
FLOAT = (*HALF, torch.float32)
MAX_INT64 = (1 << 63) - 1
# int32 words that a kernel's division of work takes
METADATA = 1024

# (library, name) to its emulator
EMULATORS: dict[tuple[str, str], Callable[..., Any]] = {}


class Refused(ValueError):
    """The vendor's documents do not list such a call for this chip."""


def family() -> Family:
    """The family of the chip named in the stand-in's environment variable.

    Raises:
        Refused: none is named, or not one that is known.
    """
    name = os.environ.get(SOC, "")
    chip = by_name(name)
    if chip is None:
        raise Refused(f"{SOC} is `{name}`, expected the name of a chip")
    return chip.family


def refuse(unsupported: bool, words: str) -> None:
    """Refuse a call if it is not supported, saying what was passed and what is."""
    if unsupported:
        raise Refused(words)


def emulates(
    library: str, name: str, chips: Iterable[Family] = FAMILIES
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """List a function as the emulator of `library::name`, for the chips that the vendor's document lists."""
    listed = frozenset(chips)

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            here = family()
            refuse(
                here not in listed, f"{name} is documented for {', '.join(sorted(listed))}, not for {here}"
            )
            return function(*args, **kwargs)

        EMULATORS[library, name] = run
        return run

    return declare


def want_dtype(name: str, x: Tensor, *listed: torch.dtype) -> None:
    """Refuse a tensor of a dtype that is not listed."""
    names = ", ".join(str(d).removeprefix("torch.") for d in listed)
    refuse(x.dtype not in listed, f"{name} is {str(x.dtype).removeprefix('torch.')}, documented are {names}")


def want_shape(name: str, x: Tensor, *shape: int | None) -> None:
    """Refuse a tensor of another shape; None stands for any length."""
    fits = x.dim() == len(shape) and all(s in (None, n) for s, n in zip(shape, x.shape, strict=True))
    refuse(not fits, f"{name} has shape {list(x.shape)}, documented is {list(shape)}")


def want_contiguous(**tensors: Tensor | None) -> None:
    """Refuse tensors with gaps or another order in memory."""
    for name, x in tensors.items():
        refuse(x is not None and not x.is_contiguous(), f"{name} is not contiguous")


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that a kernel leaves as it was: NaN, or the lowest integer, so that whoever reads it is found out."""
    lowest = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, lowest, dtype=dtype)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: scale = rowmax(|x|) / 127, y = round to nearest even of x / scale.

    Shapes:
        x [..., n] float32 -> y [..., n] int8, scale [...] float32; a row of zeros has scale 0 and stays zero
    """
    scale = x.abs().amax(-1) / 127
    y = torch.round(x / torch.where(scale == 0, 1, scale)[..., None])
    return y.clamp(-128, 127).to(torch.int8), scale


def division_of_work(**facts: object) -> Tensor:
    """What a metadata function returns: int32 [1024] that the kernel alone reads. Here it remembers what it was made for.

    Args:
        facts: lengths and parameters by name; tensors are read.
    """
    made_for = torch.zeros(METADATA, dtype=torch.int32)
    made_for[: len(facts)] = torch.tensor([_code(f) for f in facts.values()], dtype=torch.int32)
    return made_for


def want_division(metadata: Tensor | None, **facts: object) -> None:
    """Refuse metadata that is missing or was made for other lengths or parameters than the call it is passed to."""
    if metadata is None:
        raise Refused("metadata is required: the kernel takes its division of work from there")
    want_dtype("metadata", metadata, torch.int32)
    want_shape("metadata", metadata, METADATA)
    codes = metadata.tolist()
    other = [name for (name, fact), code in zip(facts.items(), codes, strict=False) if _code(fact) != code]
    refuse(bool(other), f"metadata was made for another {', '.join(other)}")


def _code(fact: object) -> int:
    said = fact.tolist() if isinstance(fact, Tensor) else fact
    return zlib.crc32(repr(said).encode()) & 0x7FFFFFFF
