"""Takes every kernel through the vendor's own compiler for each chip, down to the finished HIVM module, on a machine without one.

    pip download --no-deps --dest wheels triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11   # about 210 MB
    pip install --no-deps --target compiler wheels/*.whl                                     # a folder of its own
    python -m v4sdk_ascend.kernels.lowering --compiler compiler --write tests/ascend/lowering.json

The folder is its own because the vendor's Triton is also called `triton`. The compiler plans the memory of every core and
refuses what does not fit; then it calls `hivmc`, which makes machine code and comes with CANN alone. A stand-in that fails is
given in its place, so what passes is compiled and planned, and has never run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from v4sdk.errors import BackendUnavailable, V4Error

from .tiles import TILES
from .variants import CHIPS, VARIANTS, find, source_hash

PACKAGES = ("triton-ascend", "ascendnpu-ir")
_FINISHED = "module.hivm.opt.mlir"
_TIMEOUT_S = 300.0
_OVERFLOW = re.compile(r"ub overflow, requires (\d+) bits while (\d+) bits available")
_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}


def missing(compiler: Path) -> str | None:
    """What a folder lacks to be the vendor's compiler; None if nothing."""
    for inside in ("triton/backends/ascend/compiler.py", "ascendnpuir/bin/bishengir-compile", "pybind11"):
        if not (compiler / inside).exists():
            return f"`{compiler}` has no `{inside}`"
    return None


def versions(compiler: Path) -> dict[str, str]:
    """Versions of the vendor's packages in the folder."""
    found = {d.name.replace("_", "-"): d.version for d in distributions(path=[str(compiler)])}
    return {name: found.get(name, "unknown") for name in PACKAGES}


def lower(compiler: Path) -> dict[str, Any]:
    """Compile everything: the table that is committed.

    Raises:
        BackendUnavailable: the folder is not the vendor's compiler, or its Triton does not start.
    """
    lacking = missing(compiler)
    if lacking is not None:
        raise BackendUnavailable(
            lacking,
            hint="pip install --target DIR --no-deps triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11, and give --compiler DIR",
        )
    rows = [row for chip in CHIPS for row in _chip(compiler.resolve(), chip)]
    return {
        "made": date.today().isoformat(),
        "versions": versions(compiler),
        "sources": source_hash(),
        "evidence": "compiled: planned by the vendor's compiler up to machine code, never run",
        "rows": rows,
    }


def faults(table: dict[str, Any]) -> list[str]:
    """What is wrong with a table, in words: a variant that failed, one that should have and did not, or one that is missing."""
    found = {(r["kernel"], r["name"], r["chip"]): r for r in table["rows"]}
    wrong = []
    for variant in VARIANTS:
        for chip in CHIPS:
            row = found.get((variant.kernel, variant.name, chip))
            where = f"{variant.kernel} ({variant.name}) on {chip}"
            if row is None:
                wrong.append(f"{where} is not in the table")
            elif variant.fits and not row["finished"]:
                wrong.append(f"{where}: {row.get('reason', 'no finished module')}")
            elif not variant.fits and (row["finished"] or "needs_bytes" not in row):
                wrong.append(f"{where} was not refused for its memory")
            elif variant.fits and not 0 < row["ub_bytes"] <= TILES[CHIPS[chip][1]].ub_bytes:
                wrong.append(f"{where} takes {row['ub_bytes']} bytes of the unified buffer")
    return wrong


def _chip(compiler: Path, chip: str) -> Iterator[dict[str, Any]]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(compiler), environ.get("PYTHONPATH")) if p)
    front = subprocess.run(
        [sys.executable, "-m", f"{__package__}.front_end", chip], env=environ, capture_output=True, text=True, check=False
    )  # fmt: skip
    if front.returncode:
        said = (front.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendUnavailable(f"the vendor's Triton in `{compiler}` does not start: {said}")
    for line in front.stdout.splitlines():
        made = json.loads(line)
        row = {"kernel": made["kernel"], "name": made["name"], "chip": chip, "target": CHIPS[chip][0]}
        if "module" in made:
            yield {**row, **_finish(compiler, chip, made["module"])}
        else:
            yield {**row, "finished": False, "reason": made["reason"]}


def _finish(compiler: Path, chip: str, module: str) -> dict[str, Any]:
    """The result of one module: what its plan reaches to, or why there is none."""
    with TemporaryDirectory() as folder:
        # the mix mode is for the driver that loads the kernel; the compiler does not know it
        Path(folder, "kernel.mlir").write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", module))
        for name in ("hivmc", "hivmc-a5"):
            Path(folder, name).write_text("#!/bin/sh\nexit 1\n")
            Path(folder, name).chmod(0o755)
        # tuning mode: a tile that does not fit is not tried again with fewer buffers
        _compile(compiler, chip, folder, "--enable-tuning-mode=true", f"--save-temps={folder}")
        finished = Path(folder, _FINISHED)
        if finished.exists():
            return {"finished": True, "ub_bytes": unified_buffer(finished.read_text())}
        # in that mode one of the compilers keeps the reason to itself
        run = _compile(compiler, chip, folder)
        overflow = _OVERFLOW.search(run.stderr + run.stdout)
        if overflow is not None:
            needs, has = (int(bits) // 8 for bits in overflow.groups())
            return {"finished": False, "needs_bytes": needs, "has_bytes": has}
        errors = [line for line in run.stderr.splitlines() if " error: " in line or "Assertion" in line]
        reason = (errors or run.stderr.splitlines() or ["no message"])[0]
        return {"finished": False, "reason": f"exit {run.returncode}: {reason[:300].replace(folder, '.')}"}


def _compile(compiler: Path, chip: str, folder: str, *more: str) -> subprocess.CompletedProcess[str]:
    target, family = CHIPS[chip]
    old = family != "950"
    binary = compiler / "ascendnpuir/bin" / ("bishengir-compile" if old else "bishengir-compile-a5")
    # as the vendor's Triton calls it for this chip
    command = [
        str(binary), f"{folder}/kernel.mlir", f"--target={target}", "--enable-hfusion-compile=true",
        "--enable-triton-kernel-compile=true", f"--enable-auto-multi-buffer={old}", f"--enable-auto-bind-sub-block={old}",
        *(["--enable-hivm-compile=true"] if old else []), *more, "-o", f"{folder}/kernel",
    ]  # fmt: skip
    environ = {**os.environ, "PATH": os.pathsep.join((folder, os.environ.get("PATH", "")))}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )


def unified_buffer(module: str) -> int:
    """Bytes of the unified buffer that a finished module's plan reaches to."""
    numbers = re.finditer(r"(%\w+) = (?:arith\.constant |llvm\.mlir\.constant\()(\d+) : i64", module)
    offsets = {found[1]: int(found[2]) for found in numbers}
    casts = re.finditer(
        r"hivm\.hir\.pointer_cast\((%\w+)\)[^:\n]*: memref<((?:\d+x)*)(\w+), #hivm\.address_space<ub>>",
        module,
    )
    most = 0
    for place, sizes, kind in (found.groups() for found in casts):
        count = 1
        for size in sizes.split("x")[:-1]:
            count *= int(size)
        most = max(most, offsets[place] + -(-count * _BITS[kind] // 8))
    return most


def main(arguments: list[str]) -> int:
    """The command; see the module's text."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m v4sdk_ascend.kernels.lowering", description=__doc__)
    parser.add_argument("--compiler", type=Path, required=True, help="folder with the vendor's packages")
    parser.add_argument("--write", type=Path, help="file for the table")
    given = parser.parse_args(arguments)
    try:
        table = lower(given.compiler)
    except V4Error as exc:
        print(
            f"error: {exc.message}\nhint: {exc.hint}" if exc.hint else f"error: {exc.message}",
            file=sys.stderr,
        )
        return 1
    for row in table["rows"]:
        expected = "refused" if not find(row["kernel"], row["name"]).fits else "fits"
        size = row.get("ub_bytes", row.get("needs_bytes"))
        state = "finished" if row["finished"] else "not finished"
        print(
            f"{row['chip']:6} {row['kernel']:7} {row['name']:24} {state:12} {size} bytes, expected: {expected}"
        )
    wrong = faults(table)
    for fault in wrong:
        print(f"error: {fault}", file=sys.stderr)
    if given.write is not None:
        given.write.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
