"""The invariances: they hold for what is shipped, and each can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from v4sdk import Session, ops, prompting
from v4sdk.backend import Backend, Kernel, kernel
from v4sdk.kv_cache import KVCache
from v4sdk.numerics import EXACT, FAST, REFERENCE
from v4sdk_bench.parity import invariances
from v4sdk_bench.parity.sides import Side
from v4sdk_bench.stage import BenchError


class Attention(Backend):
    """A backend with an attention kernel of its own."""

    name = "attention"

    def __init__(self, function: Callable[..., Any]) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        run.__signature__ = ops.sparse_attn.signature  # type: ignore[attr-defined]
        self.rows: list[Kernel[Any, Any]] = [kernel(ops.sparse_attn, run)]

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> list[Kernel[Any, Any]]:
        return self.rows


def verdicts(load: Callable[[], Session], *names: str) -> dict[str, bool]:
    return {found.check.key: found.holds for found in invariances.check(load, names=names)}


@pytest.fixture
def exact(chat_folder: Path) -> Callable[[], Session]:
    return lambda: Side("cpu", "exact").load(chat_folder)


def test_every_invariance_holds_in_exact_numerics(exact: Callable[[], Session]) -> None:
    found = {f.check.key: f for f in invariances.check(exact)}
    assert set(found) == {
        "run-rerun", "prefill-decode", "chunked-whole", "batched-alone", "resumed-fresh", "forked-original",
        "rewound-fresh",
    }  # fmt: skip
    assert all(f.holds for f in found.values()), {k: f.verdict for k, f in found.items()}
    for name in ("run-rerun", "resumed-fresh", "forked-original"):
        assert found[name].verdict == "bitwise equal"


def test_the_bundled_model_holds_in_its_default_numerics() -> None:
    assert all(verdicts(lambda: Side("cpu").load(None)).values())


def test_limits_follow_from_what_is_rounded() -> None:
    assert invariances.limit_of(True, FAST).size == 0.0
    assert [invariances.limit_of(False, n).value for n in (EXACT, FAST, REFERENCE)] == [
        "max_abs",
        "kl_mean",
        "kl_mean",
    ]
    assert invariances.limit_of(False, FAST).size < invariances.limit_of(False, REFERENCE).size


def _forgets(
    q: Tensor, kv: Tensor, window: Tensor, entries: Any, picks: Any, batch: Any, *rest: Any
) -> Tensor:
    """In a prefill, sees nothing of the window from before its chunk."""
    if not batch.is_decode:
        rings = batch.num_sequences * window.shape[1]
        kv = torch.cat([torch.zeros_like(kv[:rings]), kv[rings:]])
    return ops.sparse_attn(q, kv, window, entries, picks, batch, *rest)


def test_a_kernel_that_forgets_the_window_fails_where_prompts_are_cut(chat_folder: Path) -> None:
    found = verdicts(
        lambda: Side(Attention(_forgets), "exact").load(chat_folder), "chunked-whole", "run-rerun"
    )
    assert found == {"chunked-whole": False, "run-rerun": True}


def test_a_wrong_decode_kernel_fails_against_prefill(chat_folder: Path) -> None:
    def wrong(
        q: Tensor, kv: Tensor, window: Tensor, entries: Any, picks: Any, batch: Any, *rest: Any
    ) -> Tensor:
        out = ops.sparse_attn(q, kv, window, entries, picks, batch, *rest)
        return out * 1.01 if batch.is_decode else out

    found = verdicts(lambda: Side(Attention(wrong), "exact").load(chat_folder), "prefill-decode", "run-rerun")
    assert found == {"prefill-decode": False, "run-rerun": True}


def test_noise_fails_rerun(chat_folder: Path) -> None:
    def noisy(*args: Any) -> Tensor:
        out = ops.sparse_attn(*args)
        return out + 1e-6 * torch.randn_like(out)

    # the same computation must give the same bits, however small the difference
    assert verdicts(lambda: Side(Attention(noisy), "exact").load(chat_folder), "run-rerun") == {
        "run-rerun": False
    }


def test_a_batch_that_mixes_sequences_fails(chat_folder: Path) -> None:
    def mixing(
        q: Tensor, kv: Tensor, window: Tensor, entries: Any, picks: Any, batch: Any, *rest: Any
    ) -> Tensor:
        out = ops.sparse_attn(q, kv, window, entries, picks, batch, *rest)
        return out.flip(0) if batch.is_decode and batch.num_sequences > 1 else out

    assert verdicts(lambda: Side(Attention(mixing), "exact").load(chat_folder), "batched-alone") == {
        "batched-alone": False
    }


def test_a_fork_that_shares_memory_fails(
    exact: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "restore_fixed", lambda self, rows, snapshot: None)
    assert verdicts(exact, "forked-original") == {"forked-original": False}


def test_a_state_that_loses_its_window_fails(
    exact: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = prompting.read_state

    def lossy(path: Any, header: Any, cache: KVCache) -> Any:
        state = right(path, header, cache)
        for layer in cache.layers:
            layer.window[state.rows.slot] = 0
        return state

    monkeypatch.setattr(prompting, "read_state", lossy)
    assert verdicts(exact, "resumed-fresh") == {"resumed-fresh": False}


def test_a_rewind_that_keeps_the_overwritten_window_fails(
    exact: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    from v4sdk.engine import Engine

    def careless(self: Engine, state: Any, position: int) -> int:
        state.num_cached = min(state.num_cached, position)
        return int(state.num_cached)

    monkeypatch.setattr(Engine, "restore", careless)
    assert verdicts(exact, "rewound-fresh") == {"rewound-fresh": False}


def test_a_model_that_reads_too_little_is_refused(chat_folder: Path) -> None:
    with pytest.raises(BenchError, match="too few to cut in two"):
        list(invariances.check(lambda: Session.load(chat_folder, backend="cpu", context_limit=16)))


def test_the_command_prints_json_and_fails_on_a_difference(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v4sdk_bench.parity.cli import invariances as command

    monkeypatch.setattr(invariances, "CHECKS", invariances.CHECKS[:1])
    args = ["--model", str(chat_folder), "--backend", "cpu", "--numerics", "exact", "--json"]
    done = CliRunner().invoke(command, args, standalone_mode=False)
    report = json.loads(done.stdout)
    assert done.return_value == 0
    assert [(c["check"], c["verdict"], c["max_abs"]) for c in report["checks"]] == [
        ("run = rerun", "bitwise equal", 0.0)
    ]
    monkeypatch.setattr(
        invariances,
        "agreement",
        lambda a, b: invariances.Agreement(1, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0),
    )
    table = CliRunner().invoke(command, args[:-1], standalone_mode=False)
    assert table.return_value == 1
    assert "differs, expected equal bits" in table.stdout
