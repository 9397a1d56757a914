"""Parity: the metrics against numbers done by hand, the verdicts against planted changes, and planted wrong kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from v4sdk import Session, ops, plugins
from v4sdk.backend import Backend, Kernel, kernel
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.errors import ShapeError
from v4sdk.loading import bundled_folder
from v4sdk.weights import WeightSource
from v4sdk_bench.nano import evaluate
from v4sdk_bench.parity import agreement as ag
from v4sdk_bench.parity import calibration, metrics, plants, sides
from v4sdk_bench.parity import same_tokens as rule
from v4sdk_bench.parity.cli import compare
from v4sdk_bench.record import SPEED_ENDINGS, Record
from v4sdk_bench.speed.op_cases import chosen
from v4sdk_bench.stage import Bench, BenchError
from v4sdk_bench.suites import ops as ops_suite
from v4sdk_bench.suites import parity, parity_model
from v4sdk_bench.suites.parity_rows import judged_row

NANO = ModelConfig.from_folder(bundled_folder())


class Planted(sides.References):
    """A backend with wrong kernels."""

    name = "planted"

    def __init__(self, **wrong: Callable[..., Any]) -> None:
        self.wrong = wrong

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        return [kernel(ops.OPS[name], _like(name, function)) for name, function in self.wrong.items()]


def _like(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    run.__signature__ = ops.OPS[name].signature  # type: ignore[attr-defined]
    return run


def bench_of(backend: Backend, tmp_path: Path, **options: Any) -> Bench:
    return Bench(backend, Record("", "", {}, {}, {}), tmp_path, tmp_path, quick=True, **options)


def run(bench: Bench, stage: str) -> Record:
    chosen = next(s for s in parity.STAGES if s.name == stage)
    for row in chosen.run(bench):
        if bench.wants(row.key):
            bench.record.add(row)
    return bench.record


# metrics


def test_numbers_of_two_rows_done_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[math.log(3.0), 0.0], [3.0, 4.0]])
    found = metrics.agreement(a, b)
    # a says 1/2 and 1/2, b says 3/4 and 1/4
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.positions == 2
    assert found.kl_max == pytest.approx(kl, rel=1e-6)
    assert found.kl_mean == pytest.approx(kl / 2, rel=1e-6)
    assert found.max_abs == pytest.approx(math.log(3.0), rel=1e-6)
    assert found.relative_l2 == pytest.approx(math.log(3.0) / 5.0, rel=1e-6)
    assert found.top5 == 1.0


def test_top1_and_top5_count_what_both_have() -> None:
    a = torch.arange(10.0).flip(0)[None]
    b = a.clone()
    b[0, 4], b[0, 7] = -5.0, 9.5
    found = metrics.agreement(a, b)
    assert (found.top1, found.top5) == (0.0, 0.8)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ShapeError, match="cannot be compared"):
        metrics.agreement(torch.zeros(2, 3), torch.zeros(3, 3))


def test_many_rows_are_widened_piece_by_piece_with_the_same_result() -> None:
    random = torch.Generator().manual_seed(1)
    a = torch.randn(300, 40, generator=random)
    b = a + 0.01 * torch.randn(300, 40, generator=random)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    found = metrics.agreement(a, b)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found.relative_l2 == pytest.approx(
        float((b.double() - a.double()).norm() / a.double().norm()), rel=1e-9
    )


def test_buckets_begin_where_something_new_is_computed() -> None:
    names = {b.name: (b.first, b.last) for b in metrics.buckets(NANO)}
    # 16 picks of 4 tokens: the named bucket stays, and is also given on both sides of the limit
    assert metrics.top_k_limit(NANO) == 64
    assert names["8-127"] == (8, 127)
    assert (names["8-63"], names["64-127"]) == ((8, 63), (64, 127))
    assert names["beyond"] == (132, None)
    assert set(metrics.BUCKETS) <= set(names)
    from dataclasses import replace

    flash = {
        b.name: (b.first, b.last) for b in metrics.buckets(replace(NANO, index_topk=512, sliding_window=128))
    }
    assert flash["to the top-k limit"] == (132, 2047)
    assert flash["beyond"] == (2048, None)
    assert "8-63" not in flash


def test_rows_fall_into_the_bucket_of_their_position() -> None:
    a = torch.zeros(6, 4)
    b = a.clone()
    b[3, 0] = 1.0
    found = metrics.by_bucket(a, b, NANO, torch.tensor([0, 3, 4, 129, 140, 900]))
    assert {name: part.positions for name, part in found.items()} == {
        "0-3": 2,
        "4-7": 1,
        "128-131": 1,
        "beyond": 2,
    }
    assert found["128-131"].kl_mean > 0
    assert found["beyond"].kl_mean == 0


@pytest.mark.parametrize(
    ("noise", "same_backend", "rounded", "words"),
    [
        (0.0, True, True, "same model"),
        (1e-6, False, True, "same model"),
        (1e-6, True, True, "same within precision"),
        (1e-2, False, True, "same within precision"),
        (0.17, False, True, "drifted"),
        (2.0, False, True, "different model"),
        (1e-6, False, False, "same model"),
        (5e-5, False, False, "same within precision"),
        (5e-4, False, False, "drifted"),
        (1e-2, False, False, "different model"),
        (float("nan"), False, True, "different model"),
        (float("nan"), False, False, "different model"),
    ],
)
def test_verdicts_follow_the_tiers(noise: float, same_backend: bool, rounded: bool, words: str) -> None:
    a = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    b = a + noise * torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    assert metrics.verdict(metrics.agreement(a, b), same_backend, rounded) == words


# sides and the rule of the same tokens


def test_a_side_is_a_backend_with_two_options() -> None:
    assert sides.Side.parse("cpu:reference:bf16") == sides.Side("cpu", "reference", "bf16")
    assert sides.Side.parse("cpu") == sides.Side("cpu", "fast", None)
    assert isinstance(sides.Side.parse("references:exact").backend, sides.References)
    with pytest.raises(BenchError, match=r"side `cpu::bf16`"):
        sides.Side.parse("cpu::bf16")
    with pytest.raises(BenchError, match="numerics `fsat`, expected one of exact, reference, fast"):
        sides.Side.parse("cpu:fsat")
    with pytest.raises(BenchError, match="KV format `int8`"):
        sides.Side.parse("cpu:fast:int8")


def _margins(*margins: float) -> Tensor:
    return torch.tensor([[m, 0.0, -20.0] for m in margins])


def test_another_token_is_excused_only_below_four_times_the_logit_difference() -> None:
    a = _margins(1.0, 1.0, 1.0, 1.0, 0.1)
    b = a.clone()
    b[4, 1] += 0.2
    # threshold 0.8: four of five margins exceed it, and the fifth may fall either way
    found = rule._judged((a, b), [((7,), [0, 0, 0, 0, 0], [0, 0, 0, 0, 1])])
    assert found.broken == ()
    assert found.first == rule.Difference(0, 4, 0, 1, pytest.approx(0.1))
    assert (found.share, found.compared) == (0.8, 4)
    # the same difference where the margin is 1.0 is none that the logits explain
    wrong = rule._judged((a, b), [((7,), [0, 0, 0, 0, 0], [0, 0, 1, 0, 0])])
    assert len(wrong.broken) == 1
    assert "margin 1.00e+00 exceeds 8.00e-01" in wrong.broken[0]


def test_margins_must_tell_something() -> None:
    a = _margins(0.1, 0.1, 0.1, 5.0)
    found = rule._judged((a, a + torch.tensor([0.05, 0.0, 0.0])), [((7,), [0] * 4, [0] * 4)])
    assert [b for b in found.broken if "only 25.0% of the margins" in b]


def test_the_rule_over_two_sessions(chat_folder: Path) -> None:
    side = sides.Side("cpu", "reference")
    with side.load(chat_folder) as a, side.load(chat_folder) as b:
        found = rule.same_tokens(a, b, [[5, 9, 3], [8, 8]], tokens=6)
    assert (found.logit_difference, found.first, found.broken) == (0.0, None, ())
    assert found.prompts == 2
    assert found.compared == found.tokens


def test_prompts_are_read_as_ids_or_refused_by_line(chat_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    with sides.Side("cpu").load(chat_folder) as session:
        path.write_text("[1, 2, 3]\nWhat is 3 + 4?\n", encoding="utf-8")
        text = ag.read_prompts(path, session)
        assert text.prompts[0] == (1, 2, 3)
        assert len(text.prompts[1]) > 3
        path.write_text("[1, 99999]\n", encoding="utf-8")
        with pytest.raises(BenchError, match="line 1 of .* ids from 0 to 1279"):
            ag.read_prompts(path, session)
        path.write_text("\n", encoding="utf-8")
        with pytest.raises(BenchError, match="no text"):
            ag.read_prompts(path, session)


def test_scores_equal_the_session_s_logits(chat_folder: Path) -> None:
    ids = [5, 9, 3, 7, 200, 41] * 8
    with sides.Side("cpu", "exact").load(chat_folder) as session:
        text = ag.Text.of([ids, ids[:9]], "test")
        found = ag.score(session.loaded, text, chunk=1024)
        assert torch.equal(found.logits, torch.cat([session.logits(ids), session.logits(ids[:9])]))
        assert {name: len(lists) for name, lists in found.choices.items()}["route_ids_0"] == 57


def test_layers_are_compared_over_1728_tokens() -> None:
    """Six texts, none of which is cut short: the limit on equal sets was chosen for so many tokens."""
    with Session.load() as session:
        texts = parity_model._layer_texts(session, 0)
    assert [len(text) for text in texts] == [288] * 6
    assert sum(map(len, texts)) == 1728


# planted wrong kernels, one or two of each family of ops


def _scaled(name: str, factor: float) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = ops.OPS[name](*args, **kwargs)
        return (result * factor).to(result.dtype)

    return wrong


def _last_row(name: str) -> Callable[..., Any]:
    """Right everywhere but in the last row."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = ops.OPS[name](*args, **kwargs).clone()
        result[-1:] = 0
        return result

    return wrong


def _no_sink(q: Tensor, kv: Tensor, window: Tensor, entries: Any, picks: Any, batch: Any, sink: Tensor, *rest: Any,
             **named: Any) -> Tensor:  # fmt: skip
    return ops.sparse_attn(q, kv, window, entries, picks, batch, torch.full_like(sink, -1e30), *rest, **named)


def _untransposed(*args: Any, **kwargs: Any) -> Any:
    u, post, comb = ops.hc_pre(*args, **kwargs)
    return u, post, comb.transpose(1, 2)


def _ungated(u: Tensor, wkv: Any, wgate: Any, ape: Tensor, *rest: Any, **named: Any) -> Any:
    return ops.compress(u, wkv, wgate, torch.zeros_like(ape), *rest, **named)


def _unnormalised(*args: Any, **kwargs: Any) -> Any:
    ids, weights = ops.route(*args, **kwargs)
    return ids, weights * 1.01


def _second_best(*args: Any, **kwargs: Any) -> Any:
    token, *rest = ops.sample(*args, **kwargs)
    return (token + 1) % 7, *rest


FAULTS: dict[str, Callable[..., Any]] = {
    "rms_norm": _scaled("rms_norm", 1.03),
    "linear": _last_row("linear"),
    "hc_pre": _untransposed,
    "hc_post": _last_row("hc_post"),
    "embed": _scaled("embed", 0.98),
    "logits": _last_row("logits"),
    "sparse_attn": _no_sink,
    "grouped_out": _scaled("grouped_out", 1.03),
    "compress": _ungated,
    "index_topk": lambda *a, **k: torch.full_like(ops.index_topk(*a, **k), -1),
    "route": _unnormalised,
    "routed_experts": _scaled("routed_experts", 1.05),
    "sample": _second_best,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_turns_its_rows_red_and_leaves_no_speed(name: str, tmp_path: Path) -> None:
    bench = bench_of(Planted(**{name: FAULTS[name]}), tmp_path, only=(f"parity/op/{name}/",))
    record = run(bench, "parity/op")
    failed = [row for row in record.under(f"parity/op/{name}/") if row.state == "failed"]
    assert failed
    assert bench.wrong(f"parity/op/{name}/") in failed
    assert "--only parity/op/" in failed[0].command
    case = next(c for c in chosen(quick=True) if c.op.name == name)
    nothing: Any = SimpleNamespace(left_out={}, wrong={}, timed={}, failures={}, seconds={})
    (row,) = ops_suite._rows(bench, nothing, nothing, case, [])
    assert (row.state, [v for v in row.values if v.endswith(SPEED_ENDINGS)]) == ("failed", [])
    assert "parity is red" in row.note


def test_right_kernels_leave_green_rows_with_their_numbers(tmp_path: Path) -> None:
    bench = bench_of(Planted(rms_norm=ops.rms_norm), tmp_path, only=("parity/op/rms_norm/",))
    rows = run(bench, "parity/op").rows
    assert rows
    assert all(row.state == "ok" for row in rows)
    assert {"max_abs", "relative_l2", "cosine", "worst"} <= set(rows[0].values)
    assert bench.wrong("parity/op/rms_norm/") is None


def test_a_planted_fault_shows_by_layer_and_in_the_whole_model(tmp_path: Path, chat_folder: Path) -> None:
    bench = bench_of(Planted(sparse_attn=_no_sink), tmp_path, model=chat_folder)
    layers = run(bench, "parity/layer").under("parity/layer/")
    attention = {row.state for row in layers if row.key.endswith("/attn_out")}
    assert attention == {"failed"}
    bench.only = ("parity/model/backend-vs-references/exact",)
    whole = run(bench, "parity/model").row("parity/model/backend-vs-references/exact/all")
    assert whole is not None
    assert (whole.state, whole.values["verdict"]) == ("failed", "different model")


def test_a_backend_that_runs_references_is_the_same_model(tmp_path: Path, chat_folder: Path) -> None:
    bench = bench_of(Planted(), tmp_path, model=chat_folder)
    assert {row.state for row in run(bench, "parity/layer").rows} == {"ok"}
    bench.only = ("parity/model/backend-vs-references/fast",)
    rows = {row.key: row for row in run(bench, "parity/model").under("parity/model/")}
    assert {row.state for row in rows.values()} == {"ok"}
    assert rows["parity/model/backend-vs-references/fast/all"].values["max_abs"] == 0.0


def test_another_order_of_summation_stays_within_every_limit(tmp_path: Path) -> None:
    other = Planted(linear=plants.reordered_linear)
    bench = bench_of(other, tmp_path, only=("parity/model/backend-vs-references/fast",))
    rows = {row.key: row for row in run(bench, "parity/model").rows}
    assert {row.state for row in rows.values()} == {"ok"}, rows
    whole = rows["parity/model/backend-vs-references/fast/all"]
    assert 0 < whole.values["kl_mean_everywhere"] < whole.limits["kl_mean_everywhere"]
    assert {row.state for row in run(bench_of(other, tmp_path), "parity/layer").rows} == {"ok"}


# calibration


@pytest.fixture(scope="module")
def subject() -> Any:
    with (
        Session.load(None, backend="cpu", numerics="exact") as session,
        Checkpoint(bundled_folder()) as checkpoint,
    ):
        source = WeightSource(checkpoint, (128, 128))
        text = ag.default_text(session, 1)
        yield calibration.Calibration(session, source, text, layer_tokens=160)


def _plant(name: str) -> plants.Plant:
    return next(p for p in (*plants.ROUNDINGS, *plants.MISTAKES) if p.name == name)


def test_roundings_and_mistakes_fall_on_their_sides_of_the_verdict(subject: Any) -> None:
    found = {
        n: subject.measure(_plant(n)) for n in ("same", "order", "fp8-weights", "no-sink", "window-short")
    }
    assert found["same"].verdict == "same model"
    assert found["order"].verdict == "same within precision"
    assert found["fp8-weights"].verdict == "same within precision"
    assert found["no-sink"].verdict == found["window-short"].verdict == "different model"
    # why two questions are asked: on what the model writes, the mean KL of a missing sink is less than that of a rounding
    assert found["no-sink"].written.kl_mean < found["fp8-weights"].written.kl_mean
    assert found["no-sink"].by_mean_kl == "same within precision"
    apart = dict(calibration.separations(list(found.values())))
    assert apart["exact_relative_l2"].gap > 1e3
    assert apart["written_mean_kl"].mixed > 0
    assert apart["same_roundings_mean_kl"].mixed == 0
    assert found["no-sink"].seen_by_layers
    assert found["window-short"].seen_by_layers
    assert not found["order"].seen_by_layers


def test_separation_counts_mistakes_that_look_like_roundings() -> None:
    found = calibration.separation([(False, 1.0), (False, 3.0), (True, 2.0), (True, 9.0)])
    assert found.mistakes == 2
    assert (found.largest_rounding, found.smallest_mistake, found.mixed) == (3.0, 2.0, 1)


# tasks and goldens


def test_the_scores_a_run_is_held_to_are_the_recorded_ones() -> None:
    kept = Path(__file__).parent.parent / "bench" / "results" / "v4-nano.json"
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert record["count"] == evaluate.ASKED
    assert {task: round(share * evaluate.ASKED) for task, share in record["scores"].items()} == evaluate.RIGHT


@pytest.mark.parametrize(("task", "count"), [("tool_call", 50), ("copy", 250), ("add_sub", 12)])
def test_the_allowance_is_three_sigma_of_a_binomial(task: str, count: int) -> None:
    least, p = evaluate.least_right(task, count), (evaluate.RIGHT[task] + 1) / (evaluate.ASKED + 2)

    def at_most(k: int) -> float:
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    assert at_most(least - 1) <= 0.00135 < at_most(least)
    # a perfect score may miss one of twelve, not two
    assert evaluate.least_right("add_sub", 12) == 11


def test_sampled_questions_are_spread_over_those_of_the_score() -> None:
    few, every = evaluate.sampled("copy", 5), evaluate.sampled("copy", evaluate.ASKED)
    assert [every.index(d) for d in few] == [0, 50, 100, 150, 200]


def test_questions_that_would_be_refused_are_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(evaluate, "accuracy", lambda count, tasks, backend: asked.extend(tasks) or ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = run(bench_of(plugins.select("cpu"), tmp_path), "parity/task")
    assert asked == [task for task in evaluate.RIGHT if task != "json_answer"]
    (row,) = found.rows
    assert (row.key, row.state) == ("parity/task/json_answer", "not run")
    assert "pip install 'v4sdk[grammar]'" in row.note


def test_what_the_references_computed_is_no_row_of_the_device(tmp_path: Path) -> None:
    class Device(sides.References):
        evidence = "device"

    bench = bench_of(Device(), tmp_path)
    assert judged_row(bench, "parity/x", "", {}, {}).evidence == "device"
    assert judged_row(bench, "parity/x", "", {}, {}, evidence="reference").evidence == "reference"


def test_goldens_that_are_not_there_are_rows_that_were_not_run(tmp_path: Path) -> None:
    (row,) = run(bench_of(Planted(), tmp_path), "parity/golden").rows
    assert (row.state, row.evidence) == ("not run", "none")
    assert "--golden" in row.command


def test_goldens_become_rows(tmp_path: Path, golden: Path) -> None:
    bench = bench_of(Planted(), tmp_path, golden=golden, only=("parity/golden/quant/",))
    rows = run(bench, "parity/golden").rows
    assert len(rows) > 10
    assert {row.state for row in rows} == {"ok"}


@pytest.mark.parametrize("stage", [s.name for s in parity.STAGES])
def test_a_stage_does_nothing_for_rows_it_does_not_have(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Session, "load", lambda *args, **options: pytest.fail("a model was loaded for nothing")
    )
    bench = bench_of(
        plugins.select("cpu"), tmp_path, only=("parity/no-such-row",), golden=Path("tests/golden")
    )
    assert not run(bench, stage).rows


def test_a_stage_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    bench = bench_of(Planted(), tmp_path, deadline=0.0)
    assert {row.state for row in run(bench, "parity/layer").rows} == {"not run"}


# commands


def _compare(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(compare, args, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value, done.stdout


def test_compare_prints_a_table_or_json(chat_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("[5, 9, 3, 7, 200, 41, 5, 9, 3, 7]\n[1, 2, 3]\n", encoding="utf-8")
    args = [
        "--a",
        "cpu:reference",
        "--b",
        "cpu:fast",
        "--model",
        str(chat_folder),
        "--prompts",
        str(prompts),
        "--tokens",
        "3",
    ]
    status, told = _compare(*args)
    assert "verdict: " in told
    assert "0-3" in told
    again, text = _compare(*args, "--json")
    report = json.loads(text)
    assert status == again == int(report["verdict"] == "different model")
    assert report["a"] == "cpu:reference:native"
    assert report["positions"]["4-7"]["positions"] == 4
    assert report["equations"] is None
    assert report["tokens"]["is_rule"] is False


def test_compare_of_tokens_alone_applies_the_rule(chat_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[1, 2, 3]\n", encoding="utf-8")
    args = ("--model", str(chat_folder), "--prompts", str(prompts), "--tokens", "2", "--tokens-only")
    status, told = _compare(*args, "--a", "references:reference", "--b", "references:reference")
    assert status == 0
    assert "the same tokens: yes" in told
    assert "verdict" not in told
    _, text = _compare(*args, "--json")
    assert json.loads(text)["tokens"]["is_rule"] is False


def test_compare_asks_for_the_equations_of_two_backends_in_exact_numerics(
    chat_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("[5, 9, 3, 7, 200]\n", encoding="utf-8")
    _, text = _compare("--model", str(chat_folder), "--prompts", str(prompts), "--tokens", "2", "--json")
    report = json.loads(text)
    assert report["equations"]["verdict"] == "same model"
