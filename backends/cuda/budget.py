"""Compile every kernel at real size for every chip, and hold it to its budget: `python -m v4sdk_cuda.budget --check FILE`.

No GPU is needed. Each variant must be as `expected` says; its registers and shared memory are compared with a committed file, one
per version of Triton, so that no change moves them unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4sdk.errors import V4Error

from .backend import table
from .compilation import Compiling, triton_version
from .doctor import INSTALL_TRITON, triton_problem
from .expected import SPILLS
from .target import CHIPS, INTERPRET_VARIABLE, described
from .variants import PLAN, WHOLE_PLAN, Row, compile_all

# all chips together; more would not fit the time that checking a change may take
MOST_VARIANTS = 400
# what may move without a word: the assembler's choice among registers, and padding
SLACK_REGISTERS, SLACK_SHARED = 8, 1024

Key = tuple[str, str, int, str]


def as_file(rows: Sequence[Row], triton: str) -> dict[str, Any]:
    """What is committed: by op, kernel, variant and chip, [registers, bytes of shared memory]."""
    ops: dict[str, Any] = {}
    for row in sorted(rows, key=lambda r: (r.op, r.kernel, r.variant, r.arch)):
        chips = ops.setdefault(row.op, {}).setdefault(row.kernel, {}).setdefault(row.variant, {})
        chips[str(row.arch)] = [row.registers, row.shared]
    return {"triton": triton, "ops": ops}


def merged(
    committed: dict[str, Any],
    content: dict[str, Any],
    names: Sequence[str],
    archs: Sequence[int],
    known: Sequence[str],
) -> dict[str, Any]:
    """What is new of the given ops and chips, and what was of the others that still have a kernel."""
    kept = dict(_flat(content))
    kept |= {
        key: numbers
        for key, numbers in _flat(committed)
        if key[0] in known and not (key[0] in names and key[2] in archs)
    }
    ops: dict[str, Any] = {}
    for name, kernel, variant, arch in sorted((n, k, v, a) for n, k, a, v in kept):
        chips = ops.setdefault(name, {}).setdefault(kernel, {}).setdefault(variant, {})
        chips[str(arch)] = kept[name, kernel, arch, variant]
    return {"triton": content["triton"], "ops": ops}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file, one chip a line."""
    text = json.dumps(content, indent=1)
    path.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n", encoding="utf-8")


def differences(
    committed: dict[str, Any], rows: Sequence[Row], names: Sequence[str], archs: Sequence[int]
) -> list[str]:
    """What moved beyond the slack, came or went among the given ops and chips."""
    before = {key: numbers for key, numbers in _flat(committed) if key[0] in names and key[2] in archs}
    after = dict(_flat(as_file(rows, "")))
    found = []
    for key in sorted(before.keys() | after.keys()):
        name, kernel, arch, variant = key
        text = f"{name}: {kernel} on {arch}: {{}} ({variant})"
        if key not in after:
            found.append(text.format("gone"))
        elif key not in before:
            found.append(text.format(f"new, {after[key][0]} registers, {after[key][1]:,} bytes shared"))
        else:
            (registers, shared), (registers_now, shared_now) = before[key], after[key]
            if abs(registers_now - registers) > SLACK_REGISTERS:
                found.append(text.format(f"{registers} -> {registers_now} registers"))
            if abs(shared_now - shared) > SLACK_SHARED:
                found.append(text.format(f"{shared:,} -> {shared_now:,} bytes shared"))
    return found


def _flat(content: dict[str, Any]) -> Iterator[tuple[Key, list[int]]]:
    for name, kernels in content["ops"].items():
        for kernel, variants in kernels.items():
            for variant, chips in variants.items():
                yield from (((name, kernel, int(arch), variant), numbers) for arch, numbers in chips.items())


def markdown(rows: Sequence[Row]) -> str:
    """A line per case and kernel, a column per chip: registers, KiB of shared memory, matrix instructions, widest load."""
    archs = sorted({row.arch for row in rows})
    lines: dict[tuple[str, str], dict[int, list[str]]] = {}
    for row in rows:
        products = "+".join(row.tensor_cores) or "-"
        cell = f"{row.registers} / {row.shared / 1024:.0f} K / {products} / {row.widest_load}"
        for case in row.cases:
            chips = lines.setdefault((f"{row.op}/{case}", row.kernel), {})
            chips.setdefault(row.arch, []).append(f"{cell} WRONG" if row.wrong else cell)
    head = ["case", "kernel", *(f"sm_{arch}" for arch in archs)]
    body = [
        [case, kernel, *("; ".join(chips.get(arch, ["-"])) for arch in archs)]
        for (case, kernel), chips in lines.items()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def judge(rows: Sequence[Row], failed: Sequence[str], found: Sequence[str], most: int | None) -> list[str]:
    """Everything that is wrong, a line each; `most` variants are accepted, None for any number."""
    wrong = [f"{r.op}: {r.kernel} on {r.arch}: {text} ({r.variant})" for r in rows for text in r.wrong]
    count = distinct(rows)
    many = [f"{count} variants, expected at most {most}"] if most is not None and count > most else []
    return [*failed, *wrong, *many, *found]


def distinct(rows: Sequence[Row]) -> int:
    """How many variants were compiled: ops may share one."""
    return len({(r.arch, r.kernel, r.variant) for r in rows})


def read(path: Path) -> dict[str, Any]:
    """A committed file.

    Raises:
        V4Error: it cannot be read, or is not what `write` writes.
    """
    make = f"python -m v4sdk_cuda.budget --write {path} makes it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise V4Error(f"{path} cannot be read: {exc.strerror}, expected a budget", hint=make) from exc
    except ValueError as exc:
        raise V4Error(f"{path} is not JSON: {exc}, expected a budget", hint=f"remove it; {make}") from exc
    try:
        wrong = [key for key, numbers in _flat(content) if list(map(type, numbers)) != [int, int]]
        version = content["triton"]
    except (AttributeError, KeyError, TypeError, ValueError):
        wrong, version = [], None
    if wrong or not isinstance(version, str):
        raise V4Error(
            f"{path} is not a budget, expected `triton`, and `ops` with [registers, bytes] by kernel, variant and chip",
            hint=f"remove it; {make}",
        )
    return dict(content)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"`{text}`: expected a whole number from 1 on; the machine has {os.cpu_count()} cores"
        )
    return int(text)


def _chips(text: str) -> list[int]:
    known = ", ".join(map(str, CHIPS))
    for word in text.split(","):
        if not word.isdigit() or int(word) not in CHIPS:
            raise argparse.ArgumentTypeError(
                f"`{word}`: expected some of {known}, by comma; leave it out for all of them"
            )
    return [int(word) for word in text.split(",")]


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in `{path.parent}`, which does not exist"
        raise argparse.ArgumentTypeError(
            f"`{text}` {what}, expected a file to write; make its folder first: mkdir -p {path.parent}"
        )
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m v4sdk_cuda.budget", description=__doc__)
    parser.add_argument(
        "--arch",
        type=_chips,
        default=",".join(map(str, CHIPS)),
        help="chips, by comma (default: %(default)s)",
    )
    parser.add_argument("--op", default="", help="ops, by comma (default: all that have kernels)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with this file")
    parser.add_argument(
        "--write", type=_new_file, metavar="FILE", help="make this file, or its part of --op and --arch"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="other numerics and the larger model too; minutes more, held to no file",
    )
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="also put what was found here")
    parser.add_argument(
        "--jobs", type=_positive, default=2, help="processes at a time (default: %(default)s)"
    )
    options = parser.parse_args()
    if (problem := triton_problem()) is not None:
        parser.error(f"{problem}; hint: {INSTALL_TRITON}")
    known = [row.op.name for row in table(Compiling(described(options.arch[0], "compiled")))]
    options.op = options.op.split(",") if options.op else known
    options.known = known
    if options.whole and (options.check or options.write):
        parser.error("--whole is held to no file: leave out --check and --write")
    unknown = [f"`{name}`" for name in options.op if name not in known]
    if unknown:
        parser.error(
            f"argument --op: {', '.join(unknown)}: expected some of {', '.join(known)}, by comma; leave it out for all"
        )
    # read now: compiling takes minutes
    try:
        options.committed = read(options.check) if options.check else None
        options.before = read(options.write) if options.write and options.write.exists() else None
    except V4Error as exc:
        parser.error(f"{exc.message}; hint: {exc.hint}")
    return options


def main() -> int:
    """Compile, print the table, compare or write; 0 if nothing is wrong and nothing moved, 2 for words that mean nothing."""
    # whether kernels are compiled is settled when they are imported
    os.environ.pop(INTERPRET_VARIABLE, None)
    options, begin = _options(), time.monotonic()
    import triton

    plan = WHOLE_PLAN if options.whole else PLAN
    rows, failed = compile_all(options.op, options.arch, options.jobs, plan)
    found = []
    if options.committed is not None:
        if options.committed["triton"] != triton.__version__:
            found = [
                f"{options.check} is of Triton {options.committed['triton']}, this is {triton.__version__}"
            ]
        else:
            found = differences(options.committed, rows, options.op, options.arch)
    if options.write:
        content = as_file(rows, triton.__version__)
        if options.before is not None and options.before["triton"] == triton.__version__:
            content = merged(options.before, content, options.op, options.arch, options.known)
        write(options.write, content)
    if options.json:
        options.json.write_text(
            json.dumps({"rows": [asdict(r) for r in rows], "failed": failed, "moved": found}),
            encoding="utf-8",
        )
    print(markdown(rows))
    for (kernel, arch, version), reason in SPILLS.items():
        if version == triton_version() and any((r.kernel, r.arch) == (kernel, arch) for r in rows):
            print(f"accepted: {kernel} on {arch} spills registers: {reason}")
    print(f"{distinct(rows)} variants by Triton {triton.__version__} in {time.monotonic() - begin:.0f} s")
    wrong = judge(rows, failed, found, None if options.whole else MOST_VARIANTS)
    print("\n".join(wrong) or "nothing is wrong")
    if found:
        print(f"if that is meant: python -m v4sdk_cuda.budget --write {options.check}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
