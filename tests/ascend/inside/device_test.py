"""The device test's comparisons on emulated functions, as JSON: what of it runs without a device. `device_test.py OP...`"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from v4sdk import plugins

module = importlib.import_module("v4sdk_ascend.device_test")


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


backend = plugins.select("ascend")
refused = ""
try:
    backend.device_test()
except Exception as exc:
    refused = str(exc)
tested = [asdict(one) for one in module.judge_ops(backend, clock, sys.argv[1:])]
print(json.dumps({"refused": refused, "evidence": backend.evidence, "tested": tested}))
