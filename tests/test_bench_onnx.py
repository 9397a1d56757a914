"""The exported graph says what the model says, describes itself, and disagrees with a model that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from v4sdk import ops as o
from v4sdk.backend import Backend, Kernel, kernel
from v4sdk.config import ModelConfig
from v4sdk.config_file import config_dict
from v4sdk.convert import write_checkpoint
from v4sdk.errors import V4Error
from v4sdk.presets import V4_FLASH
from v4sdk_bench.export import witness as onnx_witness
from v4sdk_bench.export import write as onnx_export
from v4sdk_bench.export.cli import export_onnx
from v4sdk_bench.export.trace import (
    Source,
    Traced,
    boundary_tokens,
    chain,
    layers_of_each_kind,
    reweighted,
    trace,
)
from v4sdk_bench.export.witness import compare, ours, random_ids
from v4sdk_bench.export.write import ExportError, block_parts, evaluate, model_of, prefill_part, write
from v4sdk_bench.parity.metrics import relative_l2
from v4sdk_bench.parity.tiny import draw
from v4sdk_bench.record import Record
from v4sdk_bench.stage import Bench

# every kind of layer, hashed and learned routing; boundaries at 4, 8 and 16 tokens
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16,
    q_lora_rank=16, o_groups=2, o_lora_rank=16, sliding_window=16, compress_ratios=(0, 4, 8),
    compress_rope_theta=160000.0, rope_theta=10000.0, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=1, routed_scaling_factor=1.5,
    swiglu_limit=10.0, hc_mult=2, hc_sinkhorn_iters=2, hc_eps=1e-6, rms_norm_eps=1e-6, max_position_embeddings=4096,
    num_nextn_predict_layers=1, rope_factor=16.0, rope_original_context=64,
)  # fmt: skip
PARTS = ("embed", "swa-hash", "csa", "hca", "head")


class Plain(Backend):
    """A backend without kernels, or with those given."""

    name = "plain"

    def __init__(self, *kernels: Kernel[..., Any]) -> None:
        self._kernels = kernels

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> Sequence[Kernel[..., Any]]:
        return self._kernels


@pytest.fixture(scope="module")
def source() -> Source:
    return Source.read("tiny", "0" * 64, CONFIG, draw(CONFIG, 0))


@pytest.fixture(scope="module")
def traced(source: Source) -> Traced:
    # of one length, which takes half the time; the command's test has the open one
    return trace(source, boundary_tokens(CONFIG))


@pytest.fixture(scope="module")
def prefill(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "prefill.onnx"
    write(model_of(traced, prefill_part(traced.source.config, with_choices=True)), path)
    return path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    record = Record("2026-01-01", "v4sdk bench run", {}, {}, {})
    return Bench(Plain(), record, tmp_path, tmp_path, quick=True)


def found_by(
    source: Source, backend: Backend | None = None, num_tokens: int | None = None
) -> dict[str, Tensor]:
    ids = random_ids(source.config, num_tokens or boundary_tokens(source.config), 0)
    return ours(source.config, source.tensors, ids, backend)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_agrees(traced: Traced, tmp_path: Path, name: str) -> None:
    parts = {part.name: part for part in block_parts(traced.source.config, traced.source.layers)}
    assert set(parts) == set(PARTS)
    write(model_of(traced, parts[name]), tmp_path / "part.onnx")
    values = compare(tmp_path / "part.onnx", parts[name], found_by(traced.source)).values
    assert values["max_abs"] <= onnx_witness.BLOCK_MAX_ABS
    assert values["largest"] > 1, "silence agrees with everything"
    chosen = {"swa-hash": ["route"], "csa": ["index", "route"], "hca": ["route"]}.get(name, [])
    assert {key: share for key, share in values.items() if key.endswith("_equal")} == {
        f"{kind}_sets_equal": 1.0 for kind in chosen
    }


def test_a_file_describes_itself_and_not_the_machine(source: Source, prefill: Path) -> None:
    model = onnx.load(prefill)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["v4sdk.numerics"] == "exact"
    assert about["v4sdk.tokens"] == "48"
    assert about["v4sdk.fingerprint"] == source.fingerprint
    assert about["v4sdk.layers"] == "[0, 1, 2]"
    assert about["v4sdk.outputs"] == ",".join(output.name for output in model.graph.output)
    assert int(about["v4sdk.opset"]) == next(i.version for i in model.opset_import if i.domain == "")
    assert model.producer_name == "v4sdk"
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"embed.weight", "layers.1.attn.indexer.wq_b.weight", "layers.2.ffn.experts.w2.weight"} <= names
    raw = prefill.read_bytes()
    assert not [word for word in (b"site-packages", b".py", str(Path.home()).encode()) if word in raw]


def _scaled_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return o.rms_norm(x, weight, eps, dtype) * 1.0001


def _next_expert(
    u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float
) -> tuple[Tensor, Tensor]:
    ids, weights = o.route(u, gate, bias, num_experts_per_tok, scale)
    return (ids + 1) % gate.shape[0], weights


def _without_the_best(
    q: Tensor, w: Tensor, keys: Tensor, batch: Any, topk: int, ratio: int, numerics: Any
) -> Tensor:
    return o.index_topk(q, -w, keys, batch, topk, ratio, numerics)


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        (None, None),
        (kernel(o.rms_norm, _scaled_norm), "relative_l2"),
        (kernel(o.route, _next_expert), "route_sets_equal"),
        (kernel(o.index_topk, _without_the_best), "index_sets_equal"),
    ],
    ids=["none", "norm", "route", "picks"],
)
def test_a_wrong_kernel_turns_its_rows_red(
    traced: Traced, bench: Bench, wrong: Kernel[..., Any] | None, broken: str | None
) -> None:
    bench.backend = Plain(*([wrong] if wrong else []))
    found = found_by(traced.source, bench.backend)
    row = onnx_witness.prefill_row(bench, traced, found)
    blocks = list(onnx_witness.block_rows(bench, traced, found, (0, 1, 2), "block", {"max_abs": 1e-5}))
    bench.record.add(row)
    if broken is None:
        assert [r.state for r in (row, *blocks)] == ["ok"] * 6
        assert row.setting["witness"].startswith("onnxruntime ")  # type: ignore[union-attr]
        assert set(row.values["relative_l2_by_position"]) >= {"0-3", "4-7"}  # type: ignore[arg-type]
        return
    assert row.state == "failed"
    limit = {**row.limits, **{k.removeprefix(">="): v for k, v in row.limits.items()}}[broken]
    value = row.values[broken]
    assert isinstance(value, float)
    assert value < limit if broken.endswith("_equal") else value > limit
    assert any(r.state == "failed" for r in blocks)


def test_another_weight_in_the_file_turns_its_row_red(source: Source, traced: Traced, bench: Bench) -> None:
    # not one in front of a norm, which takes a factor out again
    name = "layers.1.attn.wo_b.weight"
    other = replace(source, tensors={**source.tensors, name: source.tensors[name] * 1.001})
    found = found_by(source)
    try:
        rows = list(
            onnx_witness.block_rows(
                bench, reweighted(traced, other), found, (0, 1, 2), "block", {"max_abs": 1e-5}
            )
        )
    finally:
        reweighted(traced, source)
    assert {row.key.rpartition("/")[2]: row.state for row in rows} == {
        "embed": "ok", "swa-hash": "ok", "csa": "failed", "hca": "ok", "head": "ok",
    }  # fmt: skip


def test_a_stage_without_time_does_not_begin(bench: Bench) -> None:
    bench.deadline = 0.0
    rows = list(onnx_witness.STAGE.run(bench))
    assert [row.state for row in rows] == ["not run"]
    assert rows[0].note.startswith("the stage's time is up")


def test_only_what_is_wanted_is_run(traced: Traced, bench: Bench) -> None:
    bench.only = ("parity/onnx/block/hca",)
    rows = list(
        onnx_witness.block_rows(bench, traced, found_by(traced.source), (0, 1, 2), "block", {"max_abs": 1e-5})
    )
    assert [row.key for row in rows] == ["parity/onnx/block/hca"]
    assert rows[0].command.endswith("--only parity/onnx/block/hca")


def test_without_the_packages_the_row_says_how_to_get_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    rows = list(onnx_witness.STAGE.run(bench))
    assert [row.state for row in rows] == ["not run"]
    assert rows[0].note == "`onnxruntime` is not installed; pip install 'v4sdk[onnx]'"


def test_weights_may_lie_beside_the_file(
    source: Source, traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "EXTERNAL_BYTES", 1000)
    path, part = tmp_path / "big.onnx", prefill_part(source.config)
    size = write(model_of(traced, part), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert size > path.stat().st_size
    assert compare(path, part, found_by(source)).values["relative_l2"] <= 1e-5


def test_a_full_disk_leaves_what_was_there(
    source: Source, traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ExportError, match="No space left on device"):
        write(model_of(traced, prefill_part(source.config)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_layers_of_each_kind_are_the_first_of_each() -> None:
    config = replace(CONFIG, num_hidden_layers=6, compress_ratios=(0, 0, 4, 8, 4, 8), num_hash_layers=3)
    assert layers_of_each_kind(config) == (0, 2, 3, 4)
    small = chain(config, (0, 2, 3, 4))
    assert small.compress_ratios == (0, 4, 8, 4)
    assert [spec.hash_routing for spec in small.layers] == [True, True, False, False]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(export_onnx, [str(w) for w in words], standalone_mode=False)


def refused(result: Result) -> V4Error:
    assert isinstance(result.exception, V4Error), result.exception
    return result.exception


def test_the_command_writes_blocks_that_serve_every_length(
    export: Callable[..., Result], tmp_path: Path
) -> None:
    config = replace(CONFIG, num_hidden_layers=1, compress_ratios=(4,), num_nextn_predict_layers=0)
    tensors = draw(config, 1)
    write_checkpoint(tmp_path / "small", config, tensors, float_dtype="F32", sharded=False)
    result = export("--model", "small", "--blocks", "--check")
    assert result.exception is None
    assert result.return_value == 0
    files = {path.stem: path for path in (tmp_path / "small-blocks").iterdir()}
    assert set(files) == {"embed", "csa-hash", "head"}
    told = [line.split()[:2] for line in result.stdout.splitlines()]
    assert [words for words in told if words[0] == "ok"] == [
        ["ok", name] for name in ("embed", "csa-hash", "head")
    ]
    assert "tracing the model" in result.stderr
    assert "tracing" not in result.stdout
    head = onnx.load(files["head"])
    assert {p.key: p.value for p in head.metadata_props}["v4sdk.tokens"] == "any"
    assert [value.name for value in head.graph.input] == ["streams_1"]
    for num_tokens in (1, 3, 4, 9, 48, 130, 300):
        found = ours(config, tensors, random_ids(config, num_tokens, 0))
        values = {"token_ids": found["token_ids"]}
        for name in ("embed", "csa-hash", "head"):
            values |= evaluate(files[name], values)
        assert values["logits"].shape == (num_tokens, config.vocab_size)
        assert relative_l2(values["logits"], found["logits"]) <= 1e-5
        assert torch.equal(values["index_topk_0"], found["index_topk_0"])
    again = refused(export("--model", "small", "--blocks"))
    assert "is already there" in again.message
    assert again.hint is not None
    assert "--force" in again.hint


def test_a_model_that_cannot_fit_is_refused_with_its_size(
    export: Callable[..., Result], tmp_path: Path
) -> None:
    flash = tmp_path / "flash"
    flash.mkdir()
    (flash / "config.json").write_text(json.dumps(config_dict(V4_FLASH)))
    error = refused(export("--model", flash))
    assert "`flash` takes 1,1" in error.message
    assert "bytes as float32" in error.message
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--output", "no/where/m.onnx"), "folder `no/where` does not exist"),
        (("--output", "."), "is a folder, expected a file"),
        (("--model", "./absent"), "does not exist"),
        (("--blocks", "--output", "taken"), "`taken` is a file, expected a folder"),
    ],
)
def test_bad_input_is_refused_before_work(
    export: Callable[..., Result], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "taken").write_text("")
    error = refused(export(*words))
    assert said in error.message
    assert error.hint


def test_missing_packages_are_named(export: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    error = refused(export())
    assert error.message == "`onnx` and `onnxscript` and `onnxruntime` are not installed"
    assert error.hint == "pip install 'v4sdk[onnx]'"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from v4sdk_bench.export.cli import export_onnx\n"
        "try: export_onnx(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--prefill" in done.stdout


@pytest.mark.slow
def test_the_bundled_model_agrees(bench: Bench) -> None:
    bench.quick = False
    rows = list(onnx_witness.STAGE.run(bench))
    assert {row.key: row.state for row in rows if row.state != "ok"} == {}
    assert [row.setting["graph"] for row in rows] == ["of any length"] * 11


@pytest.mark.slow
def test_the_command_exports_the_bundled_model(export: Callable[..., Result], tmp_path: Path) -> None:
    result = export("--check", "--tokens", "160", "--output", "nano.onnx")
    assert result.return_value == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["nano.onnx"]
