"""The example writes a checkpoint of any sizes that opens, runs, and repeats itself."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from v4sdk.checkpoint import Checkpoint
from v4sdk.config_file import config_dict
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import FAST
from v4sdk.presets import V4_FLASH, shrunk
from v4sdk.weights import WeightSource

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = shrunk(
    V4_FLASH, (0, 4, 128), vocab_size=40, hidden_size=128, num_attention_heads=4, head_dim=128, q_lora_rank=64, o_groups=2,
    o_lora_rank=32, index_n_heads=4, index_topk=4, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=96,
)  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run an example in this process: importing torch once more would take longer than the test."""

    def main(script: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return int(done.value.code or 0)

    return main


def test_random_checkpoint_opens_runs_and_repeats(tmp_path: Path, run: Callable[..., int]) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(config_dict(SMALL)))
    for out in ("a", "b"):
        assert run("make_checkpoint.py", str(tmp_path / out), "--config", str(sizes)) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with Checkpoint(tmp_path / "a") as checkpoint, torch.no_grad():
        assert [layer.kind for layer in checkpoint.config.layers] == ["swa", "csa", "hca", "csa"]
        assert [layer.hash_routing for layer in checkpoint.config.layers] == [True, True, True, False]
        table = checkpoint["layers.0.ffn.gate.tid2eid"]
        assert all(len(set(row)) == 2 for row in table.tolist())
        model = V4Model(Binder(checkpoint.config, WeightSource(checkpoint)), FAST)
        cache = KVCache(checkpoint.config, "native")
        streams = model.forward(cache.batch([cache.allocate()], [[3, 1, 4, 1, 5, 9, 2, 6]], [0]), cache)
        logits = model.logits(streams)
    assert bool(torch.isfinite(logits).all())
    assert logits.std() > 0


def test_bad_sizes_are_one_line(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("make_checkpoint.py", str(tmp_path), "--ratios", "4,x") == 1
    assert capsys.readouterr().err == "error: `--ratios` is `4,x`, expected numbers and commas\n"


def test_decode_cost_reports_each_token(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(config_dict(SMALL)))
    assert run("make_checkpoint.py", str(tmp_path / "m"), "--config", str(sizes)) == 0
    capsys.readouterr()
    assert run("decode_cost.py", str(tmp_path / "m"), "--tokens", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("token")] == ["token 0", "token 1"]
    assert "mapped" in lines[0]
    assert run("decode_cost.py", str(tmp_path / "nowhere")) == 1
    assert "does not exist" in capsys.readouterr().err
