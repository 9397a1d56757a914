"""Whether the vendor's wheel has what a recorded step, a clock and an identity call, as JSON; nothing is captured here."""

from __future__ import annotations

import inspect
import json

import torch
import torch_npu

devices = torch.get_device_module("npu")
NAMES = (
    "NPUGraph", "graph", "graph_pool_handle", "current_stream", "set_stream", "Event", "synchronize", "empty_cache",
    "mem_get_info", "get_device_properties", "current_device", "device_count", "get_device_name",
)  # fmt: skip
print(
    json.dumps(
        {
            "missing": [name for name in NAMES if not hasattr(devices, name)],
            "graph": list(inspect.signature(devices.graph.__init__).parameters),
            "graph_members": [n for n in ("replay", "reset", "pool") if hasattr(devices.NPUGraph, n)],
            "event": [n for n in ("record", "synchronize", "elapsed_time") if hasattr(devices.Event, n)],
            "properties": [
                n for n in ("uuid", "name", "total_memory") if hasattr(torch_npu._C._NPUDeviceProperties, n)
            ],
            "cann": callable(torch_npu.npu.utils.get_cann_version),
        }
    )
)
