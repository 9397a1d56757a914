"""A model larger than memory: experts come from disk through a bounded cache, and the bound is measured, not believed."""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import torch

from v4sdk import plugins
from v4sdk.backend import ExpertPaging
from v4sdk.numerics import REFERENCE
from v4sdk.ops import routed_experts
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.weights import ExpertWeights, Weight

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pages are advised by Linux only"
)
ROOT = Path(__file__).parent.parent
PAGE = mmap.PAGESIZE
# 95 MB, of which 87 MB are routed experts
LARGE = shrunk(
    V4_FLASH, (0, 4, 128, 4), vocab_size=64, hidden_size=512, num_attention_heads=4, head_dim=128, q_lora_rank=64, o_groups=2,
    o_lora_rank=32, index_n_heads=4, index_topk=4, n_routed_experts=52, num_experts_per_tok=2, moe_intermediate_size=512,
)  # fmt: skip
ALLOWED = 63_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_checkpoint.make(tmp_path_factory.mktemp("large"), LARGE)
    # pages that are not on disk yet cannot be dropped from the page cache
    os.sync()
    return folder


def decode(folder: Path, kind: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "paged_decode.py"), str(folder), str(ALLOWED), kind, "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_checkpoint_of_one_and_a_half_times_the_limit_decodes_within_it(large: Path) -> None:
    size = sum(file.stat().st_size for file in large.iterdir())
    assert size >= 1.5 * ALLOWED
    bounded = decode(large, "bounded")
    assert bounded["finish_reason"] == "length"
    assert bounded["grown"] <= ALLOWED
    assert bounded["usage"]["evictions"] > 0
    assert bounded["usage"]["resident_bytes"] <= bounded["usage"]["budget_bytes"]
    assert "read from disk when they are chosen" in bounded["notices"][0]
    assert bounded["still_mapped"] == 0
    # the same measure finds a cache that never gives anything back
    unbounded = decode(large, "unbounded")
    assert unbounded["grown"] > ALLOWED
    assert unbounded["ids"] == bounded["ids"]


EXPERTS, ROWS, COLS = 6, 24, 96
# three float32 matrices of an expert: 27,648 bytes, so that experts begin and end inside pages
EXPERT_BYTES = 3 * ROWS * COLS * 4
# a fault maps what is cached around it: 16 pages as Linux is usually set, at both ends of an expert
AROUND = 2 * 16 * PAGE


class Mapped:
    """Two layers of experts in one file, behind and before bytes that are no experts, and what pages are in memory."""

    def __init__(self, path: Path, rows: int = ROWS, cols: int = COLS) -> None:
        # an expert touches at most this many bytes of pages
        self.held = (3 * rows * cols * 4 // PAGE + 2) * PAGE
        values = torch.randn(2 * EXPERTS * 3 * rows * cols, generator=torch.Generator().manual_seed(1)) * 0.1
        raw = b"h" * 100 + values.numpy().tobytes() + b"t" * 50
        path.write_bytes(raw)
        with path.open("rb") as file:
            # what was just written may lie in the page cache in pieces of 2 MB, which come as a whole: have it read again
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.whole = torch.from_file(str(path), shared=False, size=len(raw), dtype=torch.uint8)
        self.layers = []
        at = 100
        for _ in range(2):
            ws: tuple[list[Weight], list[Weight], list[Weight]] = ([], [], [])
            for _ in range(EXPERTS):
                for matrices, shape in zip(ws, ((rows, cols), (cols, rows), (rows, cols)), strict=True):
                    end = at + 4 * rows * cols
                    matrices.append(Weight(self.whole[at:end].view(torch.float32).view(shape)))
                    at = end
            self.layers.append(ExpertWeights(tuple(ws[0]), tuple(ws[1]), tuple(ws[2])))

    def resident_bytes(self) -> int:
        """Bytes of the file's pages in this process's memory."""
        begin = self.whole.data_ptr()
        found, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                low, high = (int(address, 16) for address in line.split()[0].split("-"))
                inside = low < begin + len(self.whole) and begin < high
            elif inside and line.startswith("Rss:"):
                found = int(line.split()[1]) * 1024
        return found

    def drop(self) -> None:
        begin = self.whole.data_ptr()
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(len(self.whole)), 4)


def paged(mapped: Mapped, num_experts: int) -> tuple[ExpertPaging, list[ExpertWeights]]:
    paging = plugins.select("cpu").page_experts(num_experts * mapped.held)
    return paging, [paging.prepare_experts("layer", one) for one in mapped.layers]


def choose(paging: ExpertPaging, experts: ExpertWeights, ids: list[list[int]]) -> torch.Tensor:
    tokens = len(ids)
    u = torch.randn(tokens, experts.w1[0].in_features, generator=torch.Generator().manual_seed(2))
    weights = torch.full((tokens, len(ids[0])), 0.5)
    run = paging.around(routed_experts)
    return run(u, torch.tensor(ids, dtype=torch.int32), weights, experts, 10.0, REFERENCE)


def counts(paging: ExpertPaging) -> tuple[int, int, int]:
    usage = paging.usage()
    return usage.hits, usage.misses, usage.evictions


@pytest.fixture
def mapped(tmp_path: Path) -> Mapped:
    return Mapped(tmp_path / "experts")


@pytest.fixture(params=("compiled", "plain"))
def cache_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both caches: the one in the library, where that was built, and the one in Python."""
    module = importlib.import_module(type(plugins.select("cpu")).__module__)
    if request.param == "plain":
        monkeypatch.setattr(module, "native_library", lambda: None)
    elif module.native_library() is None:
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    return str(request.param)


@pytest.mark.usefixtures("cache_kind")
def test_the_least_recently_used_expert_leaves_first(mapped: Mapped) -> None:
    paging, (one, two) = paged(mapped, 3)
    for e in (0, 1, 2):
        choose(paging, one, [[e]])
    assert counts(paging) == (0, 3, 0)
    choose(paging, one, [[0]])
    # 1 is the oldest now
    choose(paging, two, [[5]])
    assert counts(paging) == (1, 4, 1)
    choose(paging, one, [[0, 2]])
    assert counts(paging) == (3, 4, 1)
    choose(paging, one, [[1]])
    assert counts(paging) == (3, 5, 2)
    assert paging.usage().read_bytes == 5 * EXPERT_BYTES


@pytest.mark.usefixtures("cache_kind")
def test_evicted_pages_leave_and_shared_ones_stay_with_their_neighbour(tmp_path: Path) -> None:
    mapped = Mapped(tmp_path / "large", rows=100, cols=380)
    paging, (one, _) = paged(mapped, 2)
    choose(paging, one, [[1]])
    choose(paging, one, [[2]])
    both = mapped.resident_bytes()
    # 1 goes, 2 stays with the page it shares with 1: nothing of 2 is read again
    choose(paging, one, [[4]])
    assert mapped.resident_bytes() <= both + AROUND < both + mapped.held
    found = choose(paging, one, [[2]])
    assert counts(paging) == (1, 3, 1)
    usage = paging.usage()
    assert usage.resident_bytes <= usage.budget_bytes
    torch.testing.assert_close(found, choose_plain(mapped.layers[0], [[2]]), rtol=0, atol=0)


def choose_plain(experts: ExpertWeights, ids: list[list[int]]) -> torch.Tensor:
    u = torch.randn(len(ids), experts.w1[0].in_features, generator=torch.Generator().manual_seed(2))
    weights = torch.full((len(ids), len(ids[0])), 0.5)
    return routed_experts(u, torch.tensor(ids, dtype=torch.int32), weights, experts, 10.0, REFERENCE)


@pytest.mark.usefixtures("cache_kind")
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_more_experts_than_fit_are_computed_in_groups_with_the_same_result(
    mapped: Mapped, tokens: int
) -> None:
    paging, (one, _) = paged(mapped, 2)
    ids = [[t % EXPERTS, (t * t + 1 + t % EXPERTS) % EXPERTS] for t in range(tokens)]
    torch.testing.assert_close(choose(paging, one, ids), choose_plain(mapped.layers[0], ids), rtol=0, atol=0)
    usage = paging.usage()
    assert usage.resident_bytes <= usage.budget_bytes


@pytest.mark.usefixtures("cache_kind")
def test_memory_that_is_no_file_is_never_given_back(mapped: Mapped) -> None:
    copies = []
    for one in mapped.layers:
        w1, w2, w3 = (tuple(Weight(w.data.clone()) for w in ws) for ws in (one.w1, one.w2, one.w3))
        copies.append(ExpertWeights(w1, w2, w3))
    paging = plugins.select("cpu").page_experts(1)
    one = paging.prepare_experts("layer", copies[0])
    for e in range(EXPERTS):
        choose(paging, one, [[e]])
    torch.testing.assert_close(
        choose(paging, one, [[0]]), choose_plain(mapped.layers[0], [[0]]), rtol=0, atol=0
    )
