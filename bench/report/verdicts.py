"""The answer first: what each record says in words, and all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from v4sdk.backend import Evidence
from v4sdk_bench.record import Record, Row
from v4sdk_bench.report import charts
from v4sdk_bench.report.compare import NOISE_LIMIT, withheld
from v4sdk_bench.report.identity import EVIDENCE
from v4sdk_bench.report.numbers import finite, show
from v4sdk_bench.report.outside import read_ledger
from v4sdk_bench.report.page import Text, Tone, Verdict
from v4sdk_bench.report.peers import PREFIX as PEERS
from v4sdk_bench.report.sources import Source

# worst first: a record is as good as its worst comparison
MODEL_VERDICTS = ("different model", "drifted", "same within precision", "same model")
_NAMED = 5


def verdict(source: Source) -> Verdict:
    """What one record says."""
    record = source.record
    tone, headline = _headline(record)
    facts = (
        *_status(record),
        *_whole(record),
        *_failures(record),
        *_fastest(source),
        *_peers(source),
        *_claims(record),
        *_noise(source),
        *_unrun(record),
        *_evidence(record),
    )
    return Verdict(source.label, _machine(source), headline, tone, facts)


def _machine(source: Source) -> str:
    """Backend, machine, threads, versions, budgets and day in one line."""
    record = source.record
    threads = record.machine.get("threads")
    parts = [
        source.title,
        f"{show('threads', threads)} {'thread' if threads == 1 else 'threads'}"
        if threads is not None
        else "",
        f"v4sdk {record.software['v4sdk']}" if record.software.get("v4sdk") else "",
        "quick budgets" if record.options.get("quick") else "full budgets",
    ]
    return ", ".join(part for part in parts if part)


def _headline(record: Record) -> tuple[Tone, str]:
    judged = [row for row in record.under("parity/") if row.state in ("ok", "failed")]
    failed = [row for row in judged if row.state == "failed"]
    if not record.rows:
        return "warn", "This record is empty: nothing was measured"
    if failed:
        return "bad", f"Parity is red: {len(failed)} of {len(judged)} judged rows broke a limit"
    if not judged:
        return "warn", "Parity was not measured: the speeds below stand without proof of the model"
    count = "the one judged row is" if len(judged) == 1 else f"all {len(judged)} judged rows are"
    if _parity_unfinished(record):
        return "warn", f"Parity is green as far as it was measured: {count} within limits"
    return "good", f"Parity is green: {count} within limits"


def _parity_unfinished(record: Record) -> bool:
    stages = [stage for name, stage in record.stages.items() if name.startswith("parity/")]
    return any(stage.get("state") != "done" for stage in stages) or (
        record.status != "complete" and not stages
    )


def _status(record: Record) -> Iterator[Text]:
    if record.status != "complete":
        suites = record.options.get("suites")
        begun = {name.partition("/")[0] for name in record.stages}
        left = [
            f"suite {suite}" for suite in (suites if isinstance(suites, list) else []) if suite not in begun
        ]
        left += [
            f"stage {name}" for name, stage in record.stages.items() if stage.get("state") == "interrupted"
        ]
        missing = f"Missing: {', '.join(left)}." if left else "Its last stages are missing."
        word = "was interrupted" if record.status == "interrupted" else "was still running when it was read"
        yield Text(
            f"This run {word}. {missing} The command that made it goes on from there: {record.command}",
            "warn",
        )
    for name, stage in record.stages.items():
        if stage.get("state") == "broken":
            yield Text(f"Stage {name} broke: {stage.get('note') or 'no reason given'}", "bad")


def _whole(record: Record) -> Iterator[Text]:
    rows = record.under("parity/model/")
    words = [str(row.values["verdict"]) for row in rows if row.values.get("verdict") in MODEL_VERDICTS]
    if words:
        worst = min(words, key=MODEL_VERDICTS.index)
        tone: Tone = "good" if MODEL_VERDICTS.index(worst) >= 2 else "warn" if worst == "drifted" else "bad"
        yield Text(f"Whole model against its references, at worst: {worst}", tone)


def _failures(record: Record) -> Iterator[Text]:
    failed = [row for row in record.rows if row.state == "failed"]
    ours = [row for row in failed if not row.key.startswith(PEERS)]
    for row in ours[:_NAMED]:
        yield Text(f"Failed: {row.key}: {row.what}" + (f" ({row.note})" if row.note else ""), "bad")
    if len(ours) > _NAMED:
        yield Text(f"and {len(ours) - _NAMED} more failed rows", "bad")
    engines = dict.fromkeys("/".join(row.key.split("/")[2:4]) for row in failed if row not in ours)
    if engines:
        yield Text(f"Other engines that are not comparable, so without speed: {', '.join(engines)}", "warn")


def _fastest(source: Source) -> Iterator[Text]:
    """Time per token from the shortest to the longest context of each model."""
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in source.record.under("model/"):
        parts, last = row.key.split("/"), row.key.rpartition("/")[2]
        told = finite(row.values.get("tpot_s")) is not None and withheld(source, row) is None
        if len(parts) == 4 and parts[2] == "frontier" and last.isdigit() and told:
            found.setdefault(parts[1], []).append((float(last), row))
    for model, rows in found.items():
        rows.sort(key=lambda pair: pair[0])
        said = [
            f"{show('tpot_s', row.values['tpot_s'])} after {charts.tokens(n)} tokens"
            for n, row in (rows[0], rows[-1])
        ]
        yield Text(f"Time per output token of {model}: {', '.join(dict.fromkeys(said))}")


def _peers(source: Source) -> Iterator[Text]:
    """Decoding beside each other engine at the deepest context that was timed; none that computes another model."""
    deepest: dict[tuple[str, str], Row] = {}
    for row in source.record.under(PEERS):
        parts = row.key.split("/")
        if len(parts) == 7 and parts[3] == "ratio" and parts[5] == "decode" and row.values.get("verdict"):
            deepest[parts[2], parts[4]] = row
    for (model, engine), row in deepest.items():
        both = [r for name in (engine, "v4sdk") for r in source.record.under(f"{PEERS}{model}/{name}/")]
        if withheld(source, row) is None and all(r.state != "failed" for r in both):
            yield Text(
                f"Decoding {model} after {row.key.rpartition('/')[2]} tokens, beside {engine}: {row.values['verdict']}"
            )


def _claims(record: Record) -> Iterator[Text]:
    """How many figures of the ledger were found as claimed."""
    known, _ = read_ledger()
    if known is None or not record.under("claims/"):
        return
    rows = [row for claim in known.claims for key in claim.keys if (row := record.row(key)) is not None]
    count = {state: sum(row.state == state for row in rows) for state in ("ok", "failed", "info", "not run")}
    said = [f"{count['ok']} of {count['ok'] + count['failed']} figures found as claimed"]
    said += [f"{count['info']} for information"] * bool(count["info"])
    said += [f"{count['not run']} not run"] * bool(count["not run"])
    yield Text(f"Published claims: {', '.join(said)}", "warn" if count["failed"] else "")


def _noise(source: Source) -> Iterator[Text]:
    for suite in ("ops", "model"):
        noise = source.noise(suite)
        if noise is not None and noise > NOISE_LIMIT:
            said = f"In suite {suite} the same call differs from itself by {show('noise', noise)}: its speeds are not compared"
            yield Text(said, "warn")


def _unrun(record: Record) -> Iterator[Text]:
    count = sum(row.state == "not run" for row in record.rows)
    if count:
        yield Text(f"Not run: {count} {'row' if count == 1 else 'rows'}, listed below with their reasons")


def _evidence(record: Record) -> Iterator[Text]:
    ran = [word for word in reversed(get_args(Evidence)) if any(row.evidence == word for row in record.rows)]
    if ran:
        told = "; ".join(f"{word}: {EVIDENCE[word]}" for word in ran)
        yield Text(
            f"Evidence is {told}" + ("" if "device" in ran else ". Nothing here ran on an accelerator")
        )


def answer(verdicts: Sequence[Verdict], sources: Sequence[Source], refused: int) -> str:
    """The whole report in a sentence or two."""
    if len(verdicts) == 1:
        whole = next(iter(_whole(sources[0].record)), None)
        word = whole.text.rpartition(": ")[2] if whole else ""
        said = f"{verdicts[0].headline}."
        return f"{said} The whole model is the {word}." if word in MODEL_VERDICTS[2:] else said
    green, red = (sum(v.tone == tone for v in verdicts) for tone in ("good", "bad"))
    unclear = len(verdicts) - green - red
    parts = (
        f"{green} green" * bool(green),
        f"{red} red" * bool(red),
        f"{unclear} without a whole verdict" * bool(unclear),
    )
    said = f"Parity of {len(verdicts)} records: {', '.join(part for part in parts if part)}."
    if refused:
        said += f" {refused} {'comparison was' if refused == 1 else 'comparisons were'} refused, each with its reason."
    return said


def subject(sources: Sequence[Source]) -> str:
    """What the page is about: models and backends."""
    models = dict.fromkeys(name for source in sources for name in source.record.models)
    backends = dict.fromkeys(source.backend for source in sources)
    what = " and ".join(models) or "DeepSeek V4"
    return f"{what} on {' and '.join(backends)}"


def failed(source: Source) -> list[Row]:
    """Failed rows of our own; an engine that is not comparable is a finding."""
    return [row for row in source.record.rows if row.state == "failed" and not row.key.startswith(PEERS)]
