"""Stand-ins for the vendor's kernels on the CPU, written from its documents; the dispatcher, schemas and callers stay real.

Nothing here looks at the reference ops of v4sdk: a provider's glue is proven by comparing both. Emulated numbers say nothing of
a device's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import library as dispatcher

# imported for the emulators that they list
from . import (  # noqa: F401
    attention,
    compressor,
    exchange,
    grouped,
    hyper_connection,
    indexer,
    moe,
    norm_rope,
    quant,
    quant_indexer,
    sparse_flash,
)
from . import libraries as packs
from .documented import EMULATORS, Refused, family
from .libraries import define

LIBRARIES = ("npu", *packs.LIBRARIES)

__all__ = ["EMULATORS", "LIBRARIES", "Refused", "define", "family", "install"]


def install(libraries: Sequence[str] = LIBRARIES) -> tuple[str, ...]:
    """Register the emulators of the named libraries as CPU kernels; `npu` needs torch_npu loaded, the others are defined here.

    Again is the same as once. The kernels last as long as the process.

    Returns:
        `library.name` of every op that has an emulator now.

    Raises:
        Refused: the environment names no chip to stand in for.
    """
    family()
    return tuple(key for library in libraries for key in _registered(library)[1])


@cache
def _registered(library: str) -> tuple[dispatcher.Library, tuple[str, ...]]:
    if library in packs.LIBRARIES:
        define(library)
    made = dispatcher.Library(library, "IMPL")  # type: ignore[no-untyped-call]
    names = []
    for (where, name), function in EMULATORS.items():
        if where != library:
            continue
        # a division of work may be asked for without a tensor, and then no device's kernel would be found
        key = "CompositeExplicitAutograd" if name.endswith("_metadata") else "CPU"
        made.impl(name, function, key)  # type: ignore[no-untyped-call]
        names.append(f"{library}.{name}")
    return made, tuple(names)
