"""Fetching the vendor's wheel and building the stand-in: what goes wrong is said, and never taken for a pass."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from v4sdk.errors import V4Error

stub = importlib.import_module("v4sdk_ascend.testing.stub")
wheels = importlib.import_module("v4sdk_ascend.testing.wheels")


@pytest.fixture
def table(tables: tuple[Any, ...]) -> Any:
    return next(t for t in tables if (t.distribution, t.version) == ("torch-npu", "2.13.0"))


def test_an_index_out_of_reach(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(wheels.OutOfReach, match=f"{table.wheel} cannot be fetched") as raised:
        wheels.fetch(table, tmp_path)
    assert wheels.FOLDER in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_another_file_than_the_table_s(table: Any, tmp_path: Path) -> None:
    (tmp_path / table.wheel).write_bytes(b"not it")
    with pytest.raises(wheels.WheelError, match=f"{table.sha256} was expected") as raised:
        wheels.unpack(table, tmp_path)
    # a skip is for what cannot be had; this one must fail
    assert not isinstance(raised.value, wheels.OutOfReach)


def test_a_wheel_is_unpacked_once(table: Any, tmp_path: Path) -> None:
    file = tmp_path / table.wheel
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("torch_npu/x.py", "")
    small = dataclasses.replace(table, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    folder = wheels.unpack(small, tmp_path)
    assert (folder / "torch_npu" / "x.py").is_file()
    file.unlink()
    assert wheels.unpack(small, tmp_path) == folder


@pytest.mark.parametrize(
    ("wheel", "said"),
    [
        ("torch_npu-2.13.0-cp39-cp39-manylinux_2_28_x86_64.whl", "is for cp39, and this Python is"),
        (
            "torch_npu-2.13.0-{here}-{here}-manylinux_2_28_vax.whl",
            "is for manylinux_2_28_vax, and this machine is",
        ),
        (
            "torch_npu-1.9.0-{here}-{here}-manylinux_2_28_{machine}.whl",
            "is for torch 1.9.0, and this is torch",
        ),
    ],
    ids=["python", "machine", "torch"],
)
def test_a_wheel_that_cannot_be_loaded_here(table: Any, wheel: str, said: str) -> None:
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    other = dataclasses.replace(table, wheel=wheel.format(here=here, machine=platform.machine()))
    assert said in wheels.cannot_load(other)


def test_a_compiler_or_nm_that_is_missing(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shutil.which
    for tool in ("gcc", "nm"):
        monkeypatch.setattr(shutil, "which", lambda name, tool=tool: None if name == tool else found(name))
        with pytest.raises(stub.StubError, match=f"{tool} is missing") as raised:
            stub.build(stand_in.wheel, tmp_path)
        assert "binutils" in raised.value.hint


def test_no_wheel_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(stub.StubError, match="holds no unpacked torch_npu wheel"):
        stub.missing_symbols(tmp_path)
    assert stub.main(["--wheel", str(tmp_path), "--out", str(tmp_path / "out")]) == 1


def test_what_is_stood_in_for(stand_in: Any) -> None:
    names = stub.missing_symbols(stand_in.wheel)
    assert len(names) == 84
    assert all(name.startswith(("acl", "Hccl", "Msprof", "rt")) for name in names)
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=posix", str(stand_in.libraries / "libascendcl.so")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {line.split()[0] for line in listed.stdout.splitlines()} >= set(names)


def test_a_file_that_is_no_wheel(schemas: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numpy-2.0-cp311-cp311-any.whl"
    file.write_bytes(b"")
    with pytest.raises(V4Error, match="is not a wheel of torch-npu or vllm-ascend"):
        schemas.read(file)
    assert schemas.main(["--wheel", str(file), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_table_comes_back_as_it_was_written(tables: tuple[Any, ...], schemas: Any, tmp_path: Path) -> None:
    for table in tables:
        schemas.save(table, tmp_path)
    assert {t.version: t for t in schemas.load(tmp_path)} == {t.version: t for t in tables}
    assert '"schemas_of": "torch-npu-2.13.0.json"' in (tmp_path / "torch-npu-2.14.0.json").read_text(
        encoding="utf-8"
    )


def test_the_committed_table_is_the_wheel_s(table: Any, schemas: Any, stand_in: Any) -> None:
    # fetched again where the file was deleted after it was unpacked
    assert schemas.read(wheels.fetch(table, wheels.folder())) == table
