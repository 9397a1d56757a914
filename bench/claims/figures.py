"""Figures that follow from configurations alone: for each claim that is answered by arithmetic, what comes out and its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from v4sdk.config import ModelConfig
from v4sdk.kv_cache import kv_bytes
from v4sdk.numerics import kv_row_bytes
from v4sdk.presets import V4_FLASH, V4_PRO
from v4sdk_bench.claims import arithmetic
from v4sdk_bench.record import Value

MODELS: dict[str, ModelConfig] = {"pro": V4_PRO, "flash": V4_FLASH}
_GIB = 1 << 30

# the figure, further values, a note
Found = tuple[float, Mapping[str, Value], str]


def _flops(model: str) -> Found:
    config = MODELS[model]
    found = arithmetic.flops_share(config, arithmetic.MILLION)
    other: dict[str, Value] = {
        f"{convention}, {tokens:,} tokens": arithmetic.flops_share(config, tokens, convention)
        for tokens in (arithmetic.MILLION, arithmetic.CONTEXT)
        for convention in arithmetic.CONVENTIONS
    }
    work = arithmetic.v4_work(config, arithmetic.MILLION)
    base = arithmetic.v32_work(arithmetic.MILLION)
    parts: dict[str, Value] = {}
    for name, one in (("v4", work), ("v32", base)):
        parts |= {
            f"{name}_linear_flops": one.linear,
            f"{name}_attention_flops": one.attention,
            f"{name}_indexer_flops": one.indexer,
        }
    return found, {"by_convention": other, **parts}, f"{arithmetic.FP8_EQUIVALENT}; 1M = 1,000,000"


def _kv(model: str) -> Found:
    config, base = MODELS[model], arithmetic.v32_kv_bytes_per_token()
    growth = arithmetic.kv_growth(config)
    whole = arithmetic.model_info(config).kv["native"].at[arithmetic.CONTEXT]
    more: dict[str, Value] = {
        "bytes_per_token": growth,
        "v32_bytes_per_token": base,
        "with_windows_and_open_blocks": whole / (base * arithmetic.CONTEXT),
        "with_fp8_index_keys": arithmetic.kv_growth_fp8_index(config) / base,
        "at_1m_bytes": whole,
    }
    return growth / base, more, ""


def _factors(part: str) -> Found:
    kind, _, model = part.partition("-")
    config = MODELS[model]
    if kind == "flops":
        work, base = arithmetic.v4_work(config, arithmetic.MILLION), arithmetic.v32_work(arithmetic.MILLION)
        by: dict[str, Value] = {
            name: base.total(weights) / work.total(weights)
            for name, weights in arithmetic.CONVENTIONS.items()
        }
        found = 1 / arithmetic.flops_share(config, arithmetic.MILLION)
        return found, {"by_convention": by}, f"{arithmetic.FP8_EQUIVALENT}; 1M = 1,000,000"
    base_bytes, growth = arithmetic.v32_kv_bytes_per_token(), arithmetic.kv_growth(config)
    windows = arithmetic.window_bytes(config) / arithmetic.MILLION
    whole = kv_bytes(config, arithmetic.MILLION, "native") / arithmetic.MILLION
    more = {"growing_part_alone": base_bytes / growth, "with_compressor_states": base_bytes / whole}
    return base_bytes / (growth + windows), more, "with window rows, without float32 compressor states"


def _kv_gqa8(model: str) -> Found:
    config = MODELS[model]
    base = arithmetic.gqa_bytes_per_token(config)
    return arithmetic.kv_growth(config) / base, {"gqa8_bytes_per_token": base}, ""


def _kv_mixed(model: str) -> Found:
    config = MODELS[model]
    native, wide = arithmetic.kv_growth(config, "native"), arithmetic.kv_growth(config, "bf16")
    entry = kv_row_bytes(config.head_dim, config.qk_rope_head_dim, "native")
    alone = 1 - entry / kv_row_bytes(config.head_dim, config.qk_rope_head_dim, "bf16")
    return 1 - native / wide, {"saved_in_an_entry_alone": alone, "entry_bytes": entry}, ""


def _kv_bf16(model: str) -> Found:
    if model == "v32":
        return arithmetic.v32_kv_bytes_per_token("bf16") * arithmetic.CONTEXT / _GIB, {}, ""
    config = MODELS[model]
    whole = arithmetic.model_info(config).kv["bf16"].at[arithmetic.CONTEXT] / _GIB
    growing = arithmetic.kv_growth(config, "bf16") * arithmetic.CONTEXT / _GIB
    return growing, {"with_windows_and_open_blocks": whole}, ""


def _kv_window(model: str) -> Found:
    return arithmetic.window_share(MODELS[model]), {}, ""


def _checkpoint(model: str) -> Found:
    info = arithmetic.model_info(MODELS[model])
    return info.payload_bytes / 1e9, {"payload_bytes": info.payload_bytes, "tensors": info.tensors}, ""


def _parameters(model: str) -> Found:
    info = arithmetic.model_info(MODELS[model])
    more: dict[str, Value] = {"parameters": info.parameters, "in_draft_blocks": info.draft_parameters}
    return info.parameters / 1e9, more, ""


def _active(model: str) -> Found:
    active = arithmetic.model_info(MODELS[model]).active_parameters
    return active / 1e9, {"active_parameters": active}, ""


def _threshold(model: str) -> Found:
    return arithmetic.flops_per_exchanged_byte(MODELS[model]), {}, ""


COMPUTED: Mapping[str, Callable[[str], Found]] = {
    "flops-1m": _flops,
    "kv-1m": _kv,
    "factors-1m": _factors,
    "kv-gqa8": _kv_gqa8,
    "kv-mixed-precision": _kv_mixed,
    "kv-1m-bf16": _kv_bf16,
    "kv-window": _kv_window,
    "checkpoint-bytes": _checkpoint,
    "parameters": _parameters,
    "active-parameters": _active,
    "overlap-threshold": _threshold,
}
