"""A saved sequence goes on bit for bit in another process, and is refused where it does not belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from v4sdk import SamplingParams, Session
from v4sdk.errors import StateError

PROMPT = [(i * 29 + i * i * 7) % 120 + 3 for i in range(90)]
DRAWN = SamplingParams(temperature=1.0, top_p=0.95, seed=5, max_tokens=6, ignore_eos=True, top_logprobs=5)
_CONTINUE = """
import json, sys
from v4sdk import SamplingParams, Session
folder, numerics, path = sys.argv[1:]
with Session.load(folder, backend="cpu", numerics=numerics) as session:
    sequence = session.resume(path)
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=6, ignore_eos=True, top_logprobs=5)
    result = session.generate([], params, sequence)
    print(json.dumps([[t.id, t.logprob.hex(), [[i, p.hex()] for i, p in t.top]] for t in result.logprobs]))
"""


def _load(
    golden: Path, name: str = "tiny-fp32", numerics: str = "exact", kv_format: str | None = None
) -> Session:
    return Session.load(golden / name, backend="cpu", numerics=numerics, kv_format=kv_format)


@pytest.mark.parametrize(("name", "numerics"), [("tiny-fp32", "exact"), ("tiny-quant", "reference")])
def test_continuation_in_another_process_is_bit_equal(
    golden: Path, tmp_path: Path, name: str, numerics: str
) -> None:
    path = tmp_path / "answer.state"
    with _load(golden, name, numerics) as session, session.sequence() as sequence:
        session.generate(PROMPT, DRAWN, sequence)
        sequence.save(path)
        here = session.generate([], DRAWN, sequence)
    there = subprocess.run(
        [sys.executable, "-c", _CONTINUE, str(golden / name), numerics, str(path)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    expected = [[t.id, t.logprob.hex(), [[i, p.hex()] for i, p in t.top]] for t in here.logprobs]
    assert json.loads(there.stdout) == expected


def test_resumed_sequence_can_go_back(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with _load(golden) as session:
        sequence = session.sequence()
        session.generate(PROMPT[:50], DRAWN, sequence)
        turn = sequence.num_cached
        session.generate(PROMPT[50:], DRAWN, sequence)
        sequence.save(path)
        again = session.resume(path)
        assert (again.ids, again.num_cached) == (sequence.ids, sequence.num_cached)
        # the snapshots travel along: nothing before the first turn's end is computed again
        assert again.rewind(turn + 3) == 3
        fresh = session.generate(list(again.ids), DRAWN)
        assert session.generate([], DRAWN, again).ids == fresh.ids


@pytest.fixture
def saved(golden: Path, tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    with _load(golden) as session, session.sequence() as sequence:
        session.generate(PROMPT[:40], SamplingParams(temperature=0, max_tokens=2), sequence)
        sequence.save(path)
    return path


def _refused(session: Session, path: Path) -> str:
    before = session.cache_bytes
    with pytest.raises(StateError) as caught:
        session.resume(path)
    with session.sequence(), session.sequence():
        pass
    assert session.cache_bytes <= 4 * before + (1 << 20)
    return caught.value.message


def test_other_model_and_other_numerics_are_refused(golden: Path, saved: Path) -> None:
    with _load(golden, "tiny-quant", "exact") as session:
        assert "belongs to another model" in _refused(session, saved)
    with _load(golden, "tiny-fp32", "reference") as session:
        assert "numerics `exact`, expected `reference`" in _refused(session, saved)


def test_damaged_files_are_refused(golden: Path, saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    with safe_open(str(saved), "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["v4sdk_state"])

    def written(name: str, tensors: dict[str, torch.Tensor], **changed: object) -> Path:
        path = tmp_path / name
        save_file(tensors, path, {"v4sdk_state": json.dumps(header | changed)})
        return path

    whole = saved.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text").write_text("no state")
    save_file(tensors, tmp_path / "plain")
    without = {k: v for k, v in tensors.items() if k != "layers.1.entries"}
    with _load(golden) as session:
        assert "cannot be read" in _refused(session, tmp_path / "cut")
        assert "cannot be read" in _refused(session, tmp_path / "text")
        assert "does not exist" in _refused(session, tmp_path / "absent")
        assert "without a v4sdk state" in _refused(session, tmp_path / "plain")
        assert "version 99" in _refused(session, written("version", tensors, version=99))
        assert "damaged header" in _refused(session, written("field", tensors, surprise=1))
        for field, value in (
            ("num_cached", "40"), ("seed", -1), ("stream", 1 << 64), ("numerics", "exact"), ("model", 3),
            ("snapshots", [99]), ("turns", 5),
        ):  # fmt: skip
            path = written(f"bad-{field}", tensors, **{field: value})
            assert f"`{field}` is {value!r}" in _refused(session, path)
        floats = tensors | {"tokens": tensors["tokens"].float()}
        assert "`tokens` is torch.float32" in _refused(session, written("floats", floats))
        assert "`layers.1.entries` is None" in _refused(session, written("tensor", without))
        assert "tokens for 999" in _refused(session, written("count", tensors, num_cached=999))
        short = tensors | {"layers.1.entries": tensors["layers.1.entries"][:-1].clone()}
        assert "`layers.1.entries`" in _refused(session, written("short", short))
        unknown = tensors | {"tokens": tensors["tokens"] + 1000}
        assert "unknown" in _refused(session, written("unknown", unknown))


def test_failed_write_leaves_the_old_file(golden: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    with _load(golden) as session, session.sequence() as sequence:
        session.generate(PROMPT[:5], SamplingParams(temperature=0, max_tokens=1), sequence)

        def full(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("v4sdk.state.os.fsync", full)
        with pytest.raises(StateError, match="no space left"):
            sequence.save(saved)
        with pytest.raises(StateError, match="cannot be written"):
            sequence.save(saved.parent / "no folder" / "state")
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_widening_is_exact_and_narrowing_says_so(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow, wide, back = tmp_path / "native", tmp_path / "float32", tmp_path / "again"
    with _load(golden, "tiny-quant", "reference", "native") as session, session.sequence() as sequence:
        session.generate(PROMPT, SamplingParams(temperature=0, max_tokens=2), sequence)
        sequence.save(narrow)
    notices: list[str] = []
    with Session.load(
        golden / "tiny-quant", backend="cpu", numerics="reference", kv_format="float32",
        on_progress=lambda p: notices.append(p.text) if p.kind == "notice" else None,
    ) as session:  # fmt: skip
        widened = session.resume(narrow)
        assert notices == []
        widened.save(wide)
    with _load(golden, "tiny-quant", "reference", "native") as session:
        session.resume(wide).save(back)
    assert "re-quantised from KV format `float32` to `native`" in caplog.text
    # there and back: nothing was lost on the way up
    first, last = load_file(narrow), load_file(back)
    assert first.keys() <= last.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]), name
