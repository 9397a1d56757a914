"""Weights copied into large pages: every byte and address stays, the mapping of the file goes, and what fails changes nothing."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import torch
from torch import Tensor

from v4sdk import Session, plugins
from v4sdk.backend import Settling
from v4sdk.checkpoint import Checkpoint
from v4sdk.errors import ConfigError, MemoryRefused
from v4sdk.loading import collect
from v4sdk.memory import used_memory
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.progress import Progress

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux moves mappings")
ROOT = Path(__file__).parent.parent
VARIABLE = "V4SDK_CPU_WEIGHTS"
# the shards of four layers are large and are settled; those of the embedding and of the head are small and are not
MODEL = shrunk(
    V4_FLASH, (0, 4, 128), vocab_size=64, hidden_size=512, num_attention_heads=4, head_dim=128, q_lora_rank=64, o_groups=2,
    o_lora_rank=32, index_n_heads=4, index_topk=4, n_routed_experts=32, num_experts_per_tok=2, moe_intermediate_size=512,
)  # fmt: skip
LARGE_SHARDS = 4
BACKEND = plugins.select("cpu")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def module(name: str) -> Any:
    return importlib.import_module(f"{type(BACKEND).__module__.rpartition('.')[0]}.{name}")


@pytest.fixture(autouse=True)
def large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that has them; without them the same bytes are moved to the same places."""
    if module("kernels").native_library() is None:
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(module("settling"), "has_large_pages", lambda: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.make(tmp_path_factory.mktemp("settled"), MODEL)


class Opened:
    """All tensors of a checkpoint, what they held and where they lay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(folder)
        self.tensors = {name: self.checkpoint[name] for name in self.checkpoint}
        self._addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self._bytes = {name: as_bytes(tensor).clone() for name, tensor in self.tensors.items()}
        chosen = BACKEND.settling()
        assert chosen is not None
        self.settling: Settling = chosen
        self.files = {
            path: data
            for path, data in self.checkpoint.mapped_files().items()
            if data.nbytes >= chosen.least_bytes
        }
        self.nbytes = sum(data.nbytes for data in self.files.values())

    def check(self) -> None:
        assert {name: tensor.data_ptr() for name, tensor in self.tensors.items()} == self._addresses
        changed = [n for n, t in self.tensors.items() if not torch.equal(as_bytes(t), self._bytes[n])]
        assert not changed

    def mapped(self) -> set[Path]:
        return {path for path in self.checkpoint.mapped_files() if str(path) in maps()}


def as_bytes(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    )


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def ignore(done: int) -> None:
    pass


def test_bytes_and_addresses_stay_and_the_file_s_mapping_goes(folder: Path) -> None:
    opened = Opened(folder)
    everything = opened.mapped()
    assert len(opened.files) == LARGE_SHARDS < len(everything)
    seen: list[int] = []
    assert opened.settling.settle(opened.files, seen.append) == opened.nbytes
    opened.check()
    assert opened.mapped() == everything - set(opened.files)
    assert seen == sorted(seen)
    assert seen[-1] == opened.nbytes
    begins = {f"{data.data_ptr():x}-" for data in opened.files.values()}
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            begin = next((b for b in begins if line.startswith(b)), "")
        elif line.startswith("VmFlags:") and begin:
            flags[begin] = line.split()
    # `hg`: advised to be large pages
    assert len(flags) == LARGE_SHARDS
    assert (
        all("hg" in found for found in flags.values())
        or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    )
    # neighbouring regions of memory become one; addresses tell whether it is gone
    addresses = [data.data_ptr() for data in opened.files.values()]
    before = anonymous_bytes()
    nbytes = opened.nbytes
    opened.checkpoint.close()
    del opened
    assert before - anonymous_bytes() >= 0.95 * nbytes
    held = [tuple(int(a, 16) for a in line.split()[0].split("-")) for line in maps().splitlines()]
    assert not any(begin <= address < end for address in addresses for begin, end in held)


def test_a_file_that_was_replaced_does_not_change_what_is_mapped(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    opened = Opened(copy)
    replaced, gone, *_ = sorted(opened.files)
    (tmp_path / "other").write_bytes(bytes(replaced.stat().st_size))
    os.replace(tmp_path / "other", replaced)
    gone.unlink()
    assert opened.settling.settle(opened.files, ignore) == opened.nbytes
    opened.check()


@pytest.mark.parametrize("change", [1, -5_000_000])
def test_a_file_of_another_size_stays_mapped(
    folder: Path, tmp_path: Path, change: int, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    opened = Opened(copy)
    everything, first = opened.mapped(), next(iter(opened.files))
    os.truncate(first, first.stat().st_size + change)
    with caplog.at_level(logging.INFO, logger="v4sdk"):
        assert opened.settling.settle(opened.files, ignore) == 0
    assert caplog.messages[0].startswith(f"weights stay mapped from `{first.name}` on: it has ")
    assert opened.mapped() == everything
    if change > 0:
        opened.check()


class Refusing:
    """The system's functions, one of which fails."""

    def __init__(self, libc: Any, name: str) -> None:
        self._libc, self._name = libc, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            return lambda *args: module("settling")._FAILED
        return getattr(self._libc, name)


@pytest.mark.parametrize("fails", ["mmap", "mremap", "read", "maps"])
def test_what_the_system_refuses_leaves_everything_as_it_was(
    folder: Path, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Opened(folder)
    everything, before = opened.mapped(), anonymous_bytes()
    if fails == "read":
        # as of a file that was cut off
        monkeypatch.setattr(os, "preadv", lambda *args: 0)
    elif fails == "maps":
        monkeypatch.setattr(module("settling"), "file_maps", list)
    else:
        refusing = Refusing(module("settling")._libc(), fails)
        monkeypatch.setattr(module("settling"), "_libc", lambda: refusing)
    with caplog.at_level(logging.INFO, logger="v4sdk"):
        assert opened.settling.settle(opened.files, ignore) == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"weights stay mapped from `{next(iter(opened.files)).name}` on: ")
    assert opened.mapped() == everything
    opened.check()
    assert anonymous_bytes() - before < 4_000_000


def test_ctrl_c_leaves_each_file_mapped_or_copied(folder: Path) -> None:
    opened = Opened(folder)
    threads, before = threading.active_count(), anonymous_bytes()
    first = next(iter(opened.files.values())).nbytes

    def interrupt(done: int) -> None:
        if done > first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.settling.settle(opened.files, interrupt)
    opened.check()
    assert len(opened.mapped() & set(opened.files)) == LARGE_SHARDS - 1
    assert threading.active_count() == threads
    assert anonymous_bytes() - before < first + 4_000_000


def logits(folder: Path, **options: Any) -> tuple[Tensor, list[Progress], set[str]]:
    """Logits of a session, what it reported at load, and the shards it had mapped."""
    seen: list[Progress] = []
    with Session.load(
        folder, backend="cpu", on_progress=seen.append, context_limit=64, prefill_chunk=16, **options
    ) as session:
        found = session.logits(IDS)
        mapped = {path.name for path in folder.glob("*.safetensors") if str(path) in maps()}
    return found, seen, mapped


def memory_line(seen: list[Progress]) -> str:
    return next(one.text for one in seen if one.kind == "memory")


def test_a_session_settles_says_so_and_computes_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "mapped")
    expected, seen, mapped = logits(folder)
    assert len(mapped) > LARGE_SHARDS
    assert " mapped, 0.0 MB resident, " in memory_line(seen)
    monkeypatch.setenv(VARIABLE, "auto")
    collect()
    before = anonymous_bytes()
    found, seen, settled = logits(folder)
    assert torch.equal(found, expected)
    assert len(mapped - settled) == LARGE_SHARDS
    with Checkpoint(folder) as checkpoint:
        large = {shard for shard, size in checkpoint.headers.shard_bytes.items() if size >= 8 << 20}
        resident = sum(t.end - t.begin for t in checkpoint.headers.tensors.values() if t.shard in large)
        rest = checkpoint.nbytes - resident
    assert memory_line(seen).startswith(f"{rest / 1e6:.1f} MB mapped, {resident / 1e6:.1f} MB resident, ")
    last = [one for one in seen if one.kind == "load"][-1]
    assert last.unit == "MB"
    assert last.done == last.total >= resident // 10**6
    # the session is closed: nothing of the copy is left
    assert anonymous_bytes() - before < resident / 4


def test_half_of_the_free_memory_is_the_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` copies what is small, `resident` what fits."""
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # to compute with, rows of the cache, and what a reserve is
    beside = 20_000_000
    collect()
    roomy = logits(folder, memory_limit=used_memory() + 2 * (nbytes + beside) + 20_000_000)
    assert ", 0.0 MB resident" not in memory_line(roomy[1])
    collect()
    limit = used_memory() + nbytes + beside + 20_000_000
    _, seen, mapped = logits(folder, memory_limit=limit)
    assert ", 0.0 MB resident" in memory_line(seen)
    assert len(mapped) > LARGE_SHARDS
    monkeypatch.setenv(VARIABLE, "resident")
    collect()
    _, seen, mapped = logits(folder, memory_limit=limit)
    assert memory_line(seen).startswith("0.0 MB mapped, ")
    assert not mapped
    with pytest.raises(MemoryRefused, match=r"needs .* resident") as refused:
        logits(folder, memory_limit=used_memory() + nbytes - 5_000_000)
    assert refused.value.hint == f"leave out {VARIABLE}=resident: weights are then read from their files"


def test_what_is_chosen_and_what_doctor_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> str:
        return next(row.finding for row in BACKEND.doctor() if row.subject == "weights")

    assert "at most half of the free memory" in row()
    monkeypatch.setenv(VARIABLE, "resident")
    assert f"at load ({VARIABLE}=resident)" in row()
    monkeypatch.setenv(VARIABLE, "mapped")
    assert BACKEND.settling() is None
    assert row() == f"mapped from their files ({VARIABLE}=mapped)"
    monkeypatch.setenv(VARIABLE, "sometimes")
    with pytest.raises(ConfigError, match=f"{VARIABLE} is `sometimes`, expected auto, mapped or resident"):
        BACKEND.settling()
    monkeypatch.setattr(module("settling"), "has_large_pages", lambda: False)
    monkeypatch.delenv(VARIABLE)
    assert BACKEND.settling() is None
    assert "no large pages" in row()
    # without them memory still keeps what a file's pages may lose
    monkeypatch.setenv(VARIABLE, "resident")
    assert BACKEND.settling() is not None


def test_small_models_and_small_files_stay_mapped() -> None:
    seen: list[Progress] = []
    with Session.load(backend="cpu", on_progress=seen.append) as session:
        assert str(session.loaded.folder) in maps()
    assert ", 0.0 MB resident" in memory_line(seen)
    assert {one.unit for one in seen if one.kind == "load"} == {"layers"}
