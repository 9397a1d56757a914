"""What one chip's process shows of the vendor's wheel, as JSON on the last line: `facts.py FAMILY`; see conftest.py."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from typing import Any

import torch
import torch_npu
from meta_calls import Case, cases, outcome

from v4sdk.presets import V4_FLASH, V4_PRO

contract = importlib.import_module("v4sdk_ascend.contract")


def probe() -> dict[str, Any]:
    """What a capability probe may ask; none of it starts the device."""
    return {
        "available": torch.npu.is_available(),
        "count": torch.npu.device_count(),
        "name": torch.npu.get_device_name(0),
        "code": torch_npu._C._npu_get_soc_version(),
        "version": torch_npu.__version__.split("+")[0],
    }


def misspelt(call: Any, family: str) -> Any:
    """The same call with its last argument's name misspelt, which must be noticed."""
    part = next(
        p
        for p in ("keyword_950", "keyword", "positional")
        if getattr(call, p) and (p[-3:] != "950" or family == "950")
    )
    names = getattr(call, part)
    return dataclasses.replace(call, **{part: (*names[:-1], f"{names[-1]}_")})


def main(family: str) -> None:
    rows = {
        key: call
        for key, call in contract.contract().items()
        if call.pack == "stock" and family in call.chips
    }
    vendor = contract.Vendor()
    passed: dict[str, set[str]] = {}

    def note(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed.setdefault(key, set()).update(rows[key].positional[: len(args)], kwargs)

    vendor.observers.append(note)
    # the vendor's function starts the device to learn the chip's code, and the stand-in has none that starts
    importlib.import_module(
        "torch_npu.op_plugin.meta._meta_registrations"
    ).get_soc_version = torch_npu._C._npu_get_soc_version

    def here(case: Case) -> bool:
        return case.key in rows and set(case.keyword) <= set(rows[case.key].arguments(family))

    tried = [
        (model, case, *outcome(case, vendor.call))
        for model, config in (("flash", V4_FLASH), ("pro", V4_PRO))
        for case in filter(here, cases(config))
    ]
    facts = {
        "probe": probe(),
        "schemas": [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("npu::")],
        "lacks": {key: contract.lacks(call, family) for key, call in rows.items()},
        "lacks_misspelt": {key: contract.lacks(misspelt(call, family), family) for key, call in rows.items()},
        "meta": [(model, c.key, c.label, c.outcome, found, said) for model, c, found, said in tried],
        "passed": {key: sorted(names) for key, names in passed.items()},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
