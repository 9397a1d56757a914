"""The record of a benchmark run: what it refuses to say, and that no accident loses what was found."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from v4sdk_bench.record import BadRecord, Record, Row, judged, not_run

GOOD = Row("ops/rms_norm/tiny", "rms_norm", "ok", "reference", {"median_s": 1e-6}, {"max_abs": 1e-5})


def record(**changes: object) -> Record:
    return Record("2026-11-22T00:00:00+00:00", "v4sdk bench run", {}, {}, {}, **changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    made = record(device={"name": "x"}, status="complete")
    made.add(GOOD)
    made.add(not_run("ops/embed/tiny", "embed", "no time left"))
    made.save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == made


def test_what_could_not_be_measured_is_null_since_nan_is_not_json(tmp_path: Path) -> None:
    made = record()
    made.add(
        Row(
            "parity/x",
            "x",
            "failed",
            values={"kl": float("nan"), "all": [1.0, float("inf")]},
            limits={"kl": 1.0},
        )
    )
    made.save(tmp_path / "a.json")
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert Record.load(tmp_path / "a.json").rows[0].values == {"kl": None, "all": [1.0, None]}


def test_a_row_of_the_same_key_replaces_the_old_one() -> None:
    made = record()
    made.add(GOOD)
    made.add(Row("ops/rms_norm/tiny", "again", "info"))
    assert [row.what for row in made.rows] == ["again"]


@pytest.mark.parametrize("name", ["median_s", "tokens_per_s", "bytes_of_ceiling", "peer_ratio"])
def test_a_wrong_result_has_no_speed(name: str) -> None:
    with pytest.raises(BadRecord, match="failed and still gives a speed"):
        Row("ops/rms_norm/tiny", "rms_norm", "failed", "reference", {name: 1.0})


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (("else/x", "x", "ok"), "expected one of parity"),
        (("ops/x", "x", "fine"), "has state `fine`"),
        (("ops/x", "x", "ok", "seen"), "has evidence `seen`"),
        (("ops/x", "x", "ok", "none"), "only what was not run has none"),
        (("ops/x", "x", "not run", "reference"), "only what was not run has none"),
    ],
)
def test_rows_outside_the_schema_are_refused(row: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(BadRecord, match=complaint):
        Row(*row)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "values", "complaint"),
    [
        (None, {"kernel_s": 1e-6}, "no uuid and no driver and no kernel_s"),
        ({"uuid": "u", "driver": "1"}, {"kernel_s": 1e-6}, "no kernel_s"),
        ({"uuid": "u", "driver": "1", "kernel_s": 2e-6}, {"median_s": 1e-6}, "without kernel times"),
    ],
)
def test_device_evidence_needs_its_proof(
    tmp_path: Path, device: dict[str, str] | None, values: dict[str, float], complaint: str
) -> None:
    made, row = record(device=device), Row("device/x", "x", "ok", "device", values)
    with pytest.raises(BadRecord, match=complaint):
        made.add(row)
    made.rows.append(row)
    made.save(tmp_path / "forged.json")
    with pytest.raises(BadRecord, match=complaint):
        Record.load(tmp_path / "forged.json")


def test_device_evidence_with_its_proof_is_taken() -> None:
    made = record(device={"uuid": "u", "driver": "1", "kernel_s": 2e-6})
    made.add(Row("device/x", "x", "ok", "device", {"median_s": 2e-6, "kernel_s": 1e-6}))
    made.add(Row("parity/x", "x", "ok", "device", {"max_abs": 0.0}))
    assert len(made.rows) == 2


@pytest.mark.parametrize(
    ("values", "limits", "state"),
    [
        ({}, {}, "info"),
        ({"kl": 1.0}, {"kl": 1.0}, "ok"),
        ({"kl": 1.1}, {"kl": 1.0}, "failed"),
        ({"top1": 0.9}, {">=top1": 0.99}, "failed"),
        ({"top1": 0.99}, {">=top1": 0.99}, "ok"),
        ({"kl": float("nan")}, {"kl": 1.0}, "failed"),
        ({}, {"kl": 1.0}, "failed"),
    ],
)
def test_limits_decide(values: dict[str, float], limits: dict[str, float], state: str) -> None:
    assert judged(values, limits) == state


def spoil(text: str) -> dict[str, str]:
    whole = json.loads(text)
    return {
        "truncated": text[: len(text) // 2],
        "another kind": json.dumps({**whole, "kind": "else"}),
        "another schema": json.dumps({**whole, "schema": 99}),
        "no rows": json.dumps({k: v for k, v in whole.items() if k != "rows"}),
        "a stranger in a row": json.dumps({**whole, "rows": [{"key": "ops/x", "colour": "red"}]}),
        "a device that is none": json.dumps({**whole, "device": "x"}),
        "a machine that is none": json.dumps({**whole, "machine": None}),
        "a stage that is none": json.dumps({**whole, "stages": {"ops/speed": []}}),
        "a row that is none": json.dumps({**whole, "rows": [7]}),
        "values that are none": json.dumps({**whole, "rows": [{**whole["rows"][0], "values": None}]}),
        "a list": "[]",
        "binary": "\udcff",
    }


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "another kind",
        "another schema",
        "no rows",
        "a stranger in a row",
        "a device that is none",
        "a machine that is none",
        "a stage that is none",
        "a row that is none",
        "values that are none",
        "a list",
        "binary",
    ],
)
def test_a_spoilt_file_is_refused_with_a_way_out(tmp_path: Path, how: str) -> None:
    made, path = record(), tmp_path / "a.json"
    made.add(GOOD)
    made.save(path)
    path.write_bytes(spoil(path.read_text())[how].encode("utf-8", "surrogateescape"))
    with pytest.raises(BadRecord, match=r"a\.json") as caught:
        Record.load(path)
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="No such file"):
        Record.load(tmp_path / "none.json")


def test_a_full_disk_keeps_the_last_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "a.json", record()
    made.add(GOOD)
    made.save(path)
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("v4sdk_bench.record.os.replace", full)
    made.add(Row("ops/embed/tiny", "embed", "info"))
    with pytest.raises(BadRecord, match="No space left on device; the file keeps what was written before"):
        made.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "the attempt left a file behind"
