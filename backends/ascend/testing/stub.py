"""A link-time stand-in for CANN: with it the vendor's own wheel loads on a machine that has no NPU and no CANN.

The wheel's libraries link against six of CANN's. The stand-in has just the symbols that are missing, each a C function that
does nothing and reports success, and tells the number of devices and the chip's name from two environment variables. What
then runs is the vendor's Python, its dispatcher and its shape functions; nothing computes, and nothing was run on an NPU.

    python -m v4sdk_ascend.testing.stub --wheel DIR --out DIR
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from v4sdk.errors import V4Error

SOC = "V4SDK_ASCEND_STUB_SOC"
COUNT = "V4SDK_ASCEND_STUB_COUNT"
LIBRARY = "ascendcl"
EMPTY = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")

# libraries of the wheel that `import torch_npu` loads
_LOADED = ("lib/libtorch_npu.so", "lib/libtensorpipe.so", "lib/libnpu_profiler.so", "_C.*.so")

# success alone would leave their out-parameters as they were; torch_npu goes on with what it finds there
_BODIES = {
    "aclrtGetDeviceCount": f"""int aclrtGetDeviceCount(unsigned *count)
{{ const char *said = getenv("{COUNT}"); *count = said ? (unsigned)atoi(said) : 0; return 0; }}""",
    "aclrtGetSocName": f'const char *aclrtGetSocName(void) {{ return getenv("{SOC}"); }}',
    "aclrtGetDevice": "int aclrtGetDevice(int *device) { *device = 0; return 0; }",
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void **context) { *context = &thing; return 0; }",
    "aclrtCreateStream": "int aclrtCreateStream(void **stream) { *stream = &thing; return 0; }",
    "aclrtCreateStreamWithConfig": """int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag)
{ *stream = &thing; return 0; }""",
}


class StubError(V4Error):
    """The stand-in cannot be built here."""

    way_out = (
        "apt-get install gcc binutils, or run the tests of the vendor's wheel on a machine that has them"
    )


def missing_symbols(wheel: Path) -> tuple[str, ...]:
    """Names that the unpacked wheel takes from CANN: what its libraries need and neither they nor torch define.

    Raises:
        StubError: no wheel is there, nm is missing, or a name is not one of C, which cannot be stood in for.
    """
    package = wheel / "torch_npu"
    loaded = [path for pattern in _LOADED for path in sorted(package.glob(pattern))]
    if len(loaded) < len(_LOADED):
        raise StubError(
            f"{wheel} holds no unpacked torch_npu wheel",
            hint="pip download --no-deps torch-npu, then python -m zipfile -e FILE.whl DIR",
        )
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise StubError("torch is not installed, beside which the wheel is to load", hint="pip install torch")
    libraries = [*loaded, *sorted((Path(torch.origin).parent / "lib").glob("*.so*"))]
    needed = _symbols(loaded, "--undefined-only") - _symbols(libraries, "--defined-only")
    # those of the system's libraries have a version ("@GLIBC_2.17"), or this process has them as it has Python's own
    here = ctypes.CDLL(None)
    names = sorted(n for n in needed if "@" not in n and not hasattr(here, n))
    mangled = [n for n in names if n.startswith("_Z")]
    if mangled:
        raise StubError(
            f"{wheel} needs {len(mangled)} C++ symbols that neither it nor torch defines, the first {mangled[0]}",
            hint="use the torch release that the wheel was built for",
        )
    return tuple(names)


def build(wheel: Path, out: Path) -> tuple[str, ...]:
    """Compile the stand-in for the unpacked wheel into the folder `out`, which may exist; returns the names it has.

    Raises:
        StubError: as `missing_symbols`, or gcc is missing or fails.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise StubError("gcc is missing, which compiles the stand-in for CANN")
    names = missing_symbols(wheel)
    plain = (f"long {name}(void) {{ return 0; }}" for name in names if name not in _BODIES)
    source = "\n".join(
        (
            "#include <stdlib.h>",
            "static long thing;",
            *(_BODIES[n] for n in names if n in _BODIES),
            *plain,
            "",
        )
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        for library, text in {LIBRARY: source, **dict.fromkeys(EMPTY, "")}.items():
            file = f"lib{library}.so"
            made = Path(scratch) / file
            command = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{file}", "-o", str(made), "-xc", "-"]
            ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise StubError(
                    f"gcc cannot compile {file}: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            # whole or not at all: tests of several processes may build into one folder
            made.replace(out / file)
    return names


def environment(
    wheel: Path, stub: Path, soc: str, count: int = 1, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Variables for a child process that sees `count` devices of a chip.

    Args:
        wheel: folder that holds the package torch_npu. stub: folder of `build`. soc: the chip ("Ascend910B3").
        base: variables to start from; default, those of this process.
    """
    variables = dict(os.environ if base is None else base)
    variables["LD_LIBRARY_PATH"] = _joined(str(stub), variables.get("LD_LIBRARY_PATH"))
    variables["PYTHONPATH"] = _joined(str(wheel), variables.get("PYTHONPATH"))
    # torch would import the wheel by itself, and raise where that fails
    variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    variables[SOC], variables[COUNT] = soc, str(count)
    return variables


def _joined(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first


def _symbols(paths: Iterable[Path], which: str) -> set[str]:
    tool = shutil.which("nm")
    if tool is None:
        raise StubError("nm is missing, which lists what the vendor's libraries need")
    command = [tool, "--dynamic", "--with-symbol-versions", "--format=posix", which, *map(str, paths)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line.split() for line in ran.stdout.splitlines()]
    if which == "--defined-only":
        return {row[0].split("@")[0] for row in rows if len(row) >= 2}
    # weak ones ("w") may stay open
    return {row[0] for row in rows if len(row) >= 2 and row[1] == "U"}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m v4sdk_ascend.testing.stub", description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="folder with the unpacked torch_npu wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder for the libraries")
    given = parser.parse_args(arguments)
    try:
        names = build(given.wheel, given.out)
    except V4Error as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(f"{given.out}: lib{LIBRARY}.so with {len(names)} names, and {len(EMPTY)} libraries without any")
    return 0


if __name__ == "__main__":
    sys.exit(main())
