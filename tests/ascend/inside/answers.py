"""Answers of the emulated chip and of the CPU to the same questions, as JSON: `answers.py CONVERTED|- QUESTION...`

Both run the folder that the chip can run, in `reference` numerics: in `fast` the CPU itself lies further off. Means over
the tokens of questions and answers: `kl` is the divergence of the chip from the CPU's on that folder, `kl_released` from its own
on the released values, `kl_converting` what converting alone costs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from v4sdk import SamplingParams, Session

GREEDY = SamplingParams(temperature=0.0)

folder, *questions = sys.argv[1:]
model = None if folder == "-" else folder


def divergence(of: Tensor, to: Tensor) -> list[float]:
    """KL of each row's distribution, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (to, of))
    return (p.exp() * (p - q)).sum(-1).tolist()


found: dict[str, list[Any]] = {"npu": [], "cpu": [], "kl": [], "kl_released": [], "kl_converting": []}
with (
    Session.load(model, backend="ascend", numerics="reference") as npu,
    Session.load(model, backend="cpu", numerics="reference") as cpu,
    Session.load(backend="cpu", numerics="reference") as released,
):
    for question in questions:
        message = [{"role": "user", "content": question}]
        with cpu.sequence() as kept:
            found["npu"].append(npu.chat(message, params=GREEDY).content)
            found["cpu"].append(cpu.chat(message, params=GREEDY, sequence=kept).content)
            ids = list(kept.ids)
        chip, here, first = (torch.as_tensor(s.logits(ids)) for s in (npu, cpu, released))
        found["kl"] += divergence(chip, here)
        found["kl_released"] += divergence(chip, first)
        found["kl_converting"] += divergence(here, first)
    print(
        json.dumps(
            {name: sum(v) / len(v) if name.startswith("kl") else v for name, v in found.items()}
            | {"kv_format": npu.kv_format, "evidence": npu.loaded.backend.evidence}
        )
    )
