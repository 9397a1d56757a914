"""Other engines beside ours: the line protocol survives every kind of death, and an engine that is wrong has no speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from v4sdk import Session, plugins
from v4sdk_bench.mini import checkpoint as mini
from v4sdk_bench.mini.checkpoint import TINY_MINI
from v4sdk_bench.parity.metrics import agreement, verdict
from v4sdk_bench.peers import process, stage
from v4sdk_bench.peers.lanes import (
    ENGINES,
    OURS,
    EngineSpec,
    Forms,
    Lane,
    candidates,
    combined,
    is_installed,
    our_lane,
)
from v4sdk_bench.peers.process import Peer, PeerError, environment
from v4sdk_bench.peers.rows import shares_of
from v4sdk_bench.peers.stage import Plan
from v4sdk_bench.record import SPEED_ENDINGS, Record, Row
from v4sdk_bench.speed.ceilings import Ceiling, ReadProbe
from v4sdk_bench.stage import Bench, BenchError

IDS = np.random.default_rng(3).integers(0, TINY_MINI.vocab_size, 150).tolist()

# an engine whose logits depend on the last token alone; options make it wrong, or let it die
FAKE = """
import os
import numpy as np

class Engine:
    def load(self, model, threads, options):
        self.options = options
        if options.get("die") == "load":
            raise RuntimeError("no kernel for this processor")
        self.table = np.random.default_rng(0).normal(size=(options["vocab"], options["vocab"])).astype(np.float32)
        wrong = np.random.default_rng(1).normal(size=self.table.shape).astype(np.float32)
        self.table += options.get("noise", 0.0) * wrong
        names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        print("this goes to the log")
        return {"version": "1.2.3", "settings": {n: os.environ.get(n) for n in names} | {"threads": threads}}

    def prefill(self, ids, every):
        return self.table[ids] if every else self.table[ids[-1:]]

    def decode(self, token):
        if self.options.get("die") == "decode":
            os.abort()
        return self.table[[token]]
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "fake_worker.py"
    path.write_text(FAKE)
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    where = mini.lay_out(tmp_path_factory.mktemp("mini"), ("native", "bf16"), config=TINY_MINI)
    return Forms("tiny", where["native"], where["bf16"])


def load(peer: Peer, **options: Any) -> dict[str, Any]:
    return peer.ask("load", 30, model="nowhere", threads=2, options={"vocab": 8, **options})


def test_a_worker_answers_line_by_line(fake: Path, tmp_path: Path) -> None:
    with Peer("fake", fake, sys.executable, tmp_path, environment(2)) as peer:
        about = load(peer)
        assert about["version"] == "1.2.3"
        assert about["settings"] == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "threads": 2}
        assert about["seconds"] > 0
        assert about["peak_bytes"] > 1_000_000
        found = peer.ask("prefill", 30, ids=[1, 2, 3], every=True, save="a.npy")
        every = np.load(found["logits"])
        assert every.shape == (3, 8)
        last = peer.ask("prefill", 30, ids=[1, 2, 3], every=False, save="b.npy")
        assert np.array_equal(np.load(last["logits"]), every[2:])
        fed = peer.ask("decode", 30, ids=[2, 3], save="c.npy")
        assert np.array_equal(np.load(fed["logits"]), every[1:])
        assert len(fed["seconds"]) == 2
        assert peer.ask("prefill", 30, ids=[1], every=False)["logits"] is None
    assert "this goes to the log" in (tmp_path / "fake.log").read_text()


def test_an_engine_that_raises_says_why_and_lives(fake: Path, tmp_path: Path) -> None:
    with Peer("fake", fake, sys.executable, tmp_path) as peer:
        with pytest.raises(PeerError, match="no kernel for this processor"):
            load(peer, die="load")
        with pytest.raises(PeerError, match="`dance` is no request"):
            peer.ask("dance", 30)
        assert load(peer)["version"] == "1.2.3"


def test_a_crash_in_the_middle_is_named_with_its_signal(fake: Path, tmp_path: Path) -> None:
    with Peer("fake", fake, sys.executable, tmp_path) as peer:
        load(peer, die="decode")
        with pytest.raises(PeerError, match="ended in `decode` with signal SIGABRT"):
            peer.ask("decode", 30, ids=[1])
        with pytest.raises(PeerError, match="ended in `prefill`"):
            peer.ask("prefill", 30, ids=[1], every=False)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('Loading weights: 100%', flush=True)\ninput()", "expected a JSON object"),
        ("print('[1, 2]', flush=True)\ninput()", "expected a JSON object"),
        ("import time\ntime.sleep(60)", "did not answer `load` within 1 s"),
        ("print('{\"half\":', end='', flush=True)\nimport time\ntime.sleep(60)", "within 1 s"),
        (
            "import sys\nprint('assert failed: x', file=sys.stderr)\nsys.exit(3)",
            "exit code 3: assert failed: x",
        ),
    ],
    ids=["prose", "list", "silence", "half a line", "exit"],
)
def test_whatever_else_a_worker_does_ends_it_with_one_sentence(
    script: str, said: str, fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(process, "WORKER", worker)
    began = time.monotonic()
    with Peer("odd", fake, sys.executable, tmp_path) as peer, pytest.raises(PeerError, match=said):
        peer.ask("load", 1, model="", threads=1, options={})
    assert time.monotonic() - began < 30


def test_a_python_that_is_not_there_is_refused(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be started"):
        Peer("fake", fake, str(tmp_path / "no-python"), tmp_path)


def test_a_python_may_be_named_by_a_relative_path(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "venv" / "python"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(tmp_path)
    with Peer("fake", fake, "venv/python", scratch) as peer:
        assert load(peer)["version"] == "1.2.3"


def test_our_worker_decodes_given_tokens_as_a_prefill_would(forms: Forms) -> None:
    from v4sdk_bench.peers.v4sdk_worker import Engine

    engine = Engine()
    about = engine.load(str(forms.native), torch.get_num_threads(), {"backend": "cpu", "numerics": "exact"})
    assert about["settings"]["kv_format"] == "float32"
    with Session.load(forms.native, backend="cpu", numerics="exact") as session:
        want = session.logits(IDS)
    got = [engine.prefill(IDS[:120], every=True), *(engine.decode(token) for token in IDS[120:])]
    assert verdict(agreement(want, torch.from_numpy(np.concatenate(got)))) == "same model"
    assert np.allclose(engine.prefill(IDS[:120], every=False), got[0][-1:], atol=1e-4)


def test_transformers_worker_reads_the_twin_as_the_same_model(forms: Forms) -> None:
    pytest.importorskip("transformers")
    from v4sdk_bench.peers.transformers_worker import Engine

    engine = Engine()
    options = {"dtype": "float32", "experts": "eager"}
    about = engine.load(str(forms.floats), torch.get_num_threads(), options)
    assert about["settings"]["attn_implementation"] == "eager"
    with Session.load(forms.native, backend="cpu", numerics="exact") as session:
        want = session.logits(IDS)
    got = [engine.prefill(IDS[:130], every=True), *(engine.decode(token) for token in IDS[130:])]
    assert verdict(agreement(want, torch.from_numpy(np.concatenate(got))), rounded=False) == "same model"


@pytest.fixture
def compare(
    fake: Path, forms: Forms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Row]]:
    """Run the stage on fake engines: ours, and peers by name with the options of each of their candidates."""

    def lane(engine: str, **options: Any) -> Lane:
        return Lane(engine, fake, forms.native, "native", "bf16", {"vocab": TINY_MINI.vocab_size, **options})

    def run(deadline: float = float("inf"), **peers: list[dict[str, Any]]) -> list[Row]:
        specs = tuple(EngineSpec(name, "json", "pip install it") for name in peers)
        monkeypatch.setattr(stage, "ENGINES", specs)
        monkeypatch.setattr(stage, "forms_of", lambda _: forms)
        monkeypatch.setattr(stage, "our_lane", lambda *_, **__: lane(OURS))
        monkeypatch.setattr(
            stage, "candidates", lambda spec, *_: [lane(spec.name, **o) for o in peers[spec.name]]
        )
        monkeypatch.setattr(stage, "QUICK", Plan((4, 8), 2, 3, 3, 6, 2, 1, 4))
        record = Record("now", "test", {}, {}, {})
        bench = Bench(plugins.select("cpu"), record, tmp_path, tmp_path, quick=True)
        bench.deadline = time.monotonic() + deadline
        rows = list(stage.run(bench))
        for row in rows:
            record.add(row)
        assert len(record.rows) == len(rows), "keys are unique"
        return rows

    return run


def under(rows: list[Row], *parts: str) -> list[Row]:
    return [row for row in rows if row.key.startswith("/".join(("model/peers/tiny", *parts)))]


def test_engines_that_agree_are_timed_in_turns(compare: Callable[..., list[Row]]) -> None:
    rows = compare(good=[{}])
    for engine in (OURS, "good"):
        assert [row.state for row in under(rows, engine, "parity")] == ["ok", "ok"]
        speeds = under(rows, engine, "prefill") + under(rows, engine, "decode")
        assert [row.key.rpartition("/")[2] for row in speeds] == ["4", "8", "4", "8"]
        for row in speeds:
            assert row.values["rounds"] == 3
            assert row.values["tokens_per_s"] > 0
            assert (
                row.values["low_tokens_per_s"]
                <= row.values["tokens_per_s"]
                <= row.values["high_tokens_per_s"]
            )
            assert {"cpu_per_token_s", "spread", "load", "version", "settings", "tried"} <= set(row.values)
            assert row.values["settings"]["OMP_WAIT_POLICY"] == "PASSIVE"
            assert row.command.startswith("v4sdk bench run")
            assert row.setting["depth"] in (4, 8)
        (cold,) = under(rows, engine, "load")
        assert {"load_s", "cold_prefill_s", "warm_prefill_s", "cold_decode_s", "peak_bytes"} <= set(
            cold.values
        )
    assert len(under(rows, "ratio", "good")) == 4
    assert all(
        row.values["v4sdk_to_good_ratio"] > 0 and row.values["verdict"] for row in under(rows, "ratio")
    )


def test_a_planted_wrong_engine_is_not_comparable_and_has_no_speed(compare: Callable[..., list[Row]]) -> None:
    rows = compare(good=[{}], wrong=[{"noise": 1.0}], coarse=[{"noise": 0.12}])
    for engine in ("wrong", "coarse"):
        parity = under(rows, engine, "parity")
        assert [row.state for row in parity] == ["failed", "failed"]
        assert all("not comparable" in row.note and row.values["kl_mean"] > 2e-3 for row in parity)
        for row in under(rows, engine):
            assert row.key.endswith("/load") or not [n for n in row.values if n.endswith(SPEED_ENDINGS)]
        for phase in ("prefill", "decode"):
            (silent,) = under(rows, engine, phase)
            assert silent.state == "not run"
            assert "not comparable" in silent.note
        assert not under(rows, "ratio", engine)
    assert "different model" in under(rows, "wrong", "parity", "prefill")[0].note
    assert under(rows, "ratio", "good")


def test_settings_are_tried_and_a_crash_is_one_of_them(compare: Callable[..., list[Row]]) -> None:
    rows = compare(
        tried=[
            {"repack": True, "die": "decode"},
            {"repack": False, "die": ""},
            {"repack": True, "die": "load"},
        ]
    )
    row = under(rows, "tried", "decode", "8")[0]
    tried = row.values["tried"]
    assert "repack=False" in row.values["chosen"]
    assert len(tried) == 3
    assert "SIGABRT" in tried[0]["error"]
    assert tried[1]["decode_per_s"] > 0
    assert "no kernel" in tried[2]["error"]


def test_an_engine_that_never_runs_is_a_row_with_its_own_words(compare: Callable[..., list[Row]]) -> None:
    rows = compare(dead=[{"die": "load"}], good=[{}])
    (row,) = under(rows, "dead")
    assert row.state == "not run"
    assert "no kernel for this processor" in row.note
    assert under(rows, "good", "decode", "8")


def test_a_peer_that_dies_while_measured_takes_nobody_along(
    compare: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = stage.take_turns

    def dies(lanes: Any, ids: Any, depth: int, *rest: Any) -> Any:
        if depth == 4 and len(lanes) == 3:
            lanes[1].peer._kill()
        return rounds(lanes, ids, depth, *rest)

    monkeypatch.setattr(stage, "take_turns", dies)
    rows = compare(dying=[{}], good=[{}])
    assert any("SIGKILL" in row.note for row in under(rows, "dying"))
    assert under(rows, "good", "decode", "8")
    assert not under(rows, "dying", "decode", "8")


def test_without_time_the_skipped_depths_are_named(compare: Callable[..., list[Row]]) -> None:
    rows = compare(deadline=0.0, good=[{}])
    skipped = under(rows, "all")
    assert [row.state for row in skipped] == ["not run", "not run"]
    assert "left" in skipped[0].note
    assert not under(rows, "good", "decode")


def test_an_engine_that_is_not_installed_comes_with_its_recipe(
    compare: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "is_installed", lambda *_: False)
    (row,) = under(compare(absent=[{}]), "absent")
    assert row.state == "not run"
    assert "pip install it" in row.note


def test_a_folder_with_the_name_of_an_engine_is_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine_of_nobody").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_installed(EngineSpec("x", "engine_of_nobody", ""), sys.executable)
    assert is_installed(EngineSpec("x", "numpy", ""), sys.executable)
    assert not is_installed(EngineSpec("x", "numpy", ""), str(tmp_path / "no-python"))


def test_candidates_are_documented_settings_with_the_defaults_first(forms: Forms) -> None:
    by_name = {spec.name: spec for spec in ENGINES}
    gguf = Forms("tiny", forms.native, forms.floats, Path("x.gguf"))
    llama = candidates(by_name["llama_cpp"], gguf, 4096)
    assert llama[0].options == {"repack": True, "flash_attn": "auto", "n_ubatch": 512, "context": 4096}
    assert {lane.options["n_ubatch"] for lane in llama} == {128, 512, 2048}
    assert {lane.options["flash_attn"] for lane in llama} == {"auto", "on", "off"}
    assert any(not lane.options["repack"] for lane in llama)
    assert candidates(by_name["llama_cpp"], forms, 4096) == []
    assert {lane.precision for lane in candidates(by_name["transformers"], forms, 4096)} == {
        "bf16",
        "float32",
    }
    assert our_lane(forms, plugins.select("cpu"), numerics="exact").precision == "float32"


def test_the_best_of_each_setting_is_put_together(forms: Forms) -> None:
    spec = next(s for s in ENGINES if s.name == "llama_cpp")
    lanes = candidates(spec, Forms("tiny", forms.native, forms.floats, Path("x.gguf")), 4096)
    speed = dict.fromkeys(range(len(lanes)), 10.0) | {1: 11.0, 5: 12.0}
    together = combined([(lane, speed[at]) for at, lane in enumerate(lanes)])
    assert together is not None
    assert (together.options["repack"], together.options["n_ubatch"]) == (False, 2048)
    assert together.options["flash_attn"] == "auto"
    # where only one setting helps, it has been tried already
    speed[1] = 9.0
    assert combined([(lane, speed[at]) for at, lane in enumerate(lanes)]) is None


def test_each_round_is_held_against_the_bandwidth_around_it() -> None:
    def ceiling(value: float) -> Ceiling:
        return Ceiling("read", value, "bytes_per_s", value, value, 2, 10**9, "2026-11-23")

    # 10 GB a token; memory gave 20, then 40, then 20 GB/s, and 50 in another moment of the run
    found = shares_of(10**10, [0.5, 1.0, 0.4], [2e10, 4e10, 2e10, 6e10], [ceiling(5e10), ceiling(3e10)])
    assert found["read_of_ceiling"] == pytest.approx(10 / 0.4 / 40)
    assert found["low_read_of_ceiling"] <= found["read_of_ceiling"] <= found["high_read_of_ceiling"]
    assert found["read_of_fastest"] == pytest.approx(10 / 0.5 / 50)
    assert found["ceiling_bytes_per_s"] == 3e10
    with pytest.raises(BenchError, match="below its floor"):
        shares_of(10**10, [0.3], [2e10, 2e10], [ceiling(5e10)])


def test_the_probe_reads_what_it_says() -> None:
    probe = ReadProbe(torch.device("cpu"), None, buffer_bytes=1 << 24)
    assert 1e8 < probe.rate() < 1e13
    with pytest.raises(BenchError, match="bytes of memory are free"):
        ReadProbe(torch.device("cpu"), None, buffer_bytes=10**15)
