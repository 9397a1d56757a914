"""The head of a report: what each record says in words, what it was measured with, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from v4sdk.backend import Evidence
from v4sdk_bench.record import Record, Row
from v4sdk_bench.report.compare import Joined
from v4sdk_bench.report.numbers import ABSENT, interval, seconds, show
from v4sdk_bench.report.page import Cell, Section, Table, Text, Tone, Verdict, unique
from v4sdk_bench.report.sources import Source

EVIDENCE = {
    "reference": "the plain torch definition of the op computed it",
    "schema": "the vendor's op exists with these arguments",
    "meta": "its shapes and dtypes were accepted",
    "emulated": "its arithmetic ran on a CPU",
    "compiled": "a compiler for the device took it",
    "device": "it ran on the device, whose UUID, driver and kernel times are in the record",
    "none": "it was not run",
}
# worst first: a record is as good as its worst comparison
MODEL_VERDICTS = ("different model", "drifted", "same within precision", "same model")
_NAMED = 5


def verdict(source: Source) -> Verdict:
    """What one record says."""
    record = source.record
    tone, headline = _headline(record)
    told = [*_status(record), *_failures(record), *_unrun(record)]
    words = [
        str(r.values["verdict"])
        for r in record.under("parity/model/")
        if r.values.get("verdict") in MODEL_VERDICTS
    ]
    if words:
        worst = min(words, key=MODEL_VERDICTS.index)
        told.insert(0, Text(f"Whole model against its references, at worst: {worst}.", _tone_of(worst)))
    ran = [word for word in (*reversed(get_args(Evidence)),) if any(r.evidence == word for r in record.rows)]
    if ran:
        told.append(
            Text(
                f"Evidence: {', '.join(ran)}."
                + ("" if "device" in ran else " Nothing here ran on an accelerator.")
            )
        )
    return Verdict(source.label, source.title, headline, tone, tuple(told))


def _tone_of(word: str) -> Tone:
    return {"same model": "good", "same within precision": "good", "drifted": "warn"}.get(word, "bad")  # type: ignore[return-value]


def _headline(record: Record) -> tuple[Tone, str]:
    judged = [row for row in record.under("parity/") if row.state in ("ok", "failed")]
    failed = [row for row in judged if row.state == "failed"]
    if not record.rows:
        return "warn", "This record is empty: nothing was measured"
    if not judged:
        return (
            "warn",
            "Parity was not measured: speeds below stand without proof that they are of the same model",
        )
    if failed:
        return "bad", f"Parity is red: {len(failed)} of {len(judged)} rows broke a limit"
    return "good", f"Parity is green: {_all_of(len(judged))} within limits"


def _all_of(count: int) -> str:
    return "the one judged row is" if count == 1 else f"all {count} judged rows are"


def _status(record: Record) -> Iterator[Text]:
    if record.status != "complete":
        suites = record.options.get("suites") or []
        begun = {name.partition("/")[0] for name in record.stages}
        left = [f"suite {suite}" for suite in suites if suite not in begun]
        left += [
            f"stage {name}" for name, stage in record.stages.items() if stage.get("state") == "interrupted"
        ]
        missing = f" Missing: {', '.join(left)}." if left else " Its last stages are missing."
        word = "was interrupted" if record.status == "interrupted" else "was still running when it was read"
        yield Text(
            f"This run {word}; what it had found is shown.{missing} The command that made it goes on from there.",
            "warn",
        )
    for name, stage in record.stages.items():
        if stage.get("state") == "broken":
            yield Text(f"Stage {name} broke: {stage.get('note') or 'no reason given'}.", "bad")


def _failures(record: Record) -> Iterator[Text]:
    failed = [row for row in record.rows if row.state == "failed"]
    outside = [row for row in failed if row.suite != "parity"]
    for row in failed[:_NAMED]:
        yield Text(f"{row.key}: {row.what}" + (f" ({row.note})" if row.note else ""), "bad")
    if len(failed) > _NAMED:
        yield Text(f"and {len(failed) - _NAMED} more failed rows", "bad")
    if outside and len(outside) == len(failed):
        yield Text(f"{len(outside)} failed outside parity.", "bad")


def _unrun(record: Record) -> Iterator[Text]:
    count = sum(row.state == "not run" for row in record.rows)
    if count:
        yield Text(
            f"Not run: {count} {'row' if count == 1 else 'rows'}, each with its reason under “What was not run”."
        )


def answer(verdicts: Sequence[Verdict], refused: int) -> str:
    """The whole report in two sentences."""
    green, red = (sum(v.tone == tone for v in verdicts) for tone in ("good", "bad"))
    if len(verdicts) == 1:
        return verdicts[0].headline + "."
    unclear = len(verdicts) - green - red
    parts = [
        f"{green} green" if green else "",
        f"{red} red" if red else "",
        f"{unclear} without a parity verdict" if unclear else "",
    ]
    said = f"Parity of {len(verdicts)} records: {', '.join(p for p in parts if p)}."
    if refused:
        said += f" {refused} {'pair is' if refused == 1 else 'pairs are'} not comparable; each reason is given below."
    return said


def identity(joined: Joined) -> Section:
    """Machine, versions, models, ceilings, and the words of evidence."""
    blocks = [
        _who(joined), *([_models(joined)] if any(s.record.models for s in joined.sources) else []),
        *([_ceilings(joined)] if any(s.record.ceilings for s in joined.sources) else []), _legend(),
    ]  # fmt: skip
    return Section("identity", "What was measured, and on what", tuple(blocks))


def _who(joined: Joined) -> Table:
    names: list[tuple[str, list[str]]] = [
        ("file", [s.path for s in joined.sources]),
        ("backend", [s.backend for s in joined.sources]),
        ("started", [s.record.started for s in joined.sources]),
        ("finished", [s.record.finished or f"not finished ({s.record.status})" for s in joined.sources]),
        ("budgets", ["quick" if s.record.options.get("quick") else "full" for s in joined.sources]),
    ]
    for part, title in (("device", "device "), ("machine", ""), ("software", "")):
        dicts = [getattr(s.record, part) or {} for s in joined.sources]
        for key in dict.fromkeys(key for found in dicts for key in found):
            names.append(
                (title + key.replace("_", " ").removesuffix(" bytes"), [show(key, d.get(key)) for d in dicts])
            )
    for key in dict.fromkeys(key for s in joined.sources for key in s.record.options):
        if key not in ("backend", "quick"):
            said = [s.record.options.get(key) for s in joined.sources]
            names.append((f"option {key}", [ABSENT if v in (None, [], {}) else show(key, v) for v in said]))
    rows = []
    for name, values in names:
        differs = len(set(values)) > 1
        rows.append((Cell(name, note="differs" if differs and name not in ("file", "started", "finished") else ""),
                     *(Cell(v) for v in values)))  # fmt: skip
    heads = [s.label for s in joined.sources] if len(joined.sources) > 1 else ["value"]
    return Table(
        "Machine, software and options",
        ("", *heads),
        tuple(rows),
        unique(s.record.command for s in joined.sources),
    )


def _models(joined: Joined) -> Table:
    rows = []
    for name in dict.fromkeys(name for s in joined.sources for name in s.record.models):
        for source in joined.sources:
            about = source.record.models.get(name)
            if about is not None:
                rest = ", ".join(
                    f"{k.replace('_', ' ')} {show(k, v)}" for k, v in about.items() if k != "fingerprint"
                )
                mark = Cell(str(about.get("fingerprint", ABSENT))[:16])
                rows.append((Cell(name), Cell(source.label), mark, Cell(rest)))
    note = "Rows of two records are put together only where the fingerprint of the model is the same."
    return Table("Models", ("model", "record", "fingerprint", "about"), tuple(rows), note=note, form="stack")


def _ceilings(joined: Joined) -> Table:
    rows = []
    for source in joined.sources:
        for c in source.record.ceilings:
            unit = str(c.get("unit", ""))
            rows.append(
                (
                    Cell(str(c.get("name", ABSENT)), note=str(c.get("how") or "")), Cell(source.label),
                    Cell(show(unit, c.get("value")), numeric=True), Cell(interval(unit, c.get("low"), c.get("high")), numeric=True),
                    Cell(show("threads", c.get("threads")), numeric=True),
                    Cell(show("buffer_bytes", c.get("buffer_bytes")), numeric=True), Cell(str(c.get("date", ABSENT))),
                )
            )  # fmt: skip
    columns = ("ceiling", "record", "reached", "10th to 90th percentile", "threads", "buffer", "when")
    command = unique(s.record.command for s in joined.sources)
    note = "Measured in the same run as everything that is given as a share of it."
    return Table("Ceilings of the machine", columns, tuple(rows), command, note)


def _legend() -> Table:
    rows = tuple((Cell(word), Cell(meaning)) for word, meaning in EVIDENCE.items())
    return Table(
        "Words of evidence, weakest first",
        ("word", "what stands behind a value"),
        rows,
        form="stack",
        folded=True,
    )


def not_run(joined: Joined) -> Section | None:
    """Everything that has no result, with the reason."""
    rows: list[tuple[Cell, ...]] = []
    for source in joined.sources:
        rows += [
            (Cell(row.what, note=row.key), Cell(source.label), Cell(row.note or "no reason given"))
            for row in source.record.rows
            if row.state == "not run"
        ]
        rows += [
            (
                Cell(f"stage {name}"),
                Cell(source.label),
                Cell(f"{stage.get('state')}: {stage.get('note') or 'no reason given'}"),
            )
            for name, stage in source.record.stages.items()
            if stage.get("state") != "done"
        ]
        begun = {name.partition("/")[0] for name in source.record.stages} | {
            row.suite for row in source.record.rows
        }
        chosen = source.record.options.get("suites") or []
        rows += [
            (Cell(f"suite {suite}"), Cell(source.label), Cell(_why_no_suite(source.record, suite, chosen)))
            for suite in ("parity", "ops", "model", "claims", "device")
            if suite not in begun
        ]
    if not rows:
        return None
    table = Table("What was not run, and why", ("what", "record", "reason"), tuple(rows), form="stack")
    return Section("not-run", "What was not run", (table,))


def _why_no_suite(record: Record, suite: str, chosen: Any) -> str:
    if suite in chosen:
        return f"the run ended before it ({record.status})"
    return "not chosen" + (" (it needs an accelerator)" if suite == "device" else "")


def stages(joined: Joined) -> Table | None:
    """What each stage cost."""
    rows = [
        (
            Cell(name), Cell(source.label), Cell(str(stage.get("state", ABSENT)), "bad" if stage.get("state") == "broken" else ""),
            Cell(_time(stage.get("seconds")), numeric=True), Cell(_time(stage.get("budget_s")), numeric=True),
        )
        for source in joined.sources
        for name, stage in source.record.stages.items()
    ]  # fmt: skip
    columns = ("stage", "record", "state", "took", "budget")
    return (
        Table("Stages", columns, tuple(rows), unique(s.record.command for s in joined.sources), folded=True)
        if rows
        else None
    )


def _time(value: Any) -> str:
    return seconds(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ABSENT


def failed_rows(joined: Joined) -> list[tuple[Source, Row]]:
    """All of them, for the exit status and the terminal."""
    return [(source, row) for source in joined.sources for row in source.record.rows if row.state == "failed"]
