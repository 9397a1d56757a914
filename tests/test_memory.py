"""Planning before loading: the numbers are the formula's, the tightest bound counts, and refusal comes with all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from v4sdk.errors import MemoryRefused
from v4sdk.kv_cache import kv_bytes
from v4sdk.memory import FreeMemory, free_memory, plan_memory
from v4sdk.presets import V4_FLASH

FLASH = plan_memory(
    V4_FLASH,
    mapped_bytes=159_609_485_896,
    resident_bytes=500_000_000,
    context_tokens=1_048_576,
    kv_format="native",
    free=FreeMemory(10**12, "of this machine"),
)


def test_a_plan_that_fits_says_nothing_but_its_numbers() -> None:
    FLASH.check()
    assert FLASH.warning() is None
    assert FLASH.render() == (
        "159.61 GB mapped, 500.0 MB resident, 3.70 GB of KV for 1,048,576 tokens in native; "
        "1,000.00 GB free (of this machine)"
    )


def test_weights_beyond_free_memory_are_a_warning_with_numbers() -> None:
    tight = replace(FLASH, free=FreeMemory(64 * 10**9, "of this machine"))
    tight.check()
    warning = tight.warning()
    assert warning is not None
    assert "exceed free memory by 99.81 GB" in warning
    assert "64.00 GB free" in warning


def test_cache_beyond_free_memory_is_refused_with_numbers() -> None:
    with pytest.raises(
        MemoryRefused, match=r"needs 4\.20 GB in memory, expected at most 4\.00 GB: 159\.61 GB mapped"
    ):
        replace(FLASH, free=FreeMemory(4 * 10**9, "of this machine")).check()


def test_sequences_multiply_and_unknown_memory_refuses_nothing() -> None:
    plan = plan_memory(
        V4_FLASH, mapped_bytes=0, resident_bytes=0, context_tokens=8192, kv_format="native", sequences=3
    )
    assert plan.kv_bytes == 3 * kv_bytes(V4_FLASH, 8192, "native")
    assert "3 x 8,192 tokens" in plan.render()
    unknown = replace(FLASH, free=None, kv_bytes=10**18)
    unknown.check()
    assert unknown.warning() is None


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB\n"


def test_the_system_bound(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    write(tmp_path, {"proc/meminfo": MEMINFO})
    assert free_memory(tmp_path) == FreeMemory(16_000_000 * 1024, "of this machine")


def test_the_tightest_unified_control_group_binds(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "1000\n",
            "sys/fs/cgroup/outer/memory.max": "5000000\n",
            "sys/fs/cgroup/outer/memory.current": "4000000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 10\ninactive_file 250000\n",
        },
    )
    assert free_memory(tmp_path) == FreeMemory(1_250_000, "under this process's memory limit")


def test_a_legacy_control_group_binds_and_its_absence_does_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/host/path\n3:cpuset:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500\n",
        },
    )
    assert free_memory(tmp_path) == FreeMemory(1_000_500, "under this process's memory limit")
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory(tmp_path) == FreeMemory(16_000_000 * 1024, "of this machine")


def test_this_machine_answers() -> None:
    free = free_memory()
    # a system without /proc/meminfo does not say, and then nothing is refused
    assert (free is not None) == Path("/proc/meminfo").exists()
    assert free is None or free.nbytes > 0
