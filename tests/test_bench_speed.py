"""The suites `ops` and `model` end to end on small things: right results get a time, wrong ones none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk import Session, ops, plugins
from v4sdk.backend import Backend, Kernel, kernel
from v4sdk.config import ModelConfig, QuantizationConfig
from v4sdk.kv_cache import KVCache, kv_bytes
from v4sdk.presets import V4_FLASH
from v4sdk_bench.parity.sides import References
from v4sdk_bench.record import SPEED_ENDINGS, Record, Row
from v4sdk_bench.speed import frontier, real_shapes
from v4sdk_bench.speed import model as model_speed
from v4sdk_bench.speed.ceilings import BYTES, FLOPS, Ceiling
from v4sdk_bench.speed.op_cases import NotTimed, OpCase, Plan, argument_bytes, chosen
from v4sdk_bench.speed.op_counts import LibraryCalls, counted
from v4sdk_bench.speed.synthetic_kv import fill
from v4sdk_bench.stage import Bench, BenchError
from v4sdk_bench.suites import model as model_suite
from v4sdk_bench.suites import model_layers, model_rows
from v4sdk_bench.suites import ops as ops_suite

ROOT = Path(__file__).parent.parent
CASE = "ops/rms_norm/tiny-decode-fast"


class Planted(References):
    """The host with one planted kernel."""

    name = "planted"
    evidence = "emulated"

    def __init__(self, *rows: Kernel[Any, Any]) -> None:
        self.rows = rows

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        return self.rows


def right_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)


def wrong_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return right_norm(x, weight, eps, dtype) * 1.05


def wrong_when_decoding(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = right_norm(x, weight, eps, dtype)
    return y * 1.05 if x.shape[0] == 1 else y


def interrupted_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    raise KeyboardInterrupt


def bench_of(
    tmp_path: Path, backend: Backend | None = None, only: tuple[str, ...] = (), model: Path | None = None
) -> Bench:
    record = Record("2026-01-01T00:00:00+00:00", "test", {}, {}, {})
    return Bench(
        backend or plugins.select("cpu"), record, tmp_path, tmp_path, quick=True, only=only, model=model
    )


def machine(bandwidth: float = 1e13, products: float = 1e15) -> Callable[..., list[Ceiling]]:
    def measure(bench: Bench, budget_s: float | None = None) -> list[Ceiling]:
        named = (("read", bandwidth, BYTES), ("gemm/float32", products, FLOPS))
        return [Ceiling(n, v, unit, v, v, 1, 8, "2026-01-01T00:00:00+00:00") for n, v, unit in named]

    return measure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of a machine nobody reaches, and short rounds."""
    monkeypatch.setattr(ops_suite, "measure_ceilings", machine())
    monkeypatch.setattr(ops_suite, "_CASE_S", {True: 0.002, False: 0.002})


def rows_of(run: Any, bench: Bench) -> dict[str, Row]:
    for row in run(bench):
        if bench.wants(row.key):
            bench.record.add(row)
    return {row.key: row for row in bench.record.rows}


def speeds(row: Row) -> list[str]:
    return [name for name in row.values if name.endswith(SPEED_ENDINGS)]


def test_an_op_gets_its_time_floor_and_share(tmp_path: Path) -> None:
    found = rows_of(ops_suite.run, bench_of(tmp_path, only=("ops/linear",)))
    # where a kernel runs, its reference is timed beside it
    assert {key.removesuffix("/against-reference") for key in found} == {f"ops/linear/{g}-{n}-fast" for g, n in (
        ("tiny", "decode"), ("tiny", "prefill"), ("odd", "decode"), ("odd", "prefill"), ("wide", "decode"),
            ("wide", "prefill"), ("flash", "decode-8k"))}  # fmt: skip
    row = found["ops/linear/tiny-decode-fast"]
    assert row.state == "ok"
    assert row.values["how"] == {"reference": "reference", "device": "kernel"}[plugins.select("cpu").evidence]
    # x [3, 256] BF16 and a [128, 256] FP8 matrix with its two tiles' scales; out [3, 128] BF16
    assert row.values["read_bytes"] == 3 * 256 * 2 + 128 * 256 + 2
    assert row.values["write_bytes"] == 3 * 128 * 2
    assert row.values["flops"] == 2 * 3 * 128 * 256
    assert row.values["in_cache"]
    assert row.values["bound"] == "flops"
    assert row.values["floor_s"] == pytest.approx(2 * 3 * 128 * 256 / 1e15)
    assert row.values["share_of_ceiling"] == pytest.approx(row.values["floor_s"] / row.values["median_s"])
    assert row.values["low_s"] <= row.values["median_s"] <= row.values["high_s"]
    assert row.values["rounds"] >= 5
    assert row.setting["dtype"] == "bfloat16"
    assert row.command.endswith("--only ops/linear/tiny-decode-fast")


def test_a_wrong_kernel_has_no_time(tmp_path: Path) -> None:
    found = rows_of(
        ops_suite.run,
        bench_of(tmp_path, Planted(kernel(ops.rms_norm, wrong_norm)), (CASE, "ops/linear/tiny")),
    )
    assert found[CASE].state == "failed"
    assert not speeds(found[CASE])
    assert found[CASE].values["error"] > 1
    assert "times what is accepted" in found[CASE].note
    assert found["ops/linear/tiny-decode-fast"].state == "ok"


def test_a_right_kernel_is_put_beside_the_reference(tmp_path: Path) -> None:
    found = rows_of(ops_suite.run, bench_of(tmp_path, Planted(kernel(ops.rms_norm, right_norm)), (CASE,)))
    assert found[CASE].values["how"] == "kernel"
    assert found[CASE].evidence == "emulated"
    beside = found[f"{CASE}/against-reference"].values
    assert beside["speed_ratio"] > 0
    assert beside["verdict"]


def test_red_parity_of_the_same_run_takes_the_time_away(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, only=(CASE,))
    bench.record.add(Row("parity/op/rms_norm/tiny", "rms_norm", "failed"))
    row = rows_of(ops_suite.run, bench)[CASE]
    assert (row.state, speeds(row)) == ("failed", [])
    assert "parity/op/rms_norm/tiny" in row.note


def test_a_share_above_the_ceiling_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_suite, "measure_ceilings", machine(products=1.0))
    row = rows_of(ops_suite.run, bench_of(tmp_path, only=("ops/linear/tiny-decode-fast",)))[
        "ops/linear/tiny-decode-fast"
    ]
    assert (row.state, speeds(row)) == ("failed", [])
    assert "below its floor" in row.note


def test_a_kept_row_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, only=(CASE,))
    first = rows_of(ops_suite.run, bench)[CASE]
    monkeypatch.setattr(ops_suite, "run_pytest", lambda *args: pytest.fail("measured twice"))
    assert rows_of(ops_suite.run, bench)[CASE] is first


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, only=(CASE,))
    bench.deadline = 0.0
    row = rows_of(ops_suite.run, bench)[CASE]
    assert (row.state, row.note) == ("not run", "the time of this stage was used up")


def test_ctrl_c_ends_the_suite_and_not_only_the_case(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        rows_of(ops_suite.run, bench_of(tmp_path, Planted(kernel(ops.rms_norm, interrupted_norm)), (CASE,)))


def test_the_caller_s_pytest_settings_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not mine')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option-either\n")
    bench = bench_of(tmp_path, only=(CASE,))
    bench.scratch = tmp_path / "scratch"
    bench.scratch.mkdir()
    before = sorted(tmp_path.iterdir())
    assert rows_of(ops_suite.run, bench)[CASE].state == "ok"
    assert os.environ["PYTEST_ADDOPTS"] == "--no-such-option"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("inside", [False, True], ids=["empty folder", "this repository"])
def test_the_file_runs_by_hand(inside: bool, tmp_path: Path) -> None:
    where = ["bench/speed/bench_ops.py"] if inside else ["--pyargs", "v4sdk_bench.speed.bench_ops"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *where, "-p", "no:cacheprovider", "--benchmark-storage", tmp_path.as_uri(), "-q", "-k",
         "rms_norm and tiny-decode"],
        cwd=ROOT if inside else tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "test_op[rms_norm/tiny-decode-fast]" in done.stdout
    assert not list(tmp_path.iterdir())


def plan_of(name: str, case: str, limit: int = 1 << 40) -> tuple[Plan, OpCase]:
    subject = next(c for c in chosen(quick=False, ops=[name]) if c.case.label == case)
    return Plan(plugins.select("cpu"), V4_FLASH, [subject], 0.001, limit), subject


def test_what_an_op_writes_is_put_back_outside_the_timed_part() -> None:
    plan, subject = plan_of("kv_project_store", "tiny-decode-fast")
    drawn = subject.case.make(torch.device("cpu"))
    plan.cases = [replace(subject, case=replace(subject.case, make=lambda device: drawn))]
    ready = plan.ready(plan.cases[0])
    seen: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> None:
        seen.append(kwargs["window"].clone())

    # the call takes the function that runs; the arguments are its own copies
    for _ in range(2):
        ready.reset()
        ready.call(spy)  # type: ignore[call-arg]
        ready.call()
        ready.call(spy)  # type: ignore[call-arg]
    fresh, written, restored, _ = seen
    assert not torch.equal(fresh, written)
    assert torch.equal(fresh, restored)
    assert torch.equal(fresh, drawn["window"])


def test_large_arguments_are_measured_before_they_are_drawn() -> None:
    plan, subject = plan_of("logits", "flash-decode-8k-fast", limit=10**9)
    assert argument_bytes(subject.case) == 129280 * 4096 * 2 + 4096 * 2
    with pytest.raises(NotTimed, match="1,059,069,952 bytes"):
        plan.ready(subject)
    assert subject.label in plan.left_out


def test_every_op_is_timed_at_tiny_and_at_flash_sizes() -> None:
    found = chosen(quick=True)
    assert {c.op.name for c in found if c.case.scale == "tiny"} == set(ops.OPS)
    assert {c.op.name for c in found if c.case.scale == "flash"} == set(ops.OPS)
    assert len({c.label for c in chosen(quick=False)}) > len(found)


# --- whole models


@pytest.fixture(scope="module")
def session(chat_folder: Path) -> Any:
    with Session.load(chat_folder, backend="cpu") as found:
        yield found


def test_frontiers_of_a_tiny_model(session: Session) -> None:
    plan = frontier.Walk("cpu", None, (64, 128, 100_000), (2048, 1 << 20), probe=4)
    found = list(frontier.walk(session, plan))
    assert [(f.tokens, f.synthetic) for f in found] == [
        (64, False),
        (128, False),
        (2048, True),
        (1 << 20, True),
    ]
    near, far, made_up, beyond = found
    assert (near.segment, far.segment) == (64, 64)
    assert far.prefill_s == pytest.approx(near.segment_s + far.segment_s)
    for one in (near, far, made_up):
        assert len(one.steps) == 4
        assert one.finite
        assert one.kv_formula_bytes == kv_bytes(session.config, one.tokens, session.kv_format)
        assert one.kv_bytes >= one.kv_formula_bytes
        assert one.peak_bytes > 10**7
    values = far.values()
    assert values["ttft_s"] == far.prefill_s + far.first_s
    assert values["prefill_tokens_per_s"] == 64 / far.segment_s
    assert values["tpot_low_s"] <= values["tpot_s"] <= values["tpot_high_s"] <= values["tpot_p99_s"]
    # nobody read the rows of a synthetic context, so there is no time to its first token
    assert "ttft_s" not in made_up.values()
    assert beyond.refused is not None
    assert "4,096" in beyond.refused


def test_the_walk_goes_on_as_if_it_had_not_looked_ahead(session: Session) -> None:
    engine = frontier.engine_of(session)
    ids = frontier.random_ids(session, 128, 0)
    seen: list[Tensor] = []
    advance = type(engine).advance

    class Watched(type(engine)):  # type: ignore[misc]
        def advance(self, states: Any, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(advance(self, states, *args, **kwargs))
            return seen[-1]

    watched = Watched(
        engine.model, engine.cache, engine.backend, engine.prefill_chunk, engine.snapshot_interval
    )
    list(frontier._read(watched, session, frontier.Walk("cpu", probe=9), (64, 128)))
    alone = session.logits(ids, [63, 127])
    assert torch.allclose(seen[0][0], alone[0], rtol=0.05, atol=0.05)
    assert torch.allclose(seen[1][0], alone[1], rtol=0.05, atol=0.05)


def test_a_walk_that_fails_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "_MODULE", "v4sdk_bench.no_such_module")
    with pytest.raises(BenchError, match="ended with code 1: .*No module named v4sdk_bench.no_such_module"):
        list(frontier.in_a_process(frontier.Walk("cpu")))


def test_a_walk_that_says_much_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a pipe holds 64 KiB
    (tmp_path / "chatty.py").write_text(
        "import json, sys\n"
        "sys.stderr.write('a warning\\n' * 100_000)\n"
        "print(json.dumps({'load_s': 1.0, 'start_s': 2.0, 'peak_bytes': 3}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(frontier, "_MODULE", "chatty")
    assert list(frontier.in_a_process(frontier.Walk("cpu"))) == [frontier.Loading(1.0, 2.0, 3)]


def test_made_up_rows_are_numbers_and_change_the_answer(session: Session) -> None:
    cache = KVCache(session.config, session.kv_format)
    model, answers = session.loaded.model, []
    for seed in (0, 0, 1):
        rows = cache.allocate()
        fill(cache, rows, 256, seed)
        answers.append(model.logits(model.forward(cache.batch([rows], [[5]], [256]), cache)))
    assert all(torch.isfinite(a).all() for a in answers)
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_batches_and_calls(session: Session) -> None:
    found = model_speed.batch(session, 3, 40, 5)
    assert (len(found.probe.seconds), found.probe.finite) == (5, True)
    # a host has no clock but its own
    assert found.probe.kernel_seconds == ()
    assert model_speed.aggregate(4, [0.5, 0.5, 9.0]) == 8.0
    calls = model_speed.calls(session, 40)
    layers = session.config.num_hidden_layers
    assert calls.ops["sparse_attn"] == calls.ops["routed_experts"] == layers
    assert calls.ops["hc_post_pre"] == 2 * layers - 1
    assert calls.torch_calls > sum(calls.ops.values())
    assert calls.cost.flops > 0


def test_counting_leaves_the_model_as_it_was(session: Session) -> None:
    before = session.loaded.model.ops
    step = model_speed.decode_step(session, 40)

    def fails() -> None:
        step()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), counted(session.loaded.model) as table:
        fails()
    assert table.calls["embed"] == 1
    assert session.loaded.model.ops is before
    with LibraryCalls() as library:
        torch.ones(2) + 1
    assert sum(library.calls.values()) == 2


def test_a_repeated_step_repeats_its_answer(session: Session) -> None:
    step = model_speed.decode_step(session, 41)
    first = step()
    for _ in range(3):
        assert torch.equal(step(), first)  # type: ignore[arg-type]


def test_the_gate_sees_a_model_that_decodes_wrongly(chat_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, Planted(kernel(ops.rms_norm, wrong_when_decoding)), model=chat_folder)
    found = rows_of(model_suite.whole, bench)
    key = f"model/{chat_folder.name}"
    assert found[f"{key}/gate"].state == "failed"
    assert found[f"{key}/gate"].values["exact_relative_l2"] > model_speed.EXACT_LIMIT
    assert {row.state for row in found.values()} == {"failed"}
    assert {k.removeprefix(f"{key}/") for k in found} == {
        "gate", "load", "frontier", "batch", "calls", "numerics", "noise",
    }  # fmt: skip
    assert not any(speeds(row) for row in found.values())


def test_a_model_whose_parity_is_red_has_no_speed(chat_folder: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, model=chat_folder)
    bench.record.add(
        Row("parity/model/fast-vs-reference/all", "a model", "failed", setting={"model": chat_folder.name})
    )
    found = rows_of(model_suite.whole, bench)
    assert found[f"model/{chat_folder.name}/gate"].state == "ok"
    assert found[f"model/{chat_folder.name}/batch"].state == "failed"


def test_rows_of_a_whole_model(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "QUICK", (32, 64))
    monkeypatch.setattr(frontier, "SYNTHETIC", (1024,))
    monkeypatch.setattr(frontier, "PROBE", 3)
    monkeypatch.setattr(model_suite, "_PAIR_S", {True: 0.1})
    monkeypatch.setattr(model_suite, "_BATCH_STEPS", {True: 3})
    bench = bench_of(tmp_path, model=chat_folder)
    found = rows_of(model_suite.whole, bench)
    key = f"model/{chat_folder.name}"
    assert set(found) == {f"{key}/{part}" for part in (
        "gate", "load", "frontier/32", "frontier/64", "frontier/1024/synthetic", "batch/1", "batch/4", "batch/16", "calls",
        "numerics", "noise")}  # fmt: skip
    assert {row.state for row in found.values()} == {"ok", "info"}
    assert found[f"{key}/load"].values["start_s"] > found[f"{key}/load"].values["load_s"] > 0
    assert found[f"{key}/frontier/64"].setting["tokens"] == 64
    assert found[f"{key}/frontier/1024/synthetic"].setting["state"] == "synthetic KV"
    assert found[f"{key}/batch/16"].values["all_tokens_per_s"] == pytest.approx(
        16 * found[f"{key}/batch/16"].values["each_tokens_per_s"]
    )
    assert "noise" in found[f"{key}/noise"].values
    fingerprint = bench.record.models[chat_folder.name]["fingerprint"]
    assert found[f"{key}/calls"].setting["fingerprint"] == fingerprint


def test_a_failed_row_of_a_model_keeps_its_figures_and_no_speed(tmp_path: Path) -> None:
    values = {"difference": 2.0, "first_token_s": 3.0}
    row = model_rows.row_of(
        bench_of(tmp_path), "model/x/first-token", "", {}, values, limits={"difference": 1.0}
    )
    assert (row.state, row.values) == ("failed", {"difference": 2.0})


def test_a_device_needs_kernel_times_for_its_word(tmp_path: Path) -> None:
    backend = Planted()
    backend.evidence = "device"
    bench = bench_of(tmp_path, backend)
    assert model_rows.row_of(bench, "model/x/load", "", {}, {"load_s": 1.0}).evidence == "compiled"
    assert (
        model_rows.row_of(bench, "model/x/batch/1", "", {}, {"tpot_s": 1.0, "kernel_tpot_s": 0.5}).evidence
        == "device"
    )
    assert model_rows.row_of(bench, "model/x/gate", "", {}, {"kl_mean": 0.0}).evidence == "device"
    values = frontier.Frontier(8, True, steps=(1.0, 2.0, 3.0), kernel_steps=(0.5, 0.7, 0.6)).values()
    assert values["kernel_tpot_s"] == 0.6


# --- layers of released shape, here of a small one

SMALL = replace(
    V4_FLASH, hidden_size=256, num_attention_heads=4, head_dim=128, q_lora_rank=128, o_groups=2, o_lora_rank=128,
    index_n_heads=4, index_topk=16, n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=128,
    quantization=QuantizationConfig(),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layer_of_every_kind(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_shapes, "MODELS", {"flash": SMALL})
    monkeypatch.setattr(real_shapes, "CONTEXT", 2048)
    found = real_shapes.layer(real_shapes.LayerCase("flash", kind, tokens), plugins.select("cpu"))
    assert found.finite
    assert found.relative_l2 <= 1.5e-2
    assert found.routed_alike >= 0.9
    assert 3 <= found.experts <= 16
    if tokens == 1:
        assert found.experts == 3
    # whatever is read was drawn for itself: at least the chosen experts' bytes, 4.25 bits a weight
    assert found.cost.read_bytes > found.experts * 3 * 256 * 128 * 17 // 32
    assert torch.equal(found.step(), found.step())


def test_only_the_chosen_experts_have_bytes_of_their_own() -> None:
    config = real_shapes.LayerCase("flash", "swa").config
    config = replace(config, **{k: getattr(SMALL, k) for k in ("hidden_size", "num_attention_heads", "head_dim", "q_lora_rank",
                     "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")})  # fmt: skip
    tensors = real_shapes.draw_layer(config, "test")
    before = tensors["layers.0.attn.wkv.weight"]
    real_shapes.draw_experts(tensors, config, "test", frozenset({2, 5}))
    own = {index: tensors[f"layers.0.ffn.experts.{index}.w1.weight"] for index in (0, 1, 2, 5)}
    assert own[1] is own[0]
    assert not torch.equal(own[2], own[0])
    assert not torch.equal(own[2], own[5])
    assert tensors["layers.0.attn.wkv.weight"] is before


def test_a_layer_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_shapes, "MODELS", {"flash": SMALL})
    monkeypatch.setattr(real_shapes, "free_bytes", lambda backend: 1000)
    with pytest.raises(BenchError, match="1,000 are free"):
        real_shapes.layer(real_shapes.LayerCase("flash", "swa"), plugins.select("cpu"))


def test_rows_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_shapes, "MODELS", {"flash": SMALL})
    monkeypatch.setattr(model_layers, "_LAYER_S", {True: 0.01})
    bench = bench_of(tmp_path)

    def noted(bench: Bench, budget_s: float | None = None) -> None:
        bench.record.ceilings += [vars(c) for c in machine()(bench)]

    monkeypatch.setattr(ops_suite, "measure_ceilings", noted)
    row = rows_of(model_layers.layers, bench)["model/flash/layer/csa/decode"]
    assert row.state == "ok"
    assert row.values["floor_s"] == pytest.approx(
        (row.values["read_bytes"] + row.values["write_bytes"]) / 1e13
    )
    assert 0 < row.values["share_of_ceiling"] < 1
    assert row.setting["state"] == "synthetic KV and weights"
    slow = replace(row, values={**row.values, "median_s": 1e-12})
    broken = model_layers._with_floor(slow, machine()(bench))
    assert (broken.state, speeds(broken)) == ("failed", [])


def test_full_runs_hold_every_kind_of_both_models() -> None:
    keys = {case.key for case in real_shapes.cases(quick=False)}
    assert len(keys) == 12
    assert {"model/pro/layer/hca/decode", "model/flash/layer/swa/prefill/128"} <= keys
    assert isinstance(real_shapes.LayerCase("pro", "csa").config, ModelConfig)
