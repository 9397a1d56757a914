"""What the probe finds behind the stand-in, as JSON."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict

probe = importlib.import_module("v4sdk_ascend.probe")
verdict = importlib.import_module("v4sdk_ascend.verdict")

machine = probe.look()
refused = verdict.refusal(machine)
found = probe.find(probe.load(), emulates=True)
print(
    json.dumps(
        {
            "stand_in": machine.is_stand_in,
            "refused": refused and refused.reason,
            "device": asdict(found),
            "verdict": verdict.verdict(found),
        }
    )
)
