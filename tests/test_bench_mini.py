"""v4-mini: the same values in every form, the same bytes from every seed, and nothing half written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from v4sdk import Session
from v4sdk.checkpoint import Checkpoint
from v4sdk.convert import unquantised
from v4sdk.tensors import expected_tensors
from v4sdk_bench.mini import checkpoint as mini
from v4sdk_bench.mini.checkpoint import MINI, TINY_MINI, MiniError
from v4sdk_bench.mini.cli import mini as mini_command
from v4sdk_bench.mini.values import DrawnTensors
from v4sdk_bench.parity.independent import RELATIVE_LIMIT
from v4sdk_bench.parity.metrics import relative_l2
from v4sdk_bench.peers.formats import bytes_per_token, gguf_config

# of the tiny variant, seed 0: another value here means that published numbers belong to another model
TINY_DIGEST = "d853ddd2cb2f3cb4d62c210ec45a1d6226a4541d1854408d1250a2332fcb9c95"
IDS = torch.randint(0, TINY_MINI.vocab_size, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    mini.lay_out(root, ("native", "bf16"), config=TINY_MINI)
    return root


def test_twins_hold_the_same_values_in_other_formats(twins: Path) -> None:
    assert mini.differences(twins / "native", twins / "bf16") == []
    with Checkpoint(twins / "native") as native, Checkpoint(twins / "bf16") as floats:
        stored = {native[name].dtype for name in native}
        assert {torch.float8_e4m3fn, torch.int8, torch.float8_e8m0fnu} <= stored
        assert {floats[name].dtype for name in floats} == {torch.bfloat16, torch.float32, torch.int64}
        # also what stays float32 is on the BF16 grid: an engine that rounds everything loses nothing
        for name in floats:
            x = floats[name]
            assert not x.is_floating_point() or torch.equal(x.bfloat16().float(), x.float()), name
    raw = json.loads((twins / "native" / "config.json").read_text())
    assert raw["expert_dtype"] == "fp4"
    assert raw["quantization_config"]["quant_method"] == "fp8"


def test_one_changed_value_is_found(twins: Path, tmp_path: Path) -> None:
    shutil.copytree(twins / "bf16", tmp_path / "bf16")
    shard = sorted((tmp_path / "bf16").glob("*.safetensors"))[2]
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("experts.3.w2.weight"))
    tensors[name][5, 7] *= 2
    save_file(tensors, shard)
    assert mini.differences(twins / "native", tmp_path / "bf16") == [name]


def test_a_seed_gives_the_same_bytes_everywhere(twins: Path, tmp_path: Path) -> None:
    assert mini.digest_of(twins / "native") == TINY_DIGEST
    assert mini.marker(twins / "bf16")["values"] == TINY_DIGEST
    mini.make(tmp_path / "other", "native", seed=1, config=TINY_MINI)
    assert mini.digest_of(tmp_path / "other") != TINY_DIGEST


def test_drawn_numbers_have_the_level_that_was_asked_for() -> None:
    drawn = DrawnTensors(TINY_MINI, 0)
    head = drawn["head.weight"]
    assert float(head.std()) == pytest.approx(2 * TINY_MINI.hidden_size**-0.5, rel=0.02)
    assert abs(float(head.mean())) < 0.01 * float(head.std())
    table = drawn["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == TINY_MINI.num_experts_per_tok for row in table.tolist())
    assert table.unique().tolist() == list(range(TINY_MINI.n_routed_experts))


def test_both_twins_are_the_same_model_here_and_in_transformers(twins: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with Session.load(twins / "native", numerics="exact") as session:
        native = session.logits(IDS)
    with Session.load(twins / "bf16", numerics="exact") as session:
        floats = session.logits(IDS)
    assert relative_l2(floats, native) <= 3e-6
    # neither flat nor one-hot after all layers
    assert 0.5 < float(native.std()) < 5
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        twins / "bf16", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not [name for names in report.values() for name in names]
    with torch.inference_mode():
        theirs = model.eval()(torch.tensor([IDS]), use_cache=False).logits[0]
    assert relative_l2(theirs, native) <= RELATIVE_LIMIT


def test_finished_forms_are_kept_and_strangers_refused(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is missing")

    with monkeypatch.context() as patched:
        patched.setattr(mini, "make", never)
        assert mini.lay_out(twins, ("native", "bf16"), config=TINY_MINI)["bf16"] == twins / "bf16"
    with pytest.raises(MiniError, match="not an empty folder"):
        mini.lay_out(twins, ("native",), seed=1, config=TINY_MINI)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(MiniError, match=r"it holds `letter\.txt`"):
        mini.lay_out(tmp_path, ("native",), config=TINY_MINI)
    with pytest.raises(MiniError, match="not an empty folder"):
        mini.make(tmp_path, "native", config=TINY_MINI)
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if "file 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mini.lay_out(tmp_path, ("native",), on_progress=stop, config=TINY_MINI)
    assert not mini.is_whole(tmp_path, "native", config=TINY_MINI)
    assert not list(tmp_path.rglob("*.safetensors"))
    said: list[str] = []
    mini.lay_out(tmp_path, ("native",), on_progress=said.append, config=TINY_MINI)
    assert mini.is_whole(tmp_path, "native", config=TINY_MINI)
    assert any("file 6 of 6" in text for text in said)


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(MiniError, match="1,000,000 bytes free") as told:
        mini.lay_out(tmp_path / "new", ("native",), config=TINY_MINI)
    assert "another disk" in str(told.value.hint)
    assert not (tmp_path / "new").exists()


def test_a_gguf_needs_a_converter_and_says_where_it_is_found(tmp_path: Path) -> None:
    asked = CliRunner().invoke(mini_command, [str(tmp_path / "m"), "--kind", "gguf"])
    assert isinstance(asked.exception, MiniError)
    assert "llama-cpp-python" in str(asked.exception.hint)
    assert "GB in" in asked.stderr
    asked = CliRunner().invoke(
        mini_command, [str(tmp_path / "m"), "--kind", "gguf", "--converter", str(tmp_path)]
    )
    assert isinstance(asked.exception, MiniError)
    assert "conversion/deepseek.py" in asked.exception.message
    assert not (tmp_path / "m").exists()


def test_the_command_makes_what_it_names(
    tmp_path: Path, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "missing_kinds", lambda *_: ["native", "bf16"])
    monkeypatch.setattr(
        mini, "lay_out", lambda *_, **__: {"native": twins / "native", "bf16": twins / "bf16"}
    )
    done = CliRunner().invoke(mini_command, [str(tmp_path)])
    assert done.exit_code == 0
    assert TINY_DIGEST in done.stdout
    assert done.stdout.count("bytes)") == 2


def test_the_sizes_are_those_of_the_common_model() -> None:
    assert sum(spec.parameters for spec in expected_tensors(MINI)) == 935_112_949
    # decimal megabytes that a decoded token reads, worked out by hand for native, FP4 beside BF16, and BF16
    for stored, megabytes in (("native", 187), ("mxfp4+bf16", 270), ("bf16", 381)):
        assert bytes_per_token(MINI, stored) / 1e6 == pytest.approx(megabytes, abs=1)  # type: ignore[arg-type]
    assert bytes_per_token(MINI, "bf16", 2048) > bytes_per_token(MINI, "bf16")
    assert mini.needed_bytes("gguf") > mini.needed_bytes("native")
    assert gguf_config(MINI).expert_dtype == "fp4"
    assert unquantised(MINI).expert_dtype is None
