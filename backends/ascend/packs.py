"""Loads the packs of functions beside torch_npu where they are installed, so that the dispatcher knows what they offer."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch

from .probe import why

TRANSFORMER, VENDORPACK = "cann_ops_transformer", "vllm_ascend"
# where CANN looks for kernels that did not come with it
_KERNELS_VARIABLE = "ASCEND_CUSTOM_OPP_PATH"
_KERNELS = Path("_cann_ops_custom") / "vendors" / "custom_transformer"
_LIBRARY = "vllm_ascend_C*.so"


def prepare() -> None:
    """Tell CANN where vllm-ascend's kernels lie; it looks once, when torch_npu is loaded."""
    root = _root(VENDORPACK)
    if root is None or not (root / _KERNELS).is_dir():
        return
    kernels = str(root / _KERNELS)
    known = os.environ.get(_KERNELS_VARIABLE, "").split(os.pathsep)
    if kernels not in known:
        os.environ[_KERNELS_VARIABLE] = os.pathsep.join(filter(None, (kernels, *known)))


def load() -> Mapping[str, str | None]:
    """Load each pack after torch_npu.

    Returns:
        By name of a pack that is installed, why it cannot be loaded, or None.
    """
    found: dict[str, str | None] = {}
    if _root(TRANSFORMER) is not None:
        found[TRANSFORMER] = _transformer()
    root = _root(VENDORPACK)
    if root is not None:
        found[VENDORPACK] = _vendorpack(root)
    return found


def _transformer() -> str | None:
    try:
        # importing registers its functions; each is compiled when it is first called
        with redirect_stdout(sys.stderr):
            importlib.import_module(f"{TRANSFORMER}.ops")
    except Exception as exc:
        # a pack for another CANN fails in any way it likes, and is then passed over
        return why(exc)
    return None


def _vendorpack(root: Path) -> str | None:
    """Load the library alone: the package would bring all of vLLM."""
    library = next(iter(sorted(root.glob(_LIBRARY))), None)
    if library is None:
        return f"{root} has no {_LIBRARY}"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except Exception as exc:
        # it was built for one torch and one CANN; torch names the file, and its cause what is missing
        return why(exc.__cause__ or exc)
    return None


def _root(package: str) -> Path | None:
    """Folder of a package, found without importing it."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None
