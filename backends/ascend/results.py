"""The file of a device test: the only place from which this backend takes the evidence word `device`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .probe import Device, Machine

FILE_VARIABLE = "V4SDK_ASCEND_DEVICE_TEST"
FORMAT = 1


@dataclass(frozen=True)
class Tested:
    """One op, as one provider served it.

    Attributes:
        provider: who did. cases: that were compared. worst: largest difference in units of what the op accepts.
        seconds: median of the last case by the device's events, None where it failed. detail: what went wrong.
    """

    op: str
    provider: str
    cases: int
    ok: bool
    worst: float | None
    seconds: float | None
    detail: str | None = None


@dataclass(frozen=True)
class Result:
    """What a device test found, and on what.

    Attributes:
        soc, code, uuid, driver, cann, torch_npu, torch: of the machine. date: of the test, ISO 8601 with its zone.
        kernel_s: seconds of a small kernel by the device's own clock. graph: whether a replayed decode step equals one that is
            not, None where it was not tried.
    """

    soc: str
    code: int
    uuid: str
    driver: str
    cann: str
    torch_npu: str
    torch: str
    v4sdk: str
    date: str
    kernel_s: float
    ops: tuple[Tested, ...] = ()
    graph: bool | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every op was right on the device."""
        return bool(self.ops) and all(one.ok for one in self.ops)

    @property
    def passed(self) -> frozenset[str]:
        """Ops that were right on the device."""
        return frozenset(one.op for one in self.ops if one.ok)

    def why_not_here(self, device: Device, machine: Machine) -> str | None:
        """Why it says nothing about the machine at hand, or None."""
        here = {
            "SoC": (self.soc, device.name),
            "torch_npu": (self.torch_npu, device.torch_npu),
            "CANN": (self.cann, device.cann or machine.cann or ""),
            "driver": (self.driver, machine.driver or ""),
        }
        changed = [
            f"{name} {then}, now {now or 'unknown'}" for name, (then, now) in here.items() if then != now
        ]
        return f"made with {' and '.join(changed)}" if changed else None


def path() -> Path:
    """Where the result lies: what `V4SDK_ASCEND_DEVICE_TEST` names, else in the user's state folder."""
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "v4sdk" / "ascend-device-test.json"


def write(result: Result, file: Path) -> None:
    """Write a result whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "evidence": "device", **asdict(result)}, indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text + "\n")
    os.replace(name, file)


def read(file: Path) -> Result | str | None:
    """Read a result: None where there is no file, the reason in words where it is none that counts."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        return f"{file} is not readable JSON: {exc}"
    if (
        not isinstance(raw, dict)
        or raw.pop("format", None) != FORMAT
        or raw.pop("evidence", None) != "device"
    ):
        return f"{file} is not a device test of this version"
    try:
        result = Result(**raw | {"ops": tuple(Tested(**one) for one in raw.get("ops", ()))})
    except TypeError as exc:
        return f"{file} does not hold what a device test holds: {exc}"
    return _unproven(result, file) or result


def _unproven(result: Result, file: Path) -> str | None:
    """A result without what only a device can give is none."""
    facts: dict[str, Any] = {
        "UUID": result.uuid, "driver": result.driver, "CANN": result.cann, "torch_npu": result.torch_npu, "date": result.date
    }  # fmt: skip
    lacking = [name for name, value in facts.items() if value in ("", "unknown")]
    if not _is_time(result.kernel_s):
        lacking.append("time of a kernel")
    if any(one.ok and not _is_time(one.seconds) for one in result.ops):
        lacking.append("times of its ops")
    return f"{file} lacks {', '.join(lacking)}: nothing was measured on a device" if lacking else None


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0
