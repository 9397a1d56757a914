"""The ledger of claims is whole and strict, its rows are produced, and a wrong figure, scale or mix is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk import plugins
from v4sdk.presets import V4_FLASH, V4_PRO, shrunk
from v4sdk.weight_formats import pack_fp4
from v4sdk.weights import Weight
from v4sdk_bench.claims import amplification, arithmetic, context_cost, kv_allocation, lossless
from v4sdk_bench.claims import context as claims_context
from v4sdk_bench.claims import figures as claim_figures
from v4sdk_bench.claims.ledger import LEDGER, BadLedger, ledger, load
from v4sdk_bench.claims.rows import answer
from v4sdk_bench.record import Record, Row
from v4sdk_bench.stage import Bench
from v4sdk_bench.suites import claims as suite


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    record = Record("2026-01-01T00:00:00+00:00", "test", {}, {}, {})
    return Bench(plugins.select("cpu"), record, tmp_path, tmp_path, quick=True)


def by_key(rows: Any) -> dict[str, Row]:
    return {row.key: row for row in rows}


def test_the_ledger_has_what_the_release_claims() -> None:
    found = ledger()
    by_status = {s: [c.id for c in found.claims if c.status == s] for s in {c.status for c in found.claims}}
    assert len(found.claims) >= 12
    assert len(by_status["measured here"]) >= 5
    assert len(by_status["reproduced by arithmetic"]) >= 5
    assert {"wave-overlap", "expert-fusion", "mhc-amplification", "fp4-fp8-lossless"} <= {
        c.id for c in found.claims
    }
    assert all(c.keys for c in found.claims)
    assert len(found.cited) >= 10


def test_the_ledger_refers_to_nothing_local() -> None:
    text = LEDGER.read_text(encoding="utf-8")
    assert "/work" not in text
    assert "file:" not in text


Change = Callable[[dict[str, Any]], object]
MISTAKES: list[tuple[str, Change, str]] = [
    ("version", lambda r: r.update(version=2), "version 2, expected 1"),
    ("missing field", lambda r: r["claims"][0].pop("method"), r"claims\[0\] lacks method"),
    ("unknown field", lambda r: r["claims"][0].update(verdict="true"), "unknown field verdict"),
    ("empty text", lambda r: r["claims"][0].update(statement=" "), "statement ' ', expected a text"),
    ("status", lambda r: r["claims"][0].update(status="true"), "status `true`, expected one of measured here"),
    ("needs of a tested claim", lambda r: r["claims"][0].update(needs="luck"), "needs 'luck'"),
    ("no rows", lambda r: r["claims"][0].update(rows=[]), "names no row"),
    ("foreign key", lambda r: r["claims"][0]["rows"][0].update(key="claims/other"), "begins with `claims/flops-1m`"),
    ("two limits", lambda r: r["claims"][0]["rows"][0].update(at_most=1), "deviation and at_most"),
    ("negative limit", lambda r: r["claims"][0]["rows"][0].update(deviation=-1), "expected 0 or more"),
    ("limit of a range", lambda r: r["claims"][0]["rows"][0].update(claimed=[1, 2]), "claims a range"),
    ("falling range", lambda r: r["claims"][0]["rows"][0].update(claimed=[2, 1]), "rising pair"),
    ("claimed in words", lambda r: r["claims"][0]["rows"][0].update(claimed="27%"), "expected a number"),
    ("claimed a truth value", lambda r: r["claims"][0]["rows"][0].update(claimed=True), "expected a number"),
    ("address", lambda r: r["claims"][0]["source"].update(url="ftp://x"), "expected https://"),
    ("id twice", lambda r: r["claims"].append(r["claims"][0]), "id `flops-1m`, expected each once"),
    ("beside", lambda r: r["claims"][0].update(beside={"ops/x": "y"}), "beside `ops/x`"),
    ("cited without figures", lambda r: r["cited"][0].update(figures={}), "expected names with numbers"),
    ("cited in words", lambda r: r["cited"][0].update(figures={"a": "fast"}), "expected names with numbers"),
    ("not an object", lambda r: r["claims"].append(7), "is a int, expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_in_the_ledger_is_named(tmp_path: Path, change: Change, words: str) -> None:
    raw = json.loads(LEDGER.read_text(encoding="utf-8"))
    change(raw)
    path = tmp_path / "claims.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(BadLedger, match=words):
        load(path)


def test_a_limit_on_an_untestable_claim_and_other_files_are_refused(tmp_path: Path) -> None:
    raw = json.loads(LEDGER.read_text(encoding="utf-8"))
    untested = next(c for c in raw["claims"] if c["status"] == "not testable here")
    untested["rows"][0]["at_least"] = 1
    path = tmp_path / "claims.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(BadLedger, match="can have no limit"):
        load(path)
    path.write_text("{")
    with pytest.raises(BadLedger, match="not JSON"):
        load(path)
    with pytest.raises(BadLedger, match="cannot read"):
        load(tmp_path / "none.json")


def test_every_claim_gets_its_rows_and_only_those_beside_it_are_added(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tiny budgets; the real sizes are the suite's own business
    monkeypatch.setattr(suite, "_SCALES", (1.0,))
    monkeypatch.setattr(suite, "_DIAGONALS", (1.0,))
    monkeypatch.setattr(suite, "_CONTROL_SCALES", (0.1, suite._CONTROL_SCALE))
    rows: list[Row] = []
    rows += [*suite.computed(bench), *suite.not_testable(bench), *suite.lossless_fp8(bench)]
    rows += [*suite.amplified(bench), *suite.balanced(bench)]
    rows += claims_context.bounded(bench, (4_096, 8_192), 0.05)
    rows += claims_context.whole_model(bench, 2_048, 0.05)
    rows += claims_context.allocated(bench, (2_048, 16_384))
    found = by_key(rows)
    assert len(found) == len(rows), "a key twice"
    for claim in ledger().claims:
        for key in claim.keys:
            assert key in found, key
            row = found[key]
            assert row.command == bench.command(key)
            if claim.status == "not testable here":
                assert row.state == "not run"
                assert row.note.startswith("needs ")
            else:
                assert row.state != "not run", row.note
                assert {"claimed", "found"} <= set(row.values)
    answered = {key for claim in ledger().claims for key in claim.keys}
    assert "claims/expert-parallel" in ledger().claim("wave-overlap").beside
    prefixes = tuple(prefix for claim in ledger().claims for prefix in claim.beside)
    assert all(key.startswith(prefixes) for key in set(found) - answered)
    for row in rows:
        bench.record.add(row)
    for claim, own, _ in ledger().answers(bench.record):
        assert [row.key for row in own] == list(claim.keys)
    # with caches this short the scratch page weighs; everything that follows from shapes is right
    wrong = {key for key, row in found.items() if row.state == "failed"}
    assert {key.split("/")[1] for key in wrong} <= {
        "kv-allocated",
        "sparse-attention",
        "mhc-amplification",
    }, wrong
    assert found["claims/sparse-attention/rows"].state == "ok"


def test_only_the_wanted_rows_are_made(bench: Bench) -> None:
    bench.only = ("claims/parameters/flash",)
    rows = [row for stage in suite.STAGES for row in stage.run(bench)]
    assert [row.key for row in rows] == ["claims/parameters/flash"]


def test_the_quick_suite_stays_within_its_minute_and_a_half() -> None:
    assert suite.STAGES[-1].name == "claims/expert-parallel"
    assert sum(stage.quick_s for stage in suite.STAGES) <= 90


def test_a_key_chosen_alone_reaches_its_stage() -> None:
    from v4sdk_bench.run import Options, stages

    every = {stage.name for stage in suite.STAGES}
    for claim in ledger().claims:
        for key in claim.keys:
            chosen = {s.name for s in stages(Options(suites=("claims",), only=(key,)))}
            named = {name for name in every if key.startswith(name)}
            assert chosen == every or (chosen == named and claim.id.startswith(next(iter(named))[7:])), key


PLANTED: list[tuple[str, dict[str, Any]]] = [
    ("claims/flops-1m/flash", {"index_n_heads": 96}),
    ("claims/kv-1m/flash", {"compress_ratios": (4, *V4_FLASH.compress_ratios[1:])}),
    ("claims/kv-gqa8/flash", {"head_dim": 1024}),
    ("claims/checkpoint-bytes/flash", {"n_routed_experts": 264}),
    ("claims/parameters/flash", {"moe_intermediate_size": 2112}),
    ("claims/active-parameters/flash", {"num_experts_per_tok": 8}),
]


@pytest.mark.parametrize(("key", "change"), PLANTED, ids=[key for key, _ in PLANTED])
def test_a_wrong_configuration_makes_its_row_fail(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, key: str, change: dict[str, Any]
) -> None:
    bench.only = (key,)
    assert by_key(suite.computed(bench))[key].state == "ok"
    monkeypatch.setitem(claim_figures.MODELS, "flash", replace(V4_FLASH, **change))
    assert by_key(suite.computed(bench))[key].state == "failed"


def test_the_count_of_v32_is_the_published_one() -> None:
    assert round(arithmetic.v32_active_parameters() / 1e9, 1) == 37.5
    assert arithmetic.v32_kv_bytes_per_token() == 61 * (656 + 132)


def test_work_of_a_token_is_what_the_formulas_say() -> None:
    n = 65_536
    work = arithmetic.v4_work(V4_PRO, n)
    kinds = [layer.kind for layer in V4_PRO.layers]
    rows = kinds.count("csa") * (1024 + 128) + kinds.count("hca") * (n // 128 + 128)
    assert work.attention == rows * 128 * 2 * 1024
    assert work.indexer == kinds.count("csa") * n // 4 * 64 * 2 * 129


def test_speeds_are_dropped_from_a_failed_answer(bench: Bench) -> None:
    claim = ledger().claim("sparse-attention")
    row = answer(bench, claim, claim.keys[1], 9.0, more={"long_median_s": 1.0, "noise": 0.1})
    assert (row.state, sorted(row.values)) == ("failed", ["claimed", "found", "noise"])


def test_a_row_without_a_limit_of_the_ledger_is_never_called_as_claimed(bench: Bench) -> None:
    claim = ledger().claim("mhc-amplification")
    alike = claim.figure("claims/mhc-amplification/alike")
    assert not alike.limits
    assert answer(bench, claim, alike.key, 3.6, limits={"found": 4.0}).state == "info"
    assert answer(bench, claim, alike.key, 4.6, limits={"found": 4.0}).state == "failed"
    timed = ledger().claim("sparse-attention").keys[1]
    assert answer(bench, ledger().claim("sparse-attention"), timed, 9.0, judge=False).state == "info"


def test_mhc_stays_bounded_where_the_control_explodes() -> None:
    gains = amplification.measure(amplification.Draws(1.0, 0.3), range(2))
    assert float(gains.constrained.max()) <= 1.6
    assert float(gains.unconstrained.median()) > 1000
    one = amplification.measure(amplification.Draws(1.0, 0.3, sublayers=1), range(2))
    assert float(one.unconstrained.max()) < 5, "the depth does it"


def test_layers_that_agree_pass_the_published_bound_but_not_the_hard_one() -> None:
    gains = amplification.measure(amplification.Draws(8.0, 4.0, alike=True), range(4))
    assert 1.6 < float(gains.constrained.max()) <= 4.004
    # with too few iterations the same draws are worse balanced
    h = amplification.Draws(0.0, 1.0).matrices(0)
    worst = [max(amplification.imbalance(amplification.constrain(h, n))) for n in (5, 20)]
    assert worst[0] > 10 * worst[1]


def test_the_gain_of_known_maps() -> None:
    turn = torch.tensor([[0.0, 2.0], [-3.0, 0.0]])
    assert float(amplification.gain(turn)) == 3.0
    stack = turn.expand(4, 1, 2, 2)
    # twice the turn is -6 times the identity
    assert float(amplification.largest_gain(stack)) == 36.0


def test_fp4_becomes_fp8_exactly_under_the_condition_and_not_beyond() -> None:
    assert lossless.largest_exact_spread() == lossless.EXACT_SPREAD
    assert lossless.exact_pairs(lossless.EXACT_SPREAD)[1] == 0
    assert lossless.exact_pairs(lossless.EXACT_SPREAD + 1)[1] > 0


def fp4(weight: torch.Tensor) -> Weight:
    data, scale = pack_fp4(weight)
    return Weight(data, scale, "fp4", (1, 32), True)


def test_a_scale_that_is_no_power_of_two_loses_values() -> None:
    weight = fp4(torch.randn(200, 160, generator=torch.Generator().manual_seed(0)))
    right, wrong = lossless.convert(weight), lossless.convert(weight, factor=1.5)
    assert (right.differing, right.values) == (0, 200 * 160)
    assert wrong.differing > 1000


def test_a_tile_of_too_wide_a_spread_loses_values() -> None:
    weight = torch.ones(128, 128)
    weight[0, :32] *= 2.0**-14
    assert (lossless.convert(fp4(weight)).differing, lossless.convert(fp4(weight)).spread) == (0, 14)
    weight[0, :32] *= 2.0**-6
    assert lossless.convert(fp4(weight)).differing == 32
    # another tile with a scale of its own is not concerned
    apart = torch.cat((torch.ones(128, 128), weight[:1, :1].expand(128, 128)), 1)
    assert lossless.convert(fp4(apart)).differing == 0


def test_attention_that_read_another_row_would_be_noticed(bench: Bench) -> None:
    assert context_cost.attention_reading(bench.backend, 4_096).differing == 0
    arguments = context_cost.attention_arguments(bench.backend, 4_096, 0)
    attend = context_cost.op_table(bench.backend)[context_cost.o.sparse_attn]
    clean = attend(**arguments)
    fewer = attend(**context_cost.poisoned(arguments, keep=100))
    assert bool((clean != fewer).any())


def test_allocated_bytes_are_the_formula_and_the_scratch(bench: Bench) -> None:
    config = shrunk(V4_FLASH, (0, 4, 128, 4))
    found = kv_allocation.allocate(config, 4_096, bench.backend)
    assert found.own_bytes == found.formula_bytes
    assert found.tensor_bytes > found.own_bytes
    assert kv_allocation.fits(config, 4_096, bench.backend)
    assert not kv_allocation.fits(V4_PRO, 1 << 40, bench.backend)


def test_a_cache_that_does_not_fit_is_not_run_with_the_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_allocation, "fits", lambda *_: False)
    rows = list(claims_context.allocated(bench))
    assert [row.state for row in rows] == ["not run", "not run"]
    assert "no room" in rows[0].note


def test_a_shorter_cache_than_the_claim_speaks_of_only_informs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = kv_allocation.fits
    monkeypatch.setattr(
        kv_allocation, "fits", lambda config, n, backend: n < 16_384 and fits(config, n, backend)
    )
    rows = list(claims_context.allocated(bench, (2_048, 16_384)))
    assert [row.state for row in rows] == ["info", "info"]
    assert "at 2,048 tokens" in rows[0].note
    assert "does not fit into memory" in rows[0].note
