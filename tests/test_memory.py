"""Planning before loading: the numbers are the formula's, the tightest bound counts, and refusal comes with all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from v4sdk.errors import ConfigError, MemoryRefused
from v4sdk.kv_cache import kv_bytes
from v4sdk.memory import (
    ExpertSizes,
    FreeMemory,
    expert_budget,
    free_memory,
    parse_bytes,
    plan_memory,
    step_bytes,
    used_memory,
)
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


def test_settled_weights_are_resident_and_only_small_models_are_settled() -> None:
    settled = FLASH.settled(159_000_000_000)
    assert settled.render().startswith("609.5 MB mapped, 159.50 GB resident, 3.70 GB of KV")
    assert FLASH.is_small(10**9) == settled.is_small(10**9) is True
    # 163.8 GB, 1 GB to compute with and a twentieth of 350 GB are more than half of that
    assert not replace(FLASH, free=FreeMemory(350 * 10**9, "of this machine")).is_small(10**9)
    assert not replace(FLASH, free=None).is_small(0)
    with pytest.raises(MemoryRefused, match=r"needs 163\.20 GB in memory") as refused:
        replace(settled, free=FreeMemory(100 * 10**9, "of this machine")).check("WEIGHTS=resident")
    assert refused.value.hint == "leave out WEIGHTS=resident: weights are then read from their files"


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


def test_file_pages_of_others_are_free_and_own_ones_are_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/status": "RssAnon:      7 kB\nRssFile:      100 kB\nRssShmem:       0 kB\n",
            "proc/self/cgroup": "0::/group\n",
            "sys/fs/cgroup/group/memory.max": "5000000\n",
            "sys/fs/cgroup/group/memory.current": "4000000\n",
            "sys/fs/cgroup/group/memory.stat": "inactive_file 250000\nactive_file 602400\n",
        },
    )
    assert free_memory(tmp_path) == FreeMemory(1_750_000, "under this process's memory limit")


def test_a_limit_that_is_asked_for_counts_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = "RssAnon:      1000 kB\nRssFile:      500 kB\nRssShmem:       0 kB\n"
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/status": status})
    assert used_memory(tmp_path) == 1500 * 1024
    asked = FreeMemory(8_000_000 - 1500 * 1024, "of the 8.0 MB allowed, 1.5 MB in use")
    assert free_memory(tmp_path, "8MB") == asked
    monkeypatch.setenv("V4SDK_MEMORY_LIMIT", "8000000")
    assert free_memory(tmp_path) == asked
    # the system's own bound still counts
    assert free_memory(tmp_path, "1TB") == FreeMemory(16_000_000 * 1024, "of this machine")


def test_sizes_are_read_in_decimal_and_binary_units() -> None:
    assert [parse_bytes(s) for s in (12, "12", "8GB", "7.5 GiB", "3mb")] == [
        12, 12, 8 * 10**9, 15 << 29, 3 * 10**6,
    ]  # fmt: skip
    for wrong in ("", "8XB", "-1", "0", "GB"):
        with pytest.raises(ConfigError, match="expected bytes, or a size such as"):
            parse_bytes(wrong)


EXPERTS = ExpertSizes(total_bytes=147 * 10**9, one_bytes=13_369_344, per_token=6)


def test_experts_get_what_is_left_beside_what_every_token_needs() -> None:
    assert expert_budget(FLASH, EXPERTS, 0) is None
    tight = replace(FLASH, free=FreeMemory(64 * 10**9, "of this machine"))
    budget = expert_budget(tight, EXPERTS, step_bytes=10**9)
    assert budget is not None
    dense = FLASH.mapped_bytes - EXPERTS.total_bytes
    assert budget.nbytes == 64 * 10**9 - FLASH.needed_bytes - dense - 10**9 - 32 * 10**8
    assert budget.render() == (
        "147.00 GB of routed experts do not fit into the 64.00 GB free (of this machine), so they are read from disk when "
        "they are chosen, through a cache of 42.99 GB (29% of them)"
    )


def test_less_than_two_layers_of_one_token_is_refused_with_numbers() -> None:
    tiny = replace(FLASH, free=FreeMemory(17 * 10**9, "of this machine"))
    with pytest.raises(MemoryRefused) as refused:
        expert_budget(tiny, EXPERTS, step_bytes(V4_FLASH, 1024))
    assert refused.value.message == (
        "the model needs 18.96 GB in memory even with its routed experts on disk, expected at most 17.00 GB (of this "
        "machine): 12.61 GB of weights that every token needs, 500.0 MB resident, 3.70 GB of KV, 1.99 GB to compute with, "
        "160.4 MB for the 6 experts of a token in two layers"
    )


def test_this_machine_answers() -> None:
    free = free_memory()
    # a system without /proc/meminfo does not say, and then nothing is refused
    assert (free is not None) == Path("/proc/meminfo").exists()
    assert free is None or free.nbytes > 0
