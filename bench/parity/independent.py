"""The same checkpoints in an independent implementation: transformers' V4, in float32, one unpadded sequence at a time.

Its left-padded batches are wrong for V4, it rounds no activation and has no MTP block, so it is a witness for semantics
and for the file layout, not for numerics.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.convert import FloatTensors, unquantised, write_checkpoint
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT
from v4sdk.weights import WeightSource
from v4sdk_bench.parity.golden import relative_l2

RELATIVE_LIMIT = 5e-5

# the checkpoint's names in the order transformers' conversion applies its rules; experts are fused and come apart below
_RULES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.", ".mlp."),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)
_EXPERT = re.compile(r"^(layers\.\d+\.ffn)\.experts\.(\d+)\.(w[123])\.weight$")


@dataclass(frozen=True)
class LoadedElsewhere:
    """What transformers says about a released folder, and which weights it reads differently.

    Attributes:
        compared: tensors compared; different: names with any unequal value; report: missing, unexpected, mismatched keys.
    """

    compared: int
    different: tuple[str, ...]
    report: tuple[str, ...]


def their_name(name: str) -> str:
    """The name of one of our tensors in transformers' state dict; experts excepted."""
    for pattern, new in _RULES:
        name = re.sub(pattern, new, name)
    return name


def load_elsewhere(folder: Path) -> LoadedElsewhere:
    """Load a released folder with `dequantize=True` and compare every backbone weight bit for bit."""
    from transformers import FineGrainedFP8Config

    model, report = _load(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    theirs: dict[str, Tensor] = model.state_dict()
    keys = tuple(f"{kind}: {name}" for kind, names in report.items() for name in names)
    config = ModelConfig.from_folder(folder)
    with Checkpoint(folder) as checkpoint:
        pairs = list(_pairs(config, FloatTensors(config, checkpoint), theirs))
        different = tuple(
            name for name, a, b in pairs if a.shape != b.shape or not torch.equal(a.float(), b.float())
        )
    unread = set(theirs) - {their for their, _, _ in pairs}
    return LoadedElsewhere(
        len(pairs), different, keys + tuple(f"not compared: {name}" for name in sorted(unread))
    )


def _pairs(
    config: ModelConfig, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    layers = set()
    for name in ours:
        expert = _EXPERT.match(name)
        if expert:
            layers.add(expert[1])
        elif not name.startswith("mtp."):
            their = their_name(name)
            yield their, ours[name], theirs[their]
    for layer in sorted(layers):
        their = f"{their_name(layer + '.')}experts"
        w1, w2, w3 = (
            [ours[f"{layer}.experts.{e}.{w}.weight"] for e in range(config.n_routed_experts)]
            for w in ("w1", "w2", "w3")
        )
        gate_up = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        yield f"{their}.gate_up_proj", gate_up, theirs[f"{their}.gate_up_proj"]
        yield f"{their}.down_proj", torch.stack(w2), theirs[f"{their}.down_proj"]


@torch.no_grad()
def logits_difference(
    config: ModelConfig, tensors: Mapping[str, Tensor], token_ids: list[int], decode_from: int
) -> tuple[float, float]:
    """Relative L2 between our `exact` logits and theirs: of the whole prompt, and of decoding from `decode_from`.

    Quantised tensors are read as float32 first, so both sides compute with the same values.
    """
    values = FloatTensors(config, tensors)
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(scratch, unquantised(config), values, float_dtype="F32", sharded=False)
        model, _ = _load(Path(scratch), dtype=torch.float32)
    ids = torch.tensor([token_ids])
    whole = model(ids, use_cache=False).logits[0]
    out = model(ids[:, :decode_from], use_cache=True)
    steps = [out.logits[0, -1:]]
    for p in range(decode_from, len(token_ids) - 1):
        out = model(ids[:, p : p + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[0])
    ours = V4Model(Binder(unquantised(config), WeightSource(_Float32(values))), EXACT)
    prefill, decode = _our_logits(ours, token_ids, decode_from)
    return relative_l2(prefill, whole), relative_l2(decode, torch.cat(steps))


def _our_logits(model: V4Model, token_ids: list[int], decode_from: int) -> tuple[Tensor, Tensor]:
    found = []
    for spans in (
        [(0, len(token_ids))],
        [(0, decode_from), *((p, p + 1) for p in range(decode_from, len(token_ids) - 1))],
    ):
        cache = KVCache(model.config, "float32")
        rows = cache.allocate()
        steps = [
            model.logits(model.forward(cache.batch([rows], [token_ids[i:j]], [i]), cache)) for i, j in spans
        ]
        steps[0] = steps[0] if len(spans) == 1 else steps[0][-1:]
        found.append(torch.cat(steps))
    return found[0], found[1]


class _Float32(Mapping[str, Tensor]):
    """Float tensors widened on access, so the same values serve both sides."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        x = self._tensors[name]
        return x.float() if x.is_floating_point() else x

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    import transformers

    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    cls: Any = transformers.DeepseekV4ForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = cls.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", **options
        )
    return model.eval(), report
