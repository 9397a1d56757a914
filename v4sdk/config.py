"""The model's configuration: every field of `config.json`, validated, and the per-layer schedule resolved from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from v4sdk.encodings import IntegerLayout as IntegerLayout
from v4sdk.encodings import QuantizationConfig as QuantizationConfig
from v4sdk.encodings import parse_quantization
from v4sdk.errors import ConfigError

LayerKind = Literal["swa", "csa", "hca"]
ARCHITECTURE = "DeepseekV4ForCausalLM"
# compress_ratios may stop at the backbone, or also list the MTP block (1) or the DSpark stages (3)
_EXTRA_RATIOS = (0, 1, 3)
_CSA_RATIO = 4


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table: `base` alone, or stretched by YaRN when `factor` is above 1.

    Attributes:
        base: rotary base; 10000 for sliding-only layers, 160000 for layers with a compressor (released models).
        factor, original_context, beta_fast, beta_slow: YaRN; no amplitude factor exists in V4.
    """

    base: float
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """What one block is, as data.

    Attributes:
        index: position in the backbone; MTP blocks continue the count.
        prefix: tensor name prefix, `layers.3.` or `mtp.0.`.
        kind: `swa` window only, `csa` compressed with indexer, `hca` compressed and fully attended.
        ratio: source tokens per compressed entry, 0 for none.
        overlap: entries also pool the previous block (CSA).
        kv_source, index_source: layer whose entries and whose picks this layer reads; V4 layers read their own.
        hash_routing: experts come from a table over token ids.
        rope: the table for everything in this layer.
    """

    index: int
    prefix: str
    kind: LayerKind
    ratio: int
    overlap: bool
    kv_source: int
    index_source: int
    hash_routing: bool
    rope: RopeSpec


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek V4 configuration. Field names are those of `config.json`.

    Raises (all constructors):
        ConfigError: naming the field, its value, and what was expected.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    compress_rope_theta: float
    rope_theta: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_factor: float = 1.0
    rope_original_context: int = 0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    num_nextn_predict_layers: int = 0
    dspark_block_size: int | None = None
    dspark_markov_rank: int | None = None
    dspark_target_layer_ids: tuple[int, ...] = ()
    expert_dtype: str | None = None
    quantization: QuantizationConfig | None = None
    integers: IntegerLayout | None = None
    bos_token_id: int = 0
    eos_token_id: int = 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` from a checkpoint folder, or the file itself."""
        path = Path(folder)
        if path.is_dir():
            path = path / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"`{path}` does not exist", hint="name a checkpoint folder that holds config.json"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise ConfigError(f"`{path}` is not readable JSON: {exc}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"`{path}` holds a {type(raw).__name__}, expected a JSON object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Validate a parsed `config.json`."""
        _check_architecture(raw)
        for name, only in _ONLY.items():
            if raw.get(name, only) != only:
                raise ConfigError(
                    f"`{name}` is {raw[name]!r}, expected {only!r}, the only form V4 was released in"
                )
        for name, (wanted, described) in _NESTED.items():
            if raw.get(name) and not isinstance(raw[name], wanted):
                raise ConfigError(f"`{name}` is {raw[name]!r}, expected {described}")
        scaling = raw.get("rope_scaling") or {}
        quant = raw.get("quantization_config")
        values: dict[str, Any] = {
            f.name: raw[f.name]
            for f in fields(cls)
            if raw.get(f.name) is not None and f.name not in ("quantization", "integers")
        }
        values["compress_ratios"] = tuple(raw.get("compress_ratios") or ())
        values["dspark_target_layer_ids"] = tuple(raw.get("dspark_target_layer_ids") or ())
        if scaling:
            kind = scaling.get("type", scaling.get("rope_type"))
            if kind != "yarn":
                raise ConfigError(f"`rope_scaling.type` is `{kind}`, expected `yarn`")
            values |= {
                "rope_factor": scaling.get("factor", 1.0),
                "rope_original_context": scaling.get("original_max_position_embeddings", 0),
                "rope_beta_fast": scaling.get("beta_fast", 32.0),
                "rope_beta_slow": scaling.get("beta_slow", 1.0),
            }
        if quant:
            found = parse_quantization(quant)
            if isinstance(found, IntegerLayout):
                values["integers"] = found
            else:
                values["quantization"] = found
                # released Flash files of April lack the field and hold FP4 experts
                values.setdefault("expert_dtype", "fp4")
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise ConfigError(f"`config.json` lacks {', '.join(f'`{name}`' for name in missing)}")
        return cls(**values)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in ("int", "float"):
                wanted = int if f.type == "int" else (int, float)
                if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
                    raise ConfigError(f"`{f.name}` is {value!r}, expected a finite {f.type}")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected a positive number")
        self._check_relations()

    def _check_relations(self) -> None:
        extra = len(self.compress_ratios) - self.num_hidden_layers
        if extra not in _EXTRA_RATIOS:
            raise ConfigError(
                f"`compress_ratios` has {len(self.compress_ratios)} entries, expected {self.num_hidden_layers}, "
                f"{self.num_hidden_layers + 1} or {self.num_hidden_layers + 3} for {self.num_hidden_layers} layers"
            )
        for i, ratio in enumerate(self.compress_ratios):
            if type(ratio) is not int or ratio < 0 or ratio == 1:
                raise ConfigError(
                    f"`compress_ratios[{i}]` is {ratio!r}, expected 0, 4 or a larger block length"
                )
        checks = [
            (self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number"),
            (
                self.qk_rope_head_dim < self.head_dim,
                "qk_rope_head_dim",
                f"less than `head_dim` {self.head_dim}",
            ),
            (
                self.num_attention_heads % self.o_groups == 0,
                "num_attention_heads",
                f"a multiple of `o_groups` {self.o_groups}",
            ),
            (
                self.num_experts_per_tok <= self.n_routed_experts,
                "num_experts_per_tok",
                f"at most {self.n_routed_experts}",
            ),
            (
                0 <= self.num_hash_layers <= self.num_hidden_layers,
                "num_hash_layers",
                f"0 to {self.num_hidden_layers}",
            ),
            (self.rope_beta_fast > 0, "rope_beta_fast", "a positive number"),
            (self.rope_beta_slow > 0, "rope_beta_slow", "a positive number"),
            (self.rope_theta > 1, "rope_theta", "more than 1"),
            (self.compress_rope_theta > 1, "compress_rope_theta", "more than 1"),
            (self.expert_dtype in (None, "fp4", "fp8", "bf16"), "expert_dtype", "`fp4` or `fp8`"),
            (
                self.integers is None or self.expert_dtype in (None, "bf16"),
                "expert_dtype",
                "none: what is not an integer matrix is float in a converted folder",
            ),
            (
                self.integers is None or self.quantization is None,
                "quantization",
                "none beside integer matrices",
            ),
        ]
        if _CSA_RATIO in self.compress_ratios:
            power = self.index_head_dim & (self.index_head_dim - 1) == 0 and self.index_head_dim >= 32
            checks.append((power, "index_head_dim", "a power of two of at least 32"))
            checks.append(
                (
                    self.qk_rope_head_dim <= self.index_head_dim,
                    "index_head_dim",
                    f"at least {self.qk_rope_head_dim}",
                )
            )
        for ok, name, want in checks:
            if not ok:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}, expected {want}")

    @property
    def is_dspark(self) -> bool:
        """True for the 0731 / 0813 structure; `num_nextn_predict_layers` does not tell."""
        return self.dspark_block_size is not None

    @property
    def num_mtp_blocks(self) -> int:
        """Blocks named `mtp.*` that the configuration announces."""
        return 3 if self.is_dspark else self.num_nextn_predict_layers

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The backbone's blocks in order."""
        return tuple(self._layer(i, f"layers.{i}.") for i in range(self.num_hidden_layers))

    @property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """The blocks after the backbone; always window only, with learned routing."""
        first = self.num_hidden_layers
        return tuple(self._layer(first + i, f"mtp.{i}.") for i in range(self.num_mtp_blocks))

    def _layer(self, index: int, prefix: str) -> LayerSpec:
        in_backbone = index < self.num_hidden_layers
        ratio = self.compress_ratios[index] if in_backbone else 0
        kind: LayerKind = "swa" if ratio == 0 else "csa" if ratio == _CSA_RATIO else "hca"
        # one table per layer: whatever has a compressor rotates everything with the stretched one
        rope = RopeSpec(self.rope_theta)
        if ratio:
            rope = RopeSpec(
                self.compress_rope_theta,
                self.rope_factor,
                self.rope_original_context,
                self.rope_beta_fast,
                self.rope_beta_slow,
            )
        hashed = in_backbone and index < self.num_hash_layers
        return LayerSpec(index, prefix, kind, ratio, kind == "csa", index, index, hashed, rope)


_POSITIVE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_groups "
    "o_lora_rank sliding_window rope_theta compress_rope_theta index_n_heads index_head_dim index_topk "
    "n_routed_experts num_experts_per_tok moe_intermediate_size routed_scaling_factor hc_mult hc_sinkhorn_iters "
    "max_position_embeddings swiglu_limit"
).split()


# fields that hold more than one value
_OBJECT, _ARRAY = (Mapping, "a JSON object"), ((list, tuple), "a JSON array")
_NESTED: dict[str, tuple[Any, str]] = {
    "rope_scaling": _OBJECT,
    "quantization_config": _OBJECT,
    "compress_ratios": _ARRAY,
    "dspark_target_layer_ids": _ARRAY,
}

# fields that choose between forms; V4 has one of each
_ONLY: dict[str, object] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def _check_architecture(raw: Mapping[str, Any]) -> None:
    found = raw.get("architectures") or []
    if not isinstance(found, (list, tuple)):
        raise ConfigError(f"`architectures` is {found!r}, expected a JSON array")
    model_type = raw.get("model_type")
    if "DeepseekV41ForCausalLM" in found or model_type == "deepseek_v41":
        raise ConfigError(
            "architecture `DeepseekV41ForCausalLM` (V4.1) is recognised but not supported yet",
            hint="use a V4 checkpoint: V4-Flash, V4-Pro or their 0731 / 0813 refreshes",
        )
    if ARCHITECTURE not in found and not (not found and model_type == "deepseek_v4"):
        raise ConfigError(
            f"architecture {found or model_type!r} is unknown, expected `{ARCHITECTURE}`",
            hint="v4sdk runs the DeepSeek V4 family only",
        )
