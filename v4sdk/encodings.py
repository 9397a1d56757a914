"""How a checkpoint stores its matrices, as `quantization_config` says it: FP8 tiles, or integers by row. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from v4sdk.errors import ConfigError

Encoding = Literal["float", "fp8", "fp4", "int8", "int4"]
# the `quant_method` of folders that `v4sdk convert` writes; other programs do not know it, and so refuse them
INTEGER_METHOD = "v4sdk-integer"


@dataclass(frozen=True)
class QuantizationConfig:
    """How a quantised checkpoint stores dense weights: FP8 E4M3 tiles of `block` with UE8M0 (or float32) scales."""

    block: tuple[int, int] = (128, 128)
    scale_fmt: str = "ue8m0"


@dataclass(frozen=True)
class IntegerLayout:
    """Which matrices a folder stores as integers with float32 scales; every other tensor of it is float.

    Attributes:
        name: the layout's, as `v4sdk convert --for` takes it.
        int8, int4: patterns of matrix names (`*.attn.wq_b`), `*` standing for anything; int8 is asked first.
        int4_group: columns of a row that share an int4 scale; 0 for all of them. An int8 row has one scale.

    Raises:
        ConfigError: naming the attribute, its value, and what was expected.
    """

    name: str
    int8: tuple[str, ...] = ()
    int4: tuple[str, ...] = ()
    int4_group: int = 0

    def __post_init__(self) -> None:
        for kind in ("int8", "int4"):
            patterns: Any = getattr(self, kind)
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
                raise ConfigError(
                    f"`quantization_config.{kind}` is {patterns!r}, expected patterns of matrix names such as `*.attn.wq_b`"
                )
        if not self.int8 and not self.int4:
            raise ConfigError(f"layout `{self.name}` names no matrix in `int8` or `int4`")
        if type(self.int4_group) is not int or self.int4_group < 0 or self.int4_group % 2:
            raise ConfigError(
                f"`quantization_config.int4_group` is {self.int4_group!r}, expected an even number of columns, or 0"
            )

    def encoding(self, matrix: str) -> Encoding:
        """How the matrix of this name (`layers.0.attn.wq_b`, without `.weight`) is stored."""
        if any(fnmatchcase(matrix, pattern) for pattern in self.int8):
            return "int8"
        return "int4" if any(fnmatchcase(matrix, pattern) for pattern in self.int4) else "float"

    def scales(self, encoding: Encoding, columns: int) -> int:
        """How many scales a row of an integer matrix has."""
        return columns // self.int4_group if encoding == "int4" and self.int4_group else 1

    def raw(self) -> dict[str, Any]:
        """The content of `quantization_config`."""
        return {
            "quant_method": INTEGER_METHOD,
            "activation_scheme": "dynamic",
            "layout": self.name,
            "int8": list(self.int8),
            "int4": list(self.int4),
            "int4_group": self.int4_group,
        }


def parse_quantization(quant: Mapping[str, Any]) -> QuantizationConfig | IntegerLayout:
    """Validate `quantization_config`.

    Raises:
        ConfigError: naming the field, its value, and what was expected.
    """
    if quant.get("quant_method") == INTEGER_METHOD:
        name = quant.get("layout")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"`quantization_config.layout` is {name!r}, expected the name of a layout")
        return IntegerLayout(
            name, _patterns(quant, "int8"), _patterns(quant, "int4"), quant.get("int4_group", 0)
        )
    if quant.get("quant_method") != "fp8" or quant.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(
            f"`quantization_config` is {quant.get('quant_method')!r} {quant.get('fmt')!r}, expected `fp8` `e4m3`"
        )
    block = quant.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
        raise ConfigError(
            f"`quantization_config.weight_block_size` is {block!r}, expected two positive integers"
        )
    return QuantizationConfig((block[0], block[1]), str(quant.get("scale_fmt") or "float32"))


def _patterns(quant: Mapping[str, Any], kind: str) -> Any:
    # what is no array stays what it is, for the complaint to show
    given = quant.get(kind) or []
    return tuple(given) if isinstance(given, list) else given
