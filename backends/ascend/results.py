"""The file of a device test: the only place from which this backend takes the evidence word `device`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from v4sdk import __version__

from .probe import Device, Machine

FILE_VARIABLE = "V4SDK_ASCEND_DEVICE_TEST"
FORMAT = 2
# a distribution of which nothing is called, so that its version changes nothing
_NOT_CALLED = "onnxruntime-cann"


@dataclass(frozen=True)
class Tested:
    """One op, as one provider served it.

    Attributes:
        provider: who did; a pack only where at least one function of its row was called. cases: that were compared.
        worst: largest difference in units of what the op accepts. seconds: median of the first case by the device's events, None
        where it failed. detail: what went wrong. calls: the vendors' functions that were called for it.
    """

    op: str
    provider: str
    cases: int
    ok: bool
    worst: float | None
    seconds: float | None
    detail: str | None = None
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a device test found, and on what.

    Attributes:
        soc, code, uuid, driver, cann, torch_npu, torch, v4sdk: of the machine. plugin: digest of this plugin's sources.
        date: of the test, ISO 8601 with its zone. kernel_s: seconds of a small kernel by the device's own clock.
        graph: whether a replayed decode step equals one that is not, None where steps are not captured.
        packs: versions of the packs beside torch_npu.
    """

    soc: str
    code: int
    uuid: str
    driver: str
    cann: str
    torch_npu: str
    torch: str
    v4sdk: str
    plugin: str
    date: str
    kernel_s: float
    ops: tuple[Tested, ...] = ()
    graph: bool | None = None
    packs: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every op was right on the device, and no replayed step was wrong."""
        return bool(self.ops) and all(one.ok for one in self.ops) and self.graph is not False

    @property
    def passed(self) -> frozenset[tuple[str, str]]:
        """Ops that were right on the device, each with the provider that served it there."""
        return frozenset((one.op, one.provider) for one in self.ops if one.ok)

    def why_not_here(self, device: Device, machine: Machine, number: str | None) -> str | None:
        """Why it says nothing about the machine at hand, or None.

        Args:
            number: UUID of the NPU in use.
        """
        here = {
            "SoC": (self.soc, device.name),
            "UUID": (self.uuid, number or ""),
            "torch_npu": (self.torch_npu, device.torch_npu),
            "CANN": (self.cann, device.cann or machine.cann or ""),
            "driver": (self.driver, machine.driver or ""),
            "torch": (self.torch, machine.torch),
            "v4sdk": (self.v4sdk, __version__),
            "sources of this plugin": (self.plugin, sources()),
        }
        packs = packs_of(machine)
        here |= {
            name: (self.packs.get(name, ""), packs.get(name, "")) for name in sorted({*self.packs, *packs})
        }
        changed = [
            f"{name} {then or 'unknown'}, now {now or 'unknown'}"
            for name, (then, now) in here.items()
            if then != now
        ]
        return f"made with {' and '.join(changed)}" if changed else None


def packs_of(machine: Machine) -> Mapping[str, str]:
    """Versions of the packs whose functions may serve an op."""
    return {name: found for name, found in machine.packs.items() if name != _NOT_CALLED}


@cache
def sources() -> str:
    """Digest of this plugin's own files, so that a result made with other adapters does not speak for these."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(here.rglob("*")):
        place = file.relative_to(here)
        # `testing` is no part of a wheel, and serves nothing on a device
        if file.suffix in (".py", ".toml") and place.parts[0] != "testing":
            digest.update(f"{place.as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


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
        made = [Tested(**one) for one in raw.get("ops", ())]
        result = Result(**raw | {"ops": tuple(replace(one, calls=tuple(one.calls)) for one in made)})
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
