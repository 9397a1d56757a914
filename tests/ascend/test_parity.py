"""L4: adapters of every pack over the emulated vendor kernels, op by op and as a small model; none of it ran on an NPU."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from ascend.conftest import INSIDE

from v4sdk.ops import inputs
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import ExpertWeights, Weight

layout = importlib.import_module("v4sdk_ascend.providers.layout")
CPU = torch.device("cpu")


def test_every_provider_gives_what_its_op_gives(stand_in: Any, socs: dict[str, str], family: str) -> None:
    assert stand_in.pytest(socs[family], "parity_ops.py")["passed"] >= 20


def test_a_small_models_logits_are_those_of_the_cpu(
    stand_in: Any, socs: dict[str, str], family: str, say: Callable[[str], None]
) -> None:
    ran = stand_in.python(
        socs[family], "-m", "pytest", str(INSIDE / "parity_model.py"), "-q", "-s", "-p", "no:cacheprovider"
    )
    for line in re.findall(r"^\W*(\w+, [\w+]+: .*first choices|planted, .*)$", ran.stdout, re.MULTILINE):
        say(line)
    assert ran.returncode == 0, ran.stdout[-6000:]


def test_laid_out_matrices_are_the_same_matrices() -> None:
    draw = inputs.Draw("packing", CPU)
    fp8 = draw.weight("fp8", 192, 256)
    assert torch.equal(layout.mx_scales(fp8).dequantize(), fp8.dequantize())
    for encoding in ("float", "int8"):
        sizes = ((64, 128), (128, 64), (64, 128))
        lists = [tuple(matrix(draw, encoding, *size) for _ in range(3)) for size in sizes]
        kept = layout.experts(ExpertWeights(*lists), CPU)
        for e in range(3):
            for found, given in zip(kept.expert(e), (one[e] for one in lists), strict=True):
                assert torch.equal(found.dequantize(), given.dequantize())


def matrix(draw: inputs.Draw, encoding: str, rows: int, columns: int) -> Weight:
    weight = draw.weight("float", rows, columns)
    if encoding == "float":
        return weight
    data, scale = pack_int8(weight.dequantize())
    return Weight(data, scale, "int8", (1, columns))
