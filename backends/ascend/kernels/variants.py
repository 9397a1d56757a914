"""What `lowering` compiles: every kernel as V4 calls it, with the tile of each chip, and one tile of each that fits no chip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..chip import Family
from .tiles import TILES, Tile

# name of a row -> (target of the compiler, family whose tiles it takes)
CHIPS: Mapping[str, tuple[str, Family]] = {
    "910B3": ("Ascend910B3", "910B"),
    "910C": ("Ascend910_9382", "910C"),
    "950PR": ("Ascend950PR_9579", "950"),
}
KERNELS = ("mixes", "rope", "swiglu")

_F32, _INT = "*fp32", "i32"
_MIXES = {
    "products": _F32, "mean_square": _F32, "base": _F32, "scale": _F32, "pre": _F32, "post": _F32, "comb": _F32,
    "tokens": _INT, "iterations": _INT, "norm_eps": "fp32", "hc_eps": "fp32",
}  # fmt: skip


def _rope(stored: str) -> dict[str, str]:
    strides = {"token_stride": _INT, "head_stride": _INT, "table_stride": _INT}
    return {"x": stored, "table": _F32, "tokens": _INT, **strides}


def _swiglu(stored: str) -> dict[str, str]:
    results = {"codes": "*i8", "scales": _F32, "rows": _INT, "stride": _INT, "limit": "fp32"}
    return {"gate": stored, "up": stored, "weights": _F32, **results}


@dataclass(frozen=True)
class Variant:
    """One kernel, once compiled.

    Attributes:
        kernel: its module; the function is `<kernel>_kernel`. name: which of the kernel's uses this is.
        signature: types of the arguments. constants: of its `tl.constexpr` parameters, by tile.
        fits: whether the tile must fit; the others are there to be refused.
    """

    kernel: str
    name: str
    signature: Mapping[str, str]
    constants: Callable[[Tile], dict[str, Any]]
    fits: bool = True


VARIANTS: tuple[Variant, ...] = (
    Variant("rope", "q of Flash", _rope("*bf16"), lambda t: t.rope(64, 512, 32, False)),
    Variant("rope", "o of Pro, inverse", _rope("*bf16"), lambda t: t.rope(128, 512, 32, True)),
    Variant("rope", "kv", _rope("*bf16"), lambda t: t.rope(1, 512, 32, False)),
    Variant("rope", "indexer, float32", _rope(_F32), lambda t: t.rope(64, 128, 32, False)),
    Variant("rope", "no chip holds it", _rope(_F32), lambda t: {**t.rope(1024, 512, 32, False), "BH": 1024}, False),
    Variant("mixes", "one token", _MIXES, lambda t: t.mixes(1, 4)),
    Variant("mixes", "many tokens", _MIXES, lambda t: t.mixes(4096, 4)),
    Variant("mixes", "no chip holds it", _MIXES, lambda t: {**t.mixes(4096, 4), "BT": 4096}, False),
    Variant("swiglu", "expert of Flash", _swiglu("*bf16"), lambda t: t.swiglu(2048, True)),
    Variant("swiglu", "expert of Pro", _swiglu("*bf16"), lambda t: t.swiglu(3072, True)),
    Variant("swiglu", "shared expert, float32", _swiglu(_F32), lambda t: t.swiglu(2048, False)),
    Variant(
        "swiglu", "no chip holds it", _swiglu(_F32), lambda t: {**t.swiglu(65536, True), "BLOCK": 65536}, False
    ),
)  # fmt: skip


def find(kernel: str, name: str) -> Variant:
    """The variant of that name."""
    return next(v for v in VARIANTS if (v.kernel, v.name) == (kernel, name))


def constants(variant: Variant, chip: str) -> dict[str, Any]:
    """Its constants on a chip."""
    return variant.constants(TILES[CHIPS[chip][1]])


def source_hash() -> str:
    """Of everything that decides what is compiled: the kernels, their tiles and the variants."""
    digest = hashlib.sha256()
    for name in (*KERNELS, "tiles", "variants"):
        digest.update(files(__package__).joinpath(f"{name}.py").read_bytes())
    return digest.hexdigest()
