"""From a kernel to the compiler's input, by the vendor's Triton: run by `lowering` in a process where that one is `triton`.

    python -m v4sdk_ascend.kernels.front_end CHIP

Writes one line of JSON per variant to stdout: kernel, name, and the module as text or the reason why there is none.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

from .variants import CHIPS, VARIANTS, Variant, constants


def lower(variant: Variant, chip: str) -> str:
    """The module after the vendor's Triton passes, ready for its compiler."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    arch, family = CHIPS[chip]
    target, newest = GPUTarget("npu", arch, 0), family == "950"
    backend = make_backend(target)
    # what the vendor's driver sets by chip when there is one
    options = backend.parse_options({
        "compile_on_910_95": newest, "multibuffer": not newest,
        "enable_auto_bind_sub_block": not newest, "enable_select_analysis": newest,
    })  # fmt: skip
    function = getattr(importlib.import_module(f".{variant.kernel}", __package__), f"{variant.kernel}_kernel")
    source = ASTSource(function, dict(variant.signature), constants(variant, chip))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    return str(stages["ttadapter"](stages["ttir"](module, metadata), metadata))


def main(chip: str) -> None:
    """Lower every variant for a chip."""
    for variant in VARIANTS:
        row: dict[str, str] = {"kernel": variant.kernel, "name": variant.name}
        try:
            row["module"] = lower(variant, chip)
        except Exception as exc:  # a compiler may raise anything; the reason is the result
            said = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else str(exc).encode()
            row["reason"] = f"{type(exc).__name__}: {(said or b'').decode(errors='replace')[:500]}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
