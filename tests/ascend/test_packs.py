"""The packs beside torch_npu: loaded where they are installed, named with their reason where they cannot be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

packs = importlib.import_module("v4sdk_ascend.packs")
doctor = importlib.import_module("v4sdk_ascend.doctor")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on the path of imports; what a test imports from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ASCEND_CUSTOM_OPP_PATH", raising=False)
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == packs.TRANSFORMER]:
        del sys.modules[name]


def package(root: Path, name: str, source: str = "") -> Path:
    folder = root.joinpath(*name.split("."))
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    return folder


def test_without_packs_nothing_is_loaded_or_set(site: Path) -> None:
    packs.prepare()
    assert packs.load() == {}
    assert "ASCEND_CUSTOM_OPP_PATH" not in os.environ


def test_the_transformer_pack_registers_by_being_imported(site: Path) -> None:
    package(site, packs.TRANSFORMER)
    defined = "lib = d.Library('made_transformer', 'FRAGMENT'); lib.define('one(Tensor x) -> Tensor')"
    package(site, f"{packs.TRANSFORMER}.ops", f"from torch import library as d\n{defined}")
    assert packs.load() == {packs.TRANSFORMER: None}
    assert torch.ops.made_transformer.one.default is not None


def test_vllm_ascend_is_one_library_and_a_folder_of_kernels(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # importing the package itself would bring all of vLLM
    root = package(site, packs.VENDORPACK, "raise RuntimeError('imported')")
    kernels = root / "_cann_ops_custom" / "vendors" / "custom_transformer"
    kernels.mkdir(parents=True)
    subprocess.run(
        ["gcc", "-shared", "-o", str(root / "vllm_ascend_C.cpython-311-x86_64-linux-gnu.so"), "-xc", "-"],
        input="int nothing;", text=True, check=True,
    )  # fmt: skip
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", "/own")
    for _ in range(2):
        packs.prepare()
    assert os.environ["ASCEND_CUSTOM_OPP_PATH"] == f"{kernels}{os.pathsep}/own"
    assert packs.load() == {packs.VENDORPACK: None}


def test_a_pack_that_fails_is_named_with_its_reason(site: Path) -> None:
    package(
        site, packs.TRANSFORMER, "raise OSError('libopapi.so: cannot open shared object file: No such file')"
    )
    root = package(site, packs.VENDORPACK)
    found = packs.load()
    assert found[packs.TRANSFORMER] == "libopapi.so is not found"
    assert found[packs.VENDORPACK] == f"{root} has no vllm_ascend_C*.so"
    (root / "vllm_ascend_C.so").write_text("no library")
    assert "file too short" in (packs.load()[packs.VENDORPACK] or "")
    rows = doctor.pack_rows(found)
    assert [row.ok for row in rows] == [False, False]
    assert rows[0].finding == "cannot be loaded: libopapi.so is not found"
