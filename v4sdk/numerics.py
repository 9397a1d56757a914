"""The two numeric options of a run: which roundings are applied, and how cache rows are stored. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from v4sdk.errors import ConfigError

KVFormat = Literal["float32", "bf16", "native"]
KV_FORMATS: tuple[KVFormat, ...] = ("float32", "bf16", "native")


@dataclass(frozen=True)
class Numerics:
    """Which roundings of the reference implementation a run applies.

    Attributes:
        name: how reports call this set.
        bf16_activations: residual streams and sub-layer inputs and outputs are BF16, else float32.
        q8_gemm_input: inputs of quantised linears are rounded to FP8 in groups of 128 (`Q8`).
        bf16_q_norm: the per-head query norm runs in BF16 operations.
        bf16_index_scores: dot product, weighting and head sum of the indexer are each rounded to BF16.
        bf16_between: values handed from one part of a fused op to the next are BF16.
        q8_kv: window rows and compressed entries are rounded to FP8 in groups of 64.
        q4_index: index queries and keys are Hadamard-rotated and rounded to FP4 in groups of 32.
        float64: what is float32 arithmetic elsewhere runs in float64. No user mode: a witness for tests of the references,
            where float32 noise would decide a rounding.

    Source: the rounding ledger of the official forward pass; contract "Numerics and KV format are two options".
    """

    name: str
    bf16_activations: bool
    q8_gemm_input: bool
    bf16_q_norm: bool
    bf16_index_scores: bool
    bf16_between: bool
    q8_kv: bool
    q4_index: bool
    float64: bool = False

    @property
    def default_kv_format(self) -> KVFormat:
        """`float32` where nothing is rounded, else `native`."""
        return "native" if self.bf16_activations else "float32"


EXACT = Numerics("exact", False, False, False, False, False, False, False)
REFERENCE = Numerics("reference", True, True, True, True, True, True, True)
FAST = Numerics("fast", True, False, False, False, False, True, True)
NUMERICS = {n.name: n for n in (EXACT, REFERENCE, FAST)}


def numerics(name: str) -> Numerics:
    """Look up a numerics set by name.

    Raises:
        ConfigError: if the name is not `exact`, `reference` or `fast`.
    """
    if name not in NUMERICS:
        raise ConfigError(f"numerics `{name}` is unknown, expected one of {', '.join(NUMERICS)}")
    return NUMERICS[name]


def kv_format(name: str | None, chosen: Numerics) -> KVFormat:
    """Validate a KV format name, or give the default of `chosen` for None.

    Raises:
        ConfigError: if the name is unknown, or `native` is asked for rows that are not rounded to its grid.
    """
    if name is None:
        return chosen.default_kv_format
    for known in KV_FORMATS:
        if name == known:
            if known == "native" and not chosen.q8_kv:
                raise ConfigError(
                    f"KV format `native` cannot hold rows of numerics `{chosen.name}`, which are not rounded to FP8",
                    hint="use --kv-format float32, or --numerics fast",
                )
            return known
    raise ConfigError(f"KV format `{name}` is unknown, expected one of {', '.join(KV_FORMATS)}")


def kv_row_bytes(head_dim: int, rope_dim: int, fmt: KVFormat) -> int:
    """Bytes of one window row or compressed entry (584 for V4-Flash and V4-Pro in `native`)."""
    if fmt == "native":
        plain = head_dim - rope_dim
        raw = plain + 2 * rope_dim + -(-plain // 64)
        return -(-raw // 8) * 8
    return head_dim * (4 if fmt == "float32" else 2)


def index_row_bytes(index_head_dim: int, fmt: KVFormat) -> int:
    """Bytes of one index key (68 for V4-Flash and V4-Pro in `native`)."""
    if fmt == "native":
        return index_head_dim // 2 + index_head_dim // 32
    return index_head_dim * (4 if fmt == "float32" else 2)
