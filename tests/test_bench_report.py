"""Reports of records: what is compared, what is refused, what a reader sees, and what a hostile record cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from v4sdk.errors import V4Error
from v4sdk_bench.record import BadRecord, Record, Row, not_run
from v4sdk_bench.report import charts, html, markdown, numbers, terminal
from v4sdk_bench.report.build import page
from v4sdk_bench.report.cli import OutputError, report
from v4sdk_bench.report.compare import Incomparable, Joined, compare
from v4sdk_bench.report.page import Page, Table, unique
from v4sdk_bench.report.sources import Source, load

SUITES = ("parity", "ops", "model", "claims")
OPS = ("embed", "rms_norm", "linear", "hc_pre", "sparse_attn", "index_topk", "routed_experts", "logits")
CONTEXTS = (512, 1024, 2048, 4096, 8192)
BUCKETS = ("0-3", "4-7", "8-127", "128-131", "to-the-top-k-limit", "beyond")
TIMED = "ops/linear/flash-decode-fast"
PRINT = "3f9ac2d1b7e84a55"
SPEEDS = ("_s", "_per_s", "_of_ceiling", "_ratio")


def command(key: str, suite: str = "parity") -> str:
    """As a suite writes it."""
    return f"v4sdk bench run --suite {suite} --only {key} --backend cpu --quick"


def row(
    key: str, what: str, values: dict[str, Any] | None = None, limits: dict[str, float] | None = None, note: str = "",
    evidence: Any = "reference", **setting: Any,
) -> Row:  # fmt: skip
    """A row that keeps its limits, or has none."""
    told = command(key, key.partition("/")[0])
    return Row(
        key, what, "ok" if limits else "info", evidence, values or {}, limits or {}, setting, note, told, 0
    )


def sample(
    speed: float = 1.0, backend: str = "cpu", processor: str = "Processor 9", threads: int = 2, fingerprint: str = PRINT,
    fails: tuple[str, ...] = (), noise: float = 0.03, quick: bool = True, rounds: int = 40, **rest: Any,
) -> Record:  # fmt: skip
    """A record as a run of all suites leaves it; rows whose key begins with one of `fails` are wrong."""
    rates = (("copy", 1.6e10, "bytes_per_s"), ("read", 2.7e10, "bytes_per_s"), ("gemm/float32", 3.3e11, "flops_per_s"),
             ("gemm/bfloat16", 2.1e12, "flops_per_s"))  # fmt: skip
    record = Record(
        "2026-11-22T22:10:04+00:00",
        f"v4sdk bench run --backend {backend} --quick",
        {"suites": ["parity", "ops", "model", "claims"], "backend": backend, "quick": quick, "seed": 0, "peers": {}},
        {"processor": processor, "cores": 2, "threads": threads, "memory_bytes": 25_276_502_016, "load": 0.4},
        {"python": "3.11.7", "v4sdk": "0.1.0", "torch": "2.13.0+cpu", "v4sdk_sources": "a1b2c3d4e5f6"},
        finished="2026-11-22T22:19:40+00:00",
        status="complete",
        models={"v4-nano": {"fingerprint": fingerprint, "layers": 8, "bytes": 2_900_000}},
        ceilings=[
            {"name": n, "value": v * k, "unit": u, "low": v * k * 0.95, "high": v * k, "threads": threads,
             "buffer_bytes": 3 << 29,
             "date": "2026-11-22T22:12:00+00:00", "how": "stream"}
            for n, v, u in rates for k in (1.0, 0.98)
        ],
        stages={f"{s}/all": {"state": "done", "seconds": 61.2, "budget_s": 90.0, "note": ""} for s in SUITES},
    )  # fmt: skip
    made = (
        *parity_rows(backend),
        *op_rows(speed, noise, rounds),
        *model_rows(speed, fingerprint),
        *peer_rows(speed),
        *claim_rows(),
    )
    for one in made:
        record.add(spoilt(one) if fails and one.key.startswith(fails) else one)
    for name, value in rest.items():
        setattr(record, name, value)
    return record


def spoilt(one: Row) -> Row:
    """The same row with a wrong result: over its limit, and without speeds."""
    values = {k: v for k, v in one.values.items() if not k.endswith(SPEEDS)}
    values |= {k: v * 40 for k, v in one.limits.items() if not k.startswith(">=")}
    return replace(one, state="failed", values=values, note="planted fault")


def parity_rows(backend: str) -> Iterator[Row]:
    """Ops, layers, whole model by position, invariances, tasks, witness, calibration."""
    for i, op in enumerate(OPS):
        for j, case in enumerate(
            ("tiny-decode-exact", "tiny-prefill-fast", "odd-prefill-exact", "float-prefill-exact")
        ):
            found = {
                "worst": 0.02 + 0.11 * i * (j + 1) % 0.9,
                "max_abs": 3e-6 * (i + 1),
                "relative_l2": 2e-7 * (j + 1),
                "how": "reference",
            }
            yield row(
                f"parity/op/{op}/{case}",
                f"{op}, case {case}, against its reference",
                found,
                {"worst": 1.0},
                case=case,
            )
    for layer in range(6):
        for numerics in ("exact", "reference", "fast"):
            found = {"max_abs": 4e-6 * (layer + 1), "relative_l2": 1e-6 * (layer + 1), "same_choices": 1.0}
            key = f"parity/layer/csa-learned/{layer}/{numerics}/attention"
            yield row(
                key,
                f"layer {layer}, attention, {numerics}",
                found,
                {"relative_l2": 1e-5},
                model="v4-nano",
                numerics=numerics,
            )
    for i, part in enumerate(("all", *BUCKETS)):
        found = {"positions": 400 + i, "max_abs": 0.031, "relative_l2": 2.1e-3, "cosine_min": 0.99991,
                 "kl_mean": 7.7e-6 * (i + 1),
                 "kl_p99": 4e-5, "kl_max": 9e-4, "top1": 0.998, "top5": 0.991}  # fmt: skip
        word = {"verdict": "same within precision"} if part == "all" else {}
        sides = {
            "model": "v4-nano",
            "a": f"{backend}:reference:native",
            "b": f"{backend}:fast:native",
            "text": "320 tokens",
        }
        what = f"{backend}:fast:native against {backend}:reference:native, positions {part}"
        yield row(f"parity/model/fast-vs-reference/{part}", what, found | word, {"kl_mean": 2e-3}, **sides)
    for name in ("prefill = decode", "chunked = whole", "batched = alone", "resumed = fresh", "run = rerun"):
        key = f"parity/invariance/exact/{name.replace(' = ', '-')}"
        yield row(
            key,
            name,
            {"relative_l2": 8.2e-7, "verdict": "same model"},
            {"relative_l2": 1e-5},
            model="v4-nano",
        )
    for task, share in (("arithmetic", 1.0), ("look-up", 1.0), ("tool-call", 0.948), ("copy", 0.944)):
        found = {"accuracy": share, "right": round(share * 250), "asked": 250}
        yield row(
            f"parity/task/{task}",
            f"{task}: exact match of 250 questions",
            found,
            {">=right": 220},
            model="v4-nano",
        )
    yield row(
        "parity/onnx/prefill",
        "prefill exported and run elsewhere",
        {"relative_l2": 4e-7},
        {"relative_l2": 1e-5},
    )
    for name, word in (("kv-bf16", "same within precision"), ("no-rope", "different model")):
        found = {"right_verdict": 1, "verdict": word, "written_mean_kl": 2e-4}
        yield row(f"parity/calibration/{name}", f"planted: {name}", found, {">=right_verdict": 1}, plant=name)
    yield not_run(
        "parity/official",
        "official greedy continuations",
        "no released weights at hand",
        command=command("parity/official"),
    )


def op_rows(speed: float, noise: float, rounds: int) -> Iterator[Row]:
    """Timed ops, the noise of the machine, a kernel against its reference."""
    for i, op in enumerate(OPS):
        for case, size in (("tiny-decode-fast", 1), ("flash-decode-fast", 1000)):
            took = 1.4e-5 * size**0.9 * (i + 1) / speed
            flops = 0 if op == "embed" else int(3e5 * size * (i + 1) ** 2)
            found = {"error": 0.1, "moved_bytes": 60_000 * size * (i + 1), "flops": flops, "in_cache": size == 1,
                     "rounds": rounds, "median_s": took, "low_s": took * 0.97, "high_s": took * 1.06}  # fmt: skip
            if size > 1:
                found |= {"floor_s": took * 0.31, "bound": "bytes", "share_of_ceiling": 0.31}
            yield row(
                f"ops/{op}/{case}", f"{op}, {case}", found, {"error": 1.0}, op=op, case=case, dtype="bfloat16"
            )
    pair = {
        "a_median_s": 0.010,
        "b_median_s": 0.0099,
        "speed_ratio": 1.01,
        "low_ratio": 0.97,
        "high_ratio": 1.04,
        "noise": noise,
    }
    yield row(
        "ops/noise",
        "the same call against itself",
        pair | {"verdict": "no difference (within the noise of 3%)"},
    )
    pair |= {"b_median_s": 0.007, "speed_ratio": 1.42, "low_ratio": 1.38, "high_ratio": 1.47, "noise": 0.03}
    told = pair | {"verdict": "b is 1.42 times faster (1.38 to 1.47)"}
    yield row(
        "ops/linear/flash-decode-fast/against-reference",
        "linear: the reference (a) and the kernel (b) in turns",
        told,
    )


def model_rows(speed: float, fingerprint: str) -> Iterator[Row]:
    """Frontiers read and made up, batches, a layer of released size."""
    about = {"model": "v4-nano", "fingerprint": fingerprint, "numerics": "fast", "kv_format": "native"}
    for n in (*CONTEXTS, 131_072, 1_048_576):
        made_up = n > 8192
        tpot = (0.011 + n * 4e-8) / speed
        found = {"tpot_s": tpot, "tpot_low_s": tpot * 0.96, "tpot_high_s": tpot * 1.07, "kv_bytes": 30_000 + 58 * n,
                 "kv_formula_bytes": 29_000 + 58 * n, "peak_bytes": 310_000_000 + 900 * n}  # fmt: skip
        if not made_up:
            ttft = 0.0011 * n**0.95 / speed
            found |= {"ttft_s": ttft, "prefill_tokens_per_s": 880 * speed}
        key = f"model/v4-nano/frontier/{n}{'/synthetic' if made_up else ''}"
        setting = about | {"tokens": n, "state": "synthetic KV" if made_up else "read"}
        yield row(key, f"v4-nano: {n:,} tokens of context", found, **setting)
    yield not_run(
        "model/v4-nano/first-token",
        "to the first token of a new process",
        "takes a minute; a full run measures it",
    )
    yield row(
        "model/v4-nano/batch/4",
        "4 sequences at once",
        {"tpot_s": 0.021 / speed, "all_tokens_per_s": 190 * speed},
        **about,
    )
    found = {"median_s": 0.12 / speed, "low_s": 0.11 / speed, "high_s": 0.14 / speed}
    yield row(
        "model/flash/layer/csa/decode", "V4-Flash: one CSA layer, a decoded token", found, shape="flash"
    )


def peer_rows(speed: float) -> Iterator[Row]:
    """One engine that computes the same, one that does not, one that is not installed."""
    at = {"model": "v4-mini", "fingerprint": "77aa", "batch": 1}
    for engine, kl, word in (
        ("transformers", 4.4e-4, "same within precision"),
        ("other", 0.4, "different model"),
    ):
        key = f"model/peers/v4-mini/{engine}"
        one = row(
            f"{key}/parity/prefill",
            f"{engine}: logits of prefill against v4sdk exact",
            {"kl_mean": kl, "top1": 0.98, "verdict": word},
            {"kl_mean": 2e-3},
            **at,
        )
        yield (
            one
            if kl < 2e-3
            else replace(one, state="failed", note="not comparable: different model, mean KL 0.4")
        )
        found = {
            "tokens_per_s": 245.0 * speed,
            "low_tokens_per_s": 240.0 * speed,
            "high_tokens_per_s": 251.0 * speed,
            "version": "5.23.0",
        }
        yield row(f"{key}/prefill/512", f"{engine} on v4-mini: prefill of 512 tokens", found, **at)
    pair = {
        "v4sdk_to_transformers_ratio": 1.31,
        "low_ratio": 1.25,
        "high_ratio": 1.36,
        "noise": 0.02,
        "verdict": "transformers is slower",
    }
    yield row(
        "model/peers/v4-mini/ratio/transformers/prefill/512",
        "speed of v4sdk over transformers, prefill",
        pair,
        **at,
    )
    yield not_run(
        "model/peers/v4-mini/llama_cpp", "llama_cpp on v4-mini", "not given: --peer llama_cpp=PYTHON"
    )


def claim_rows() -> Iterator[Row]:
    """One claim that holds, one that needs hardware, and the exchange between ranks under its own name."""
    yield row(
        "claims/flops-1m/pro",
        "FLOPs of a decoded token, V4-Pro over V3.2 (share)",
        {"claimed": 0.27, "found": 0.268, "deviation": 0.002},
        {"deviation": 0.005},
    )
    yield not_run("claims/wave-overlap/general", "wave overlap", "needs two accelerators")
    yield row(
        "claims/expert-parallel/overlap-2",
        "wave overlap vs our sequential exchange (gloo, 2 processes)",
        {"speed_ratio": 1.02, "verdict": "no difference"},
    )


# ---------------------------------------------------------------- helpers


class Reader(HTMLParser):
    """Collects what a page refers to, the text a reader sees, and whether tags close."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.addresses: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            (tag, value or "")
            for name, value in attrs
            if name in ("src", "href", "action", "data", "xlink:href")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.text if inside != "style" else []).append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def sources(*records: Record) -> list[Source]:
    return [Source(chr(65 + i), f"{chr(97 + i)}.json", record) for i, record in enumerate(records)]


def made(*records: Record) -> tuple[Page, list[Incomparable]]:
    return page(sources(*records), command="v4sdk bench report a.json")


def shown(*records: Record) -> Reader:
    reader = Reader(html.render(made(*records)[0]))
    assert not reader.open
    return reader


def tables(of: Page) -> dict[str, Table]:
    return {
        block.caption: block
        for section in of.sections
        for block in section.blocks
        if isinstance(block, Table)
    }


def cells_of(table: Table, subject: str) -> list[str]:
    """The row whose first cell mentions `subject`."""
    return next([cell.plain for cell in line] for line in table.rows if subject in line[0].plain)


def saved(folder: Path, name: str, record: Record) -> Path:
    record.save(folder / name)
    return folder / name


def run(*args: object) -> tuple[int, str]:
    """Exit code and stdout of the command; errors come through."""
    result = CliRunner().invoke(report, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return int(result.return_value), result.stdout


# ---------------------------------------------------------------- one record


def test_the_answer_comes_first() -> None:
    found, _ = made(sample())
    assert found.answer.startswith("Parity is green: all ")
    assert "same within precision" in found.answer
    facts = " ".join(fact.text for fact in found.verdicts[0].facts)
    assert "11.0 ms after 512 tokens" in facts
    assert "Nothing here ran on an accelerator" in facts
    assert "Not run: 4 rows" in facts


def test_every_question_of_a_buyer_has_its_section() -> None:
    ids = [section.id for section in made(sample())[0].sections]
    assert ids[:7] == ["parity", "model", "ops", "ratios", "peers", "claims", "expert-parallel"]
    assert {"not-run", "identity", "rest", "cited"} <= set(ids)


def test_no_row_of_a_record_is_left_out() -> None:
    record = sample()
    record.add(
        row("device/odd", "something nobody foresaw", {"strange": [1, {"deep": True}], "nothing": None})
    )
    record.add(row("ops/odd", "a row of another shape", {"text": "words"}))
    text = shown(record).words
    for one in record.rows:
        short = one.key.partition("/")[2].partition("/")[2]
        names = (
            one.key,
            one.what,
            short,
            f"{one.setting.get('tokens', -1):,}",
            short.rpartition("/")[0] + " ",
        )
        assert any(name in text for name in names), one.key


def test_every_table_and_figure_of_results_says_how_to_reproduce_it() -> None:
    found, _ = made(sample())
    for section in found.sections:
        if section.id in ("parity", "model", "ops", "ratios", "peers", "claims", "expert-parallel"):
            for block in section.blocks:
                if isinstance(block, Table) and block.caption != "How each claim is answered":
                    assert block.commands, block.caption
    words = shown(sample()).words
    assert "v4sdk bench run --suite parity --only parity/op --backend cpu --quick" in words
    assert "v4sdk bench report a.json" in words


def test_commands_that_differ_in_one_prefix_are_led_by_one_for_all() -> None:
    both = [command("parity/op/linear/a"), command("parity/op/linear/b"), command("parity/op/embed/a")]
    assert unique(both) == (command("parity/op"), *both)
    assert unique(["x --only ops/a", "y --only ops/b"]) == ("x --only ops/a", "y --only ops/b")
    assert unique(["", "same", "same"]) == ("same",)


@pytest.mark.parametrize(
    "broken", ["parity/op/linear/", "parity/op/embed/tiny", "parity/layer/csa-learned/3/fast"]
)
def test_a_broken_limit_is_red_first_and_in_words(broken: str) -> None:
    found, _ = made(sample(fails=(broken,)))
    assert found.verdicts[0].tone == "bad"
    assert found.answer.startswith("Parity is red: ")
    caption = "Ops against their reference" if "/op/" in broken else "Layers"
    first = tables(found)[caption].rows[0]
    assert (first[0].text in broken) or first[0].text.startswith("3, ")
    assert "bad" in [cell.tone for cell in first]
    assert any("✗ " in cell.plain for cell in first)
    assert "planted fault" in shown(sample(fails=(broken,))).words


def test_a_wrong_op_has_no_speed_even_if_its_row_gives_one() -> None:
    record = sample(fails=("parity/op/linear/",))
    told = tables(made(record)[0])["Ops"]
    line = cells_of(told, "linear")
    assert any("no speed (parity is red: parity/op/linear/" in cell for cell in line)
    assert not any(re.search(r"\d (µs|ms|s)\b", cell) for cell in line)
    assert any(" ms" in cell for cell in cells_of(told, "logits (flash"))
    svg = next(s for s in made(record)[0].sections if s.id == "ops").blocks[0]
    assert "linear" not in str(svg)


def test_a_wrong_model_has_no_speed_and_no_curve() -> None:
    record = sample(fails=("parity/model/fast-vs-reference/8-127",))
    found, _ = made(record)
    model = next(section for section in found.sections if section.id == "model")
    assert all(isinstance(block, Table) or "Time" not in str(block) for block in model.blocks)
    for line in tables(found)["By context, v4-nano (3f9ac2d1)"].rows:
        assert any("no speed" in cell.text for cell in line)
        assert not any(re.search(r"\d (ms|s|tok/s)\b", cell.plain) for cell in line)
    assert "Time per output token" not in " ".join(fact.text for fact in found.verdicts[0].facts)


def test_a_failed_frontier_leaves_a_gap() -> None:
    found, _ = made(sample(fails=("model/v4-nano/frontier/2048",)))
    line = cells_of(tables(found)["By context, v4-nano (3f9ac2d1)"], "2,048")
    assert "✗ no speed (its result is wrong)" in line
    assert found.verdicts[0].tone == "good", "parity itself is green"
    assert any("frontier/2048" in fact.text for fact in found.verdicts[0].facts)


def test_an_engine_of_another_model_is_listed_without_speed() -> None:
    found, _ = made(sample())
    comparable = str(tables(found)["Speed beside other engines"].rows)
    refused = tables(found)["Not comparable or not run, so without speed"]
    assert "transformers" in comparable
    assert "other" not in comparable
    assert "245" in comparable
    text = " ".join(cell.plain for line in refused.rows for cell in line)
    assert "mean KL 0.4" in text
    assert "tok/s" not in text
    assert "not given: --peer" in text
    assert "other" in " ".join(fact.text for fact in found.verdicts[0].facts)
    assert found.verdicts[0].tone == "good", "another engine's model is not our failure"


def test_claims_stand_beside_what_was_found() -> None:
    found, _ = made(sample())
    brief, full = (tables(found)[name] for name in ("Claims reproduced by arithmetic",
                                                    "Claims in full: words, source, method, keys"))  # fmt: skip
    assert not brief.folded, "the answer to a claim is not hidden"
    assert cells_of(brief, "FLOPs of a decoded token, V4-Pro")[1:] == ["27.0%", "✓ 26.8%"]
    assert "not in this record" in cells_of(brief, "KV bytes per token, V4-Pro over V3.2")
    line = cells_of(full, "FLOPs of a decoded token, V4-Pro")
    assert "1M tokens, V4-Pro needs 27%" in line[1]
    assert line[-2:] == ["✓ 26.8% (as claimed)", "claims/flops-1m/pro, reproduced by arithmetic"]
    assert (
        tables(found)["Expert parallelism"]
        .rows[0][0]
        .text.startswith("wave overlap vs our sequential exchange")
    )


def test_a_report_stands_without_a_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    from v4sdk_bench.report import outside

    def none() -> None:
        raise V4Error("cannot read claims.json: no such file")

    monkeypatch.setattr(outside, "ledger", none)
    words = shown(sample()).words
    assert "The ledger of claims could not be read: cannot read claims.json" in words
    assert "FLOPs of a decoded token" in words


def test_speeds_of_others_stand_apart() -> None:
    found, _ = made(sample())
    cited = found.sections[-1]
    assert (cited.id, cited.foreign) == ("cited", True)
    assert "not measured by us" in cited.title
    assert not any(
        "published" in table.columns for name, table in tables(found).items() if "Published" not in name
    )


def test_what_was_not_run_is_complete() -> None:
    record = sample()
    record.stages["model/all"] = {
        "state": "broken",
        "seconds": 3.0,
        "budget_s": 90.0,
        "note": "the device vanished",
    }
    table = tables(made(record)[0])["What was not run, and why"]
    listed = " ".join(cell.plain for line in table.rows for cell in line)
    for one in record.rows:
        assert one.state != "not run" or (one.key in listed and one.note in listed)
    assert "suite device" in listed
    assert "broken: the device vanished" in listed


def test_an_interrupted_record_says_what_is_missing() -> None:
    record = sample(status="interrupted", finished=None)
    record.rows = [one for one in record.rows if one.suite == "parity"]
    record.stages = {"parity/all": {"state": "interrupted", "seconds": 3.0, "budget_s": 90.0, "note": ""}}
    found, _ = made(record)
    assert found.verdicts[0].tone == "warn"
    assert "as far as it was measured" in found.answer
    told = next(fact.text for fact in found.verdicts[0].facts if "was interrupted" in fact.text)
    assert "Missing: suite ops, suite model, suite claims, stage parity/all" in told
    assert record.command in told


def test_an_empty_record_and_one_where_all_failed() -> None:
    empty = sample(rows=[], models={}, ceilings=[], stages={})
    assert made(empty)[0].answer == "This record is empty: nothing was measured."
    assert "nothing was measured" in shown(empty).words
    bad = sample()
    bad.rows = [spoilt(one) if one.state != "not run" else one for one in bad.rows]
    found, _ = made(bad)
    assert found.verdicts[0].tone == "bad"
    words = shown(bad).words.split("Published by others")[0]
    assert not re.search(r"\d (µs|ms|tok/s)\b", words.split("What was measured, and on what")[0])


def test_ratios_below_the_noise_are_no_difference() -> None:
    record = sample()
    pair = {"speed_ratio": 1.2, "low_ratio": 1.1, "high_ratio": 1.3, "verdict": "b is 1.20 times faster"}
    record.add(row("ops/linear/x/noisy", "a noisy pair", pair | {"noise": 0.14}))
    record.add(row("ops/linear/x/small", "a small difference", pair | {"speed_ratio": 1.02, "noise": 0.04}))
    table = tables(made(record)[0])["Ratios"]
    assert "no verdict: the same build differs from itself by 14.0%" in cells_of(table, "a noisy pair")
    assert any(cell.startswith("no difference") for cell in cells_of(table, "a small difference"))
    assert "b is 1.42 times faster (1.38 to 1.47)" in cells_of(table, "linear: the reference")


# ---------------------------------------------------------------- several records


def test_two_machines_are_compared() -> None:
    found, refused = made(sample(), sample(speed=2.0, backend="echo", processor="Other 1", threads=8))
    assert not refused
    table = tables(found)["Speeds of comparable rows"]
    line = cells_of(table, "linear, flash-decode-fast")
    assert line[4:] == ["2.00×", "B is 2.00 times faster (1.83 to 2.19)"]
    assert "cpu, 2 threads" in line[2]
    assert "echo, 8 threads" in line[3]
    context = tables(found)["By context, v4-nano (3f9ac2d1)"]
    assert [cell.text for cell in context.rows[0][:2]] == ["512", "A"]
    assert [cell.text for cell in context.rows[1][:2]] == ["512", "B"]


def test_many_comparisons_are_summed_up() -> None:
    found, _ = made(sample(), sample(speed=2.0, backend="echo"))
    line = cells_of(tables(found)["Which record is faster"], "B against A, ops: median")
    assert line[1:] == [str(2 * len(OPS)), "2.00×", "2.00 to 2.00", f"B faster in {2 * len(OPS)}"]
    assert tables(found)["Speeds of comparable rows"].folded


def test_a_speed_without_a_spread_says_so() -> None:
    found, _ = compare(Joined(sources(sample(), sample(speed=2.0))))
    told = {c.quantity: c.verdict for c in found if c.key.endswith("frontier/512")}
    assert told["ttft_s"] == "B is 2.00 times faster (its spread was not measured)"
    assert told["tpot_s"] == "B is 2.00 times faster (1.79 to 2.23)"


def test_the_same_speed_is_no_difference() -> None:
    found, _ = compare(Joined(sources(sample(), sample(speed=1.02, backend="echo"))))
    assert {c.verdict for c in found if c.quantity == "median_s"} == {"no difference beyond the spread"}


def refusals(left: Record, right: Record, prefix: str) -> set[str]:
    """Reasons why rows below `prefix` were not compared."""
    return {one.reason for one in made(left, right)[1] if one.subject.startswith(prefix)}


def test_another_fingerprint_stands_apart() -> None:
    two = sample(), sample(speed=2.0, fingerprint="ffff0000")
    found, refused = made(*two)
    assert any("different fingerprints" in one.reason for one in refused if one.subject == "model v4-nano")
    assert all("model fingerprint" in reason for reason in refusals(*two, "model/v4-nano/frontier"))
    assert "By context, v4-nano (3f9ac2d1)" in tables(found)
    assert "By context, v4-nano (ffff0000)" in tables(found)
    table = tables(found)["Speeds of comparable rows"]
    assert not any("v4-nano" in line[0].plain for line in table.rows)
    assert cells_of(table, "linear, flash-decode-fast")[4] == "2.00×", "ops have no model"


@pytest.mark.parametrize(
    ("change", "prefix", "reason"),
    [
        ({"fails": ("parity/op/linear/",)}, TIMED, "B: parity is red: parity/op/linear/tiny-decode-exact"),
        ({"fails": (TIMED,)}, TIMED, "B: its result is wrong"),
        ({"noise": 0.14}, TIMED, "B: on its machine the same call differs from itself by 14.0%, above 10.0%"),
        ({"quick": False, "rounds": 3}, TIMED, "a quick and a full run, and B has only 3 rounds"),
        ({"models": {"v4-pro": {"fingerprint": "1"}}}, "model", "different models, v4-nano and v4-pro"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_with_its_reason(
    change: dict[str, Any], prefix: str, reason: str
) -> None:
    found, refused = made(sample(), sample(speed=2.0, **change))
    assert reason in {one.reason for one in refused if one.subject == prefix}
    listed = " ".join(cell.plain for line in tables(found)["Not compared, and why"].rows for cell in line)
    assert reason in listed


def test_another_setting_and_another_sample_size_are_not_one_line() -> None:
    left, right = sample(), sample()
    key = "ops/linear/flash-decode-fast"
    old = right.row(key)
    assert old is not None
    right.add(replace(old, setting={**old.setting, "dtype": "float32"}))
    key = "parity/model/fast-vs-reference/all"
    old = right.row(key)
    assert old is not None
    right.add(replace(old, values={**old.values, "positions": 4000}))
    assert refusals(left, right, "ops/linear/flash-decode-fast") == {"different dtype bfloat16 and float32"}
    assert refusals(left, right, key) == {"different positions 400 and 4,000"}
    table = tables(made(left, right)[0])["Speeds of comparable rows"]
    assert not any("linear, flash" in line[0].plain for line in table.rows)


def test_only_what_ran_on_its_machine_has_a_speed_to_compare() -> None:
    right = sample(speed=3.0)
    right.rows = [replace(one, evidence="emulated") if one.suite == "ops" else one for one in right.rows]
    assert refusals(sample(), right, "ops/linear/flash") == {
        "B: evidence `emulated` has no speed of its device"
    }


def test_sides_named_after_their_backend_are_the_same_sides() -> None:
    _, refused = made(sample(), sample(backend="echo"))
    assert not [one for one in refused if one.subject.startswith("parity/model/")]


def test_three_records_are_each_compared_with_the_first() -> None:
    found, _ = compare(Joined(sources(sample(), sample(speed=2.0), sample(speed=4.0))))
    pairs = {(c.left, c.right) for c in found}
    assert pairs == {("A", "B"), ("A", "C")}


# ---------------------------------------------------------------- forms


def test_the_page_needs_nothing_else() -> None:
    reader = shown(sample(), sample(speed=2.0))
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    for tag, address in reader.addresses:
        assert tag == "a", (tag, address)
        assert address.startswith(("#", "https://")), address
    text = html.render(made(sample())[0])
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert "default-src 'none'" in unescape(text)
    assert len(reader.scripts) == 1


def test_the_page_is_made_for_everybody() -> None:
    text = html.render(made(sample())[0])
    reader = Reader(text)
    assert reader.tags.count("h1") == 1
    assert '<html lang="en">' in text
    assert "width=device-width" in text
    assert text.count("<th scope=") == text.count("<th ")
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        root = ET.fromstring(svg)
        assert [child.tag.rpartition("}")[2] for child in root[:2]] == ["title", "desc"]
        assert all((child.text or "").strip() for child in root[:2])
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for tag, address in reader.addresses:
        assert tag != "a" or not address.startswith("#") or address[1:] in ids


def test_colours_have_contrast_in_light_and_dark() -> None:
    style = (Path(html.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    for scheme in (light, dark):
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for ink in ("ink", "soft", "link", "good", "near", "bad"):
            for paper in ("paper", "panel"):
                assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)
        for ink, paper in (
            ("ink", "good-bg"),
            ("ink", "near-bg"),
            ("good", "good-bg"),
            ("near", "near-bg"),
            ("bad-ink", "bad-bg"),
        ):
            assert contrast(colour[ink], colour[paper]) >= 4.5, (ink, paper)
        for series in ("s0", "s1", "s2", "s3", "s4", "s5"):
            assert contrast(colour[series], colour["paper"]) >= 3, series


def contrast(one: str, two: str) -> float:
    """WCAG contrast of two hex colours."""

    def light(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'"


def hostile() -> Record:
    """A record that somebody prepared for us."""
    record = sample(processor=EVIL, command=EVIL)
    record.models[EVIL] = {"fingerprint": EVIL, EVIL: [EVIL]}
    record.machine[EVIL] = {EVIL: EVIL}
    record.stages[EVIL] = {"state": EVIL, "seconds": EVIL, "note": EVIL}
    record.ceilings.append({"name": EVIL, "value": 1e9, "unit": EVIL, "how": EVIL, "threads": EVIL})
    for suite in (
        "parity/op",
        "parity/layer",
        "parity/model",
        "parity",
        "ops",
        "model/v4-nano/frontier",
        "model/peers",
        "claims",
    ):
        values = {EVIL: EVIL, "verdict": EVIL, "median_s": 1.0, "flops": 9, "moved_bytes": 9, "tpot_s": 0.1}
        key, setting = f"{suite}/{EVIL}/{EVIL}", {EVIL: EVIL, "tokens": 99}
        record.add(Row(key, EVIL, "ok", "reference", values, {EVIL: 1.0}, setting, EVIL, EVIL))
    record.add(not_run(f"claims/{EVIL}", EVIL, EVIL, command=EVIL))
    return record


def test_a_record_cannot_put_markup_into_the_page() -> None:
    reader = shown(hostile(), hostile())
    assert reader.tags.count("script") == 1
    assert "img" not in reader.tags
    assert EVIL.replace("  ", " ") in "".join(reader.text)


def test_a_record_cannot_put_markup_into_markdown() -> None:
    text = markdown.render(made(hostile())[0])
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<(script|img)", plain)
    assert "\n|" in text
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert line.endswith(" |")


def test_links_are_only_those_of_the_ledger() -> None:
    from v4sdk_bench.claims.ledger import ledger

    known = {c.source.url for c in (*ledger().claims, *ledger().cited)}
    linked = {address for _, address in shown(hostile()).addresses if not address.startswith("#")}
    assert linked <= known


def test_markdown_has_the_same_answers() -> None:
    text = markdown.render(made(sample(fails=("parity/op/linear/",)))[0])
    assert text.startswith("# v4-nano on cpu\n\n**Parity is red: 4 of ")
    assert "✗" in text
    assert "## What was not run" in text
    assert "    v4sdk bench run --suite ops --only ops --backend cpu --quick" in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(len(widths), []).append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths and widths[len(widths) - 1]:
            assert len(set(widths[len(widths) - 1])) == 1
            widths[len(widths)] = []


def test_the_terminal_shows_verdict_tables_and_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.render(made(sample(fails=("parity/op/linear/",)))[0])
    out = capsys.readouterr().out
    assert "Parity is red: 4 of" in out
    assert "\x1b[" not in out, "no colours in a pipe"
    assert "$ v4sdk bench run" in out
    assert "with --all: Ops against their reference: every comparison (32 rows, ✗ 4)" in out
    terminal.render(made(sample())[0], whole=True)
    whole = capsys.readouterr().out
    assert "with --all" not in whole
    assert whole.count("\n") > out.count("\n") + 30


def test_what_is_folded_says_whether_it_is_right() -> None:
    red, green = made(sample(fails=("parity/invariance/",)))[0], made(sample())[0]
    name = "Invariances: the same tokens by another way"
    assert (tables(red)[name].bad, tables(green)[name].bad) == (5, 0)
    assert tables(green)[name].contents == "5 rows, all ✓"
    page = shown(sample(fails=("parity/invariance/",)))
    summaries = re.findall(r"<details class=\"folded[^>]*><summary>[^<]*<span", html.render(red))
    assert any("open" in s and name in s for s in summaries), "a short table with something wrong stands open"
    assert name in page.words
    folded = markdown.render(green)
    assert f"<details><summary>{name} (5 rows, all ✓)</summary>\n\n### " in folded
    assert folded.count("<details>") == folded.count("</details>")


def test_claims_are_counted_before_they_are_listed() -> None:
    facts = [fact.text for fact in made(sample())[0].verdicts[0].facts]
    assert any(
        re.fullmatch(r"Published claims: \d+ of \d+ figures found as claimed.*", fact) for fact in facts
    )


def test_noise_above_one_is_a_share_too() -> None:
    assert numbers.show("noise", 1.617) == "161.7%"


def test_the_terminal_does_not_read_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.render(made(sample(processor="[bold]x[/nothing] :smile:"))[0])
    assert "[bold]x[/nothing] :smile:" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


def test_a_record_becomes_three_forms(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.json", sample())
    code, out = run(path, "--html", tmp_path / "page.html", "--markdown", tmp_path / "page.md")
    assert code == 0
    assert "Parity is green" in out
    assert "<!doctype html>" in (tmp_path / "page.html").read_text(encoding="utf-8").lower()
    assert "# v4-nano on cpu" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_outputs_are_named_after_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = saved(tmp_path, "a.json", sample()), saved(tmp_path, "b.json", sample(speed=2.0))
    run(one, "--html", "--markdown")
    assert (tmp_path / "a.html").exists()
    assert (tmp_path / "a.md").exists()
    monkeypatch.chdir(tmp_path)
    run(one, two, "--html")
    assert (tmp_path / "v4sdk-bench-report.html").exists()


def test_stdout_can_take_one_form(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.json", sample())
    assert run(path, "--html", "-")[1].lstrip().lower().startswith("<!doctype html>")
    assert "# v4-nano on cpu" in run(path, "--markdown", "-")[1]
    with pytest.raises(OutputError, match="both go to stdout"):
        run(path, "--markdown", "-", "--html", "-")


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    path, mine = saved(tmp_path, "a.json", sample()), tmp_path / "thesis.html"
    mine.write_text("<p>years of work", encoding="utf-8")
    with pytest.raises(OutputError, match="exists and is no report"):
        run(path, "--html", mine)
    assert mine.read_text(encoding="utf-8") == "<p>years of work"
    run(path, "--html", mine, "--force")
    run(path, "--html", mine)
    with pytest.raises(OutputError, match="over a record"):
        run(path, "--html", path, "--force")
    with pytest.raises(OutputError, match="over a record"):
        run("--html", path, path)
    with pytest.raises(OutputError, match="does not exist"):
        run(path, "--markdown", tmp_path / "no" / "page.md")
    with pytest.raises(OutputError, match="is a folder"):
        run(path, "--markdown", tmp_path)
    assert Record.load(path).status == "complete"


def test_strict_fails_on_what_is_wrong_or_not_comparable(tmp_path: Path) -> None:
    good = saved(tmp_path, "a.json", sample())
    same = saved(tmp_path, "b.json", sample(speed=2.0))
    other = saved(tmp_path, "c.json", sample(fingerprint="ffff"))
    bad = saved(tmp_path, "d.json", sample(fails=("parity/op/linear/",)))
    assert run(good, same, "--strict")[0] == 0
    assert run(good, other)[0] == 0
    assert run(good, other, "--strict")[0] == 1
    assert run(bad, "--strict")[0] == 1


def test_a_record_given_twice_is_said_and_shown_once(tmp_path: Path) -> None:
    one, two = saved(tmp_path, "a.json", sample()), saved(tmp_path, "copy.json", sample())
    found, notes = load([one, two, one])
    assert [source.label for source in found] == ["A"]
    assert len(notes) == 2
    assert "is the same record as" in notes[0]
    assert "is the same record as" in run(one, two, "--html", "-")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"kind": "v4sdk bench", "schema": 99}), "has schema 99, expected 1"),
        ('{"kind": "v4sdk bench", "sche', "is not whole JSON"),
        (json.dumps({"kind": "something"}), "is not a record of v4sdk bench"),
        (json.dumps([1, 2]), "is not a record of v4sdk bench"),
        ("", "is not whole JSON"),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadRecord, match=message) as error:
        run(path, "--html", tmp_path / "page.html")
    assert error.value.hint
    assert not (tmp_path / "page.html").exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="cannot read .*No such file"):
        run(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("machine", []), ("options", "x"), ("stages", {"parity/op": 3}), ("models", {"m": 1}), ("ceilings", [1]), ("started", 5),
     ("device", "x")],
)  # fmt: skip
def test_parts_of_another_type_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = saved(tmp_path, "a.json", sample())
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | {name: value}), encoding="utf-8")
    with pytest.raises(BadRecord, match=f"`{name}`"):
        run(path)


# ---------------------------------------------------------------- drawings and numbers


def test_a_chart_says_what_it_shows_and_has_every_point() -> None:
    points = tuple((float(n), 0.01 * i, 0.009 * i, 0.012 * i) for i, n in enumerate(CONTEXTS, 1))
    svg = charts.lines("TPOT", "rises", [charts.Series("<b>", points)], "context", "s")
    root = ET.fromstring(svg)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(points) + 1, "one in the legend"
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"512", "8k", "<b>"} <= set(texts)
    left, right = (float(c.get("cx", 0)) for c in (circles[0], circles[4]))
    middle = float(circles[2].get("cx", 0))
    assert middle == pytest.approx((left + right) / 2, abs=0.2), "x is logarithmic"
    assert charts.lines("", "", [charts.Series("a", ())], "x", "s") == ""


def test_a_roofline_puts_points_under_their_roof() -> None:
    roofs = [charts.Roof("read", 1e10, True), charts.Roof("gemm", 1e12, False)]
    spots = [charts.Spot(1.0, 5e9, 1, "low"), charts.Spot(1000.0, 9e11, 2, "high")]
    root = ET.fromstring(charts.roofline("roof", "two ops", roofs, spots))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2
    assert float(circles[0].get("cy", 0)) > float(circles[1].get("cy", 0))
    assert charts.roofline("roof", "", roofs[:1], spots) == ""
    assert charts.roofline("roof", "", roofs, []) == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tpot_s", 0.01234, "12.3 ms"), ("median_s", 4.2e-7, "420 ns"), ("load_s", 300.0, "5.00 min"), ("x_s", 0.0, "0 s"),
        ("kv_bytes", 1_610_612_736, "1.61 GB"), ("flops", 2.1e12, "2.10 TFLOP"), ("bytes_per_s", 2.7e10, "27.0 GB/s"),
        ("prefill_tokens_per_s", 666.2, "666 tok/s"), ("share_of_ceiling", 0.491, "49.1%"), ("speed_ratio", 1.418, "1.42×"),
        ("top1", 1.0, "100%"), ("top1", 0.9999, "over 99.9%"), ("noise", 0.0004, "0.0400%"), ("kl_mean", 7.7e-6, "7.7e-6"),
        ("cosine_min", 0.99991, "0.999910"), ("positions", 1234, "1,234"), ("x", float("nan"), "not a number"), ("x", None, "–"),
        ("x", True, "yes"), ("x", {"a_s": 0.5}, "a_s 500 ms"), ("tried", [1, 2], "1, 2"), ("word", "plain", "plain"),
        ("x", float("inf"), "infinite"),
    ],
)  # fmt: skip
def test_values_are_told_with_their_unit(name: str, value: Any, text: str) -> None:
    assert numbers.show(name, value) == text


def test_nothing_in_a_report_falls_over_odd_numbers() -> None:
    record = sample()
    for i, odd in enumerate((float("nan"), float("inf"), -1.0, 0, 10**30, True, "text", [], {}, None)):
        names = (
            "tpot_s",
            "ttft_s",
            "kv_bytes",
            "peak_bytes",
            "kl_mean",
            "median_s",
            "flops",
            "moved_bytes",
            "noise",
            "speed_ratio",
            "found",
        )
        values = dict.fromkeys(names, odd)
        for prefix in (
            "model/v4-nano/frontier",
            "ops/linear",
            "parity/model/odd",
            "claims/flops-1m",
            "model/peers/m/e",
            "parity/op/linear",
        ):
            record.add(Row(f"{prefix}/{i}", "odd", "info", "reference", values, {}, {"tokens": odd}))
    record.ceilings.append({"name": None, "value": float("nan"), "unit": None})
    shown(record, sample())
    markdown.render(made(record)[0])


def test_records_of_different_models_each_keep_their_rows() -> None:
    table = tables(made(sample(), sample(fingerprint="ffff"))[0])[
        "Invariances: the same tokens by another way"
    ]
    assert table.columns == ("what", "exact A", "exact B")
    found = [[cell.text for cell in line[1:]] for line in table.rows if line[0].text == "run = rerun"]
    assert found == [["same model", "–"], ["–", "same model"]]


def test_a_map_of_references_against_themselves_says_so() -> None:
    def note(how: str, worst: float) -> str:
        values = {"max_abs": worst, "worst": worst, "how": how}
        record = replace(
            sample(), rows=[row("parity/op/linear/tiny-x-exact", "linear", values, {"worst": 1.0})]
        )
        return tables(made(record)[0])["Ops against their reference"].note

    assert "none could differ" in note("reference", 0.0)
    assert "none could differ" in note("parts", 0.0)
    assert "none could differ" not in note("kernel", 0.0)
    assert "none could differ" not in note("parts", 0.2)
