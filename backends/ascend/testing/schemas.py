"""Schemas of ops, read from a vendor's wheel as bytes: neither torch nor the vendor's package nor a device is needed.

An op is registered with its schema as text, which lies in the shared library whole. The tables of the wheels that this plugin is
checked against are committed; this makes them again:

    python -m v4sdk_ascend.testing.schemas --wheel FILE.whl --out tests/ascend/schemas
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from v4sdk.errors import V4Error

from . import prebuilt

_WORDS = (
    r"Tensor|int|float|bool|str|Scalar|ScalarType|SymInt|Device|Layout|MemoryFormat|Generator|Dimname|Storage"
    r"|__torch__[\w.]+|Dict\(\w+, \w+\)"
)
_TYPE = rf"(?:(?:{_WORDS})(?:\([a-z]!?\)|!)?(?:\?|\[\d*\])*)"
_NAME = re.compile(r"([A-Za-z_]\w*)(?:\.(\w+))?\(")
_ARGUMENT = re.compile(rf"({_TYPE})\s+(\w+)(?:\s*=\s*(.+))?")
_RETURN = re.compile(rf"({_TYPE})(?:\s+\w+)?")

# distribution -> the library of its wheel that registers the ops, and their namespace in the dispatcher
_HOLDS = {
    "torch-npu": ("torch_npu/lib/libtorch_npu.so", "npu"),
    "vllm-ascend": ("vllm_ascend/vllm_ascend_C.*.so", "_C_ascend"),
}


class WheelError(V4Error):
    """A wheel is not one that schemas can be read from, or not the one that it should be."""

    way_out = "pip download --no-deps fetches a distribution's wheel"


@dataclass(frozen=True)
class Argument:
    """An argument of an op: name, type as written, default as written (None: it must be passed), whether by keyword only."""

    name: str
    type: str
    default: str | None
    keyword: bool

    @property
    def value(self) -> Any:
        """The default as Python's value; a word that is none of Python's stays text."""
        return literal(self.default) if self.default is not None else None


@dataclass(frozen=True)
class Schema:
    """An op, or one of its overloads: what `Tensor npu_x(..)` says, in parts."""

    name: str
    overload: str
    arguments: tuple[Argument, ...]
    returns: tuple[str, ...]

    def misfit(self, positional: Sequence[str], keyword: Iterable[str]) -> tuple[str, ...]:
        """What keeps a call with arguments of these names from resolving, in words; empty if nothing."""
        known = {a.name: a for a in self.arguments}
        passed = (*positional, *keyword)
        unknown = [name for name in passed if name not in known]
        found = [f"no argument {name}" for name in unknown]
        places = [a.name for a in self.arguments if not a.keyword]
        found += [
            f"{name} is not argument {place + 1} by position"
            for place, name in enumerate(positional)
            if name in known and places[place : place + 1] != [name]
        ]
        # a name that is not known is most likely this one, misspelt; one finding is enough for both
        needed = [a.name for a in self.arguments if a.default is None and a.name not in passed]
        return (*found, *(f"{name} must be passed" for name in (needed if not unknown else ())))


@dataclass(frozen=True)
class Table:
    """The schemas of one wheel.

    Attributes:
        distribution, version: of the wheel. wheel: its file name. sha256: of that file. namespace: of its ops in the dispatcher.
        texts: the schemas as written. kernels: chip -> kernel -> dtype combinations with a prebuilt binary.
    """

    distribution: str
    version: str
    wheel: str
    sha256: str
    namespace: str
    texts: tuple[str, ...]
    kernels: Mapping[str, Mapping[str, prebuilt.Built]]

    @cached_property
    def schemas(self) -> Mapping[str, tuple[Schema, ...]]:
        """All overloads by name."""
        found: dict[str, tuple[Schema, ...]] = {}
        for schema in map(parse, self.texts):
            found[schema.name] = (*found.get(schema.name, ()), schema)
        return found

    def misfit(self, name: str, positional: Sequence[str], keyword: Sequence[str]) -> tuple[str, ...]:
        """Why a call of an op does not resolve against this wheel, by the overload that comes closest; empty if one does."""
        found = [s.misfit(positional, keyword) for s in self.schemas.get(name, ())]
        return min(found, key=len) if found else (f"{self.namespace}.{name} is not registered",)


def literal(text: str) -> Any:
    """A default as Python's value; a word that is none of Python's stays text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse(text: str) -> Schema:
    """Take a schema apart.

    Raises:
        ValueError: the text is not a schema.
    """
    start = _NAME.match(text)
    if start is None:
        raise ValueError(f"no schema: {text[:60]!r}")
    inside, rest = _balanced(text, start.end())
    arrow = re.fullmatch(r"\s*->\s*(.+)", rest)
    if arrow is None:
        raise ValueError(f"no returns: {text[:60]!r}")
    arguments, keyword = [], False
    for piece in _split(inside):
        if piece == "*":
            keyword = True
            continue
        argument = _ARGUMENT.fullmatch(piece)
        if argument is None:
            raise ValueError(f"no argument: {piece!r}")
        arguments.append(Argument(argument[2], argument[1], argument[3], keyword))
    returned = arrow[1]
    pieces = _split(returned[1:-1]) if returned.startswith("(") and returned.endswith(")") else [returned]
    types = [_RETURN.fullmatch(piece) for piece in pieces]
    if None in types:
        raise ValueError(f"no type: {returned!r}")
    return Schema(start[1], start[2] or "", tuple(arguments), tuple(m[1] for m in types if m))


def _balanced(text: str, start: int) -> tuple[str, str]:
    """What stands before the bracket that closes the one before `start`, and what after it."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place], text[place + 1 :]
    raise ValueError(f"no closing bracket: {text[:60]!r}")


def _split(text: str) -> list[str]:
    """Pieces between commas that stand outside brackets and quotes."""
    pieces = re.findall(r"""(?:[^,(\["']|\([^)]*\)|\[[^\]]*\]|"[^"]*"|'[^']*')+""", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def in_bytes(data: bytes) -> tuple[str, ...]:
    """All schemas that lie in a library, spelt as there but for white space, sorted."""
    return tuple(sorted(set(_candidates(data))))


def _candidates(data: bytes) -> Iterator[str]:
    place = data.find(b"->")
    while place >= 0:
        # strings of C end with a zero byte, and begin after another's
        start, end = data.rfind(b"\0", 0, place) + 1, data.find(b"\0", place)
        end = len(data) if end < 0 else end
        text = " ".join(data[start:end].decode("ascii", "replace").split())
        try:
            parse(text)
        except ValueError:
            pass
        else:
            yield text
        place = data.find(b"->", end)


def read(wheel: Path) -> Table:
    """The table of a wheel.

    Raises:
        WheelError: the file is no wheel of a distribution that is known here, or has no schemas.
    """
    parts = wheel.name.split("-")
    distribution = parts[0].replace("_", "-")
    if distribution not in _HOLDS or len(parts) < 5 or not zipfile.is_zipfile(wheel):
        raise WheelError(f"{wheel} is not a wheel of {' or '.join(_HOLDS)}")
    pattern, namespace = _HOLDS[distribution]
    with zipfile.ZipFile(wheel) as archive:
        members = [n for n in archive.namelist() if Path(n).match(pattern)]
        texts = tuple(sorted({text for name in members for text in in_bytes(archive.read(name))}))
        built = prebuilt.read(archive)
    if not texts:
        raise WheelError(f"{wheel} holds no schemas in {pattern}")
    return Table(
        distribution, parts[1], wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), namespace, texts, built
    )  # fmt: skip


def load(folder: Path) -> tuple[Table, ...]:
    """The tables of a folder, in the order of their file names."""
    return tuple(_load(path) for path in sorted(folder.glob("*.json")))


def _load(path: Path) -> Table:
    raw = json.loads(path.read_text(encoding="utf-8"))
    # releases whose schemas are the same share one list
    texts = raw["schemas"] if "schemas" in raw else _load(path.with_name(raw["schemas_of"])).texts
    built = {
        chip: {name: prebuilt.Built.from_json(entry) for name, entry in found.items()}
        for chip, found in raw.get("kernels", {}).items()
    }
    return Table(
        raw["distribution"], raw["version"], raw["wheel"], raw["sha256"], raw["namespace"], tuple(texts), built
    )  # fmt: skip


def save(table: Table, folder: Path) -> Path:
    """Write a table; schemas that another release's table of the folder has as well are not written twice."""
    path = folder / f"{table.distribution}-{table.version}.json"
    raw: dict[str, Any] = {
        "distribution": table.distribution, "version": table.version, "wheel": table.wheel, "sha256": table.sha256,
        "namespace": table.namespace,
    }  # fmt: skip
    others = (p for p in sorted(folder.glob("*.json")) if p != path)
    twin = next((p.name for p in others if _own(p) == list(table.texts)), None)
    raw |= {"schemas_of": twin} if twin else {"schemas": table.texts}
    if table.kernels:
        raw["kernels"] = {
            chip: {name: entry.to_json() for name, entry in found.items()}
            for chip, found in table.kernels.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _own(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")).get("schemas")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m v4sdk_ascend.testing.schemas", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="file of the wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    given = parser.parse_args(arguments)
    try:
        table = read(given.wheel)
    except V4Error as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    built = sum(len(found) for found in table.kernels.values())
    print(
        f"{save(table, given.out)}: {len(table.texts)} schemas of {table.namespace}, kernels of {built} ops"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
