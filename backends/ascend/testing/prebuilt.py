"""Prebuilt kernels of a wheel: for which combinations of dtypes a binary is there, by the tables that lie beside the binaries."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# .../kernel/config/<chip>/<kernel>.json lists the binaries of one kernel
_CONFIG = re.compile(
    r".*/kernel/config/(\w+)/(?!binary_info_config|relocatable_kernel_info_config)(\w+)\.json"
)


@dataclass(frozen=True)
class Built:
    """The binaries of one kernel on one chip.

    Attributes:
        inputs, outputs: names of the tensors, as the kernel calls them. attributes: of all that are not tensors.
        dtypes: one row per distinct binary, a dtype for each input and then each output.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    dtypes: tuple[tuple[str, ...], ...]

    def accepts(self, passed: Mapping[str, str]) -> bool:
        """Whether some binary takes inputs and outputs of these dtypes; those that are not named may be anything.

        Raises:
            KeyError: the kernel has no tensor of that name.
        """
        names = (*self.inputs, *self.outputs)
        unknown = passed.keys() - set(names)
        if unknown:
            raise KeyError(
                f"the kernel has no tensor {', '.join(sorted(unknown))}; it has {', '.join(names)}"
            )
        return any(
            all(passed.get(name, dtype) == dtype for name, dtype in zip(names, row, strict=True))
            for row in self.dtypes
        )

    def to_json(self) -> dict[str, Any]:
        """For a committed table; each row of dtypes is one line of text."""
        return {
            "inputs": " ".join(self.inputs),
            "outputs": " ".join(self.outputs),
            "attributes": " ".join(self.attributes),
            "dtypes": [" ".join(row) for row in self.dtypes],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Built:
        """From a committed table."""
        inputs, outputs, attributes = (tuple(raw[key].split()) for key in ("inputs", "outputs", "attributes"))
        return cls(inputs, outputs, attributes, tuple(tuple(row.split()) for row in raw["dtypes"]))


def read(archive: zipfile.ZipFile) -> dict[str, dict[str, Built]]:
    """Chip -> kernel -> its binaries, of a wheel that has any."""
    found: dict[str, dict[str, Built]] = {}
    for name in sorted(archive.namelist()):
        config = _CONFIG.fullmatch(name)
        if config is not None:
            found.setdefault(config[1], {})[config[2]] = _built(json.loads(archive.read(name))["binList"])
    return found


def _built(binaries: list[dict[str, Any]]) -> Built:
    first = binaries[0]
    inputs, outputs = (tuple(t["name"] for t in _tensors(first, key)) for key in ("inputs", "outputs"))
    rows = {
        tuple(str(t["dtype"]) for key in ("inputs", "outputs") for t in _tensors(b, key)) for b in binaries
    }
    return Built(inputs, outputs, tuple(a["name"] for a in first.get("attrs") or ()), tuple(sorted(rows)))


def _tensors(binary: dict[str, Any], key: str) -> list[dict[str, Any]]:
    # a list of tensors is a list here as well, all of one dtype
    return [t[0] if isinstance(t, list) else t for t in binary.get(key) or ()]
