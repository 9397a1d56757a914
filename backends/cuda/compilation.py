"""Kernels compiled for chips that are not here: the real wrappers, on tensors without memory, up to machine code.

`Compiling` takes the place of `Launch`. It specialises each kernel exactly as a run would (types, divisibility of sizes,
alignment of addresses), compiles it for its target, and keeps what the compiler says: registers, shared memory, spills and
instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import COUNTERS, Launch
from .target import Target

# instructions that multiply matrices, by family of chips
TENSOR_CORES = re.compile(r"^(HMMA|QMMA|HGMMA|QGMMA|UTC[A-Z]*MMA|OMMA|IMMA)")
_SPILLS = ("LDL", "STL")
# a product in Triton's own code: the type of its left operand, rows and columns of its result
_DOT = re.compile(r"tt\.dot(?:_scaled)? [^\n]*?tensor<[\dx]+x(\w+)>[^\n]*-> tensor<(\d+)x(\d+)x")


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel.

    Attributes:
        kernel: its name. variant: constants, warps and stages, and the types it was specialised for. arch: compute capability.
        registers, stack_bytes, shared_bytes: as the assembler reports them. instructions: how many of each kind; none where the
            disassembler of this version of Triton does not know the chip.
        widest_load: bytes of its widest load from global memory.
        dots: matrix products in its source, as (operand type, rows, columns). triton: version of the compiler, as major.minor.
    """

    kernel: str
    variant: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    widest_load: int
    dots: tuple[tuple[str, int, int], ...] = ()
    triton: str = ""

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return sum(n for name, n in self.instructions.items() if name.startswith(_SPILLS))

    @property
    def tensor_cores(self) -> tuple[str, ...]:
        """Kinds of matrix instructions in it."""
        return tuple(sorted({name for name in self.instructions if TENSOR_CORES.match(name)}))


def triton_version() -> str:
    """Of the compiler at hand, as major.minor."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


class Compiling(Launch):
    """Compiles what is launched, once per variant; nothing runs.

    Attributes:
        found: everything compiled so far. launches: the names of all launches, in order. last: the variant launched last.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target, torch.device("cuda"))
        self.found: dict[tuple[str, str], Compiled] = {}
        self.launches: list[str] = []
        self.last: Compiled | None = None

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int, **constants: Any
    ) -> None:
        """Compile `kernel` for the target, as a launch with these arguments would."""
        if 0 in grid:
            return
        name = kernel.fn.__name__
        self.launches.append(name)
        mocks = [_mock(a) if isinstance(a, Tensor) else a for a in args]
        variant = _variant(kernel, mocks, constants, warps, stages)
        if (name, variant) not in self.found:
            with _driver(self.target):
                made = kernel.warmup(
                    *mocks, grid=grid, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants
                )
                self.found[name, variant] = examine(name, variant, self.target.arch, made)
        self.last = self.found[name, variant]

    def counters(self, count: int) -> Tensor:
        """Counters without memory."""
        if count > COUNTERS:
            raise ValueError(f"a launch wants {count} counters, expected at most {COUNTERS}")
        return torch.empty(count, dtype=torch.int32, device=self.device)


def examine(name: str, variant: str, arch: int, made: Any) -> Compiled:
    """Read a compiled kernel's machine code with the tools of Triton's own wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _said(tools / "cuobjdump", "--dump-resource-usage", file.name)
        # that of Triton 3.6 cannot read what its assembler makes for 10.3
        code = _said(tools / "nvdisasm", "-c", file.name, may_fail=arch == 103)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of `{name}`: {usage[:200]!r}")
    kinds = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.M)
    widths = [int(w) // 8 for w in re.findall(r"(?:LDG|LDGSTS)[A-Z0-9_.]*\.(128|64|32)\b", code)]
    widths += [16 for _ in re.findall(r"UTMALDG|UBLKCP", code)]
    short = Counter(kind.partition(".")[0] for kind in kinds)
    return Compiled(
        name, variant, arch, int(found[1]), int(found[2]) + int(found[4]), made.metadata.shared, dict(short),
        max(widths, default=4 if short["LDG"] else 0),
        tuple(sorted({(kind, int(m), int(n)) for kind, m, n in _DOT.findall(made.asm["ttir"])})),
        triton_version(),
    )  # fmt: skip


def _said(tool: Path, *words: str, may_fail: bool = False) -> str:
    return subprocess.run([str(tool), *words], capture_output=True, text=True, check=not may_fail).stdout


def _variant(kernel: Any, mocks: list[Any], constants: dict[str, Any], warps: int, stages: int) -> str:
    types = [
        str(m.dtype).removeprefix("torch.")
        if isinstance(m, Mock)
        else "any"
        if p.do_not_specialize
        else _size(m)
        for m, p in zip(mocks, kernel.params, strict=False)
    ]
    words = [f"{k}={getattr(v, 'name', v)}" for k, v in constants.items()]
    return " ".join([*words, f"warps={warps}", f"stages={stages}", f"({', '.join(types)})"])


def _size(value: Any) -> str:
    # numbers specialise by being 1 or a multiple of 16
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "16n" if value % 16 == 0 else "n"
    return type(value).__name__


class Mock:
    """A tensor's dtype and address, as far as specialisation looks at it."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self._address = dtype, address
        self.shape: list[int] = [1]

    def data_ptr(self) -> int:
        """Where it would lie: memory comes aligned, a view starts where its offset says."""
        return self._address

    def ptr_range(self) -> int:
        """Not known."""
        return 0


def _mock(tensor: Tensor) -> Mock:
    return Mock(tensor.dtype, (1 << 20) + int(tensor.storage_offset()) * tensor.itemsize)


class _Utils:
    """What a compiled kernel asks of the driver; it is never loaded."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        t = self._target
        return {
            "max_shared_mem": t.shared_bytes, "multiprocessor_count": t.multiprocessors, "max_num_regs": 65536, "warpSize": 32,
        }  # fmt: skip

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return (0, 0, 0, 0, 1024)

    def unload_module(self, *module: Any) -> None:
        pass


class _CompileOnly:
    """A driver without a device. Every chip is another device number, or one chip's binary would pass for another's."""

    launcher_cls = None

    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = _Utils(target)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._target.arch, 32)

    def get_current_device(self) -> int:
        return self._target.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


class _driver:  # noqa: N801 - read as a word after `with`
    """Make the compile-only driver Triton's own while entered."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __enter__(self) -> None:
        from triton.runtime.driver import driver

        self._before = driver._active
        driver.set_active(_CompileOnly(self._target))

    def __exit__(self, *exc: object) -> None:
        from triton.runtime.driver import driver

        driver._active = self._before
