"""The parity suite: is it the same model? By op, by layer, as a whole by position, through time, and by what it answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from v4sdk import Session
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS
from v4sdk.testing import CaseResult, run_conformance
from v4sdk.weights import WeightSource
from v4sdk_bench.export import witness as onnx_witness
from v4sdk_bench.nano import evaluate
from v4sdk_bench.parity import agreement as ag
from v4sdk_bench.parity import calibration, invariances, sides, table
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.stage import Bench, Stage
from v4sdk_bench.suites.parity_model import layer, model
from v4sdk_bench.suites.parity_rows import (
    NUMERICS,
    judged_row,
    late_row,
    model_folder,
    model_name,
    slug,
)


def ops(bench: Bench) -> Iterator[Row]:
    """Every op on its own cases against the pure reference: conformance, one row per case."""
    config = ModelConfig.from_folder(model_folder(bench))
    for name in OPS:
        if not bench.wants(f"parity/op/{name}/"):
            continue
        late = late_row(bench, f"parity/op/{name}/all", f"cases of {name}")
        if late:
            yield late
            continue
        bench.say(f"op {name}")
        for found in run_conformance(bench.backend, config, ops=[name]).results:
            yield _op_row(bench, found)


def _op_row(bench: Bench, found: CaseResult) -> Row:
    key = f"parity/op/{found.op}/{found.case}"
    values: dict[str, Value] = {
        "max_abs": found.max_abs, "relative_l2": found.relative_l2, "cosine": found.cosine, "worst": found.worst,
        "how": found.how,
    }  # fmt: skip
    state = {"passed": "ok", "known gap": "info"}.get(found.status, "failed")
    what = f"{found.op}, case {found.case}, against its reference; `worst` in units of what is accepted"
    return Row(
        key, what, state, found.evidence, values, {"worst": 1.0} if state != "info" else {}, {"case": found.case},
        found.detail or "", bench.command(key), None,
    )  # fmt: skip


def golden(bench: Bench) -> Iterator[Row]:
    """The table of `python -m v4sdk_bench.parity.table`: the official forward pass and transformers."""
    here = (
        f"python -m v4sdk_bench.parity.table --golden {bench.golden}"
        if bench.golden
        else "v4sdk bench run --golden FOLDER"
    )
    if bench.golden is None:
        why = "no golden activations at hand: they lie in tests/golden of the repository, --golden names the folder"
        yield not_run("parity/golden", "the official forward pass and transformers", why, command=here)
        return
    # `fast` is what the stage parity/model measures
    for section, lines in table.sections(bench.golden, bundled_folder(), quick=bench.quick).items():
        if section == "fast" or not bench.wants(f"parity/golden/{section}/"):
            continue
        late = late_row(bench, f"parity/golden/{section}/all", section)
        if late:
            yield late
            continue
        for line in lines():
            bench.say(line.what)
            key = f"parity/golden/{section}/{slug(line.what)}"
            if line.measured is None:
                yield not_run(key, line.what, line.note, command=f"{here} --only {section}")
                continue
            name = ">=measured" if line.at_least else "measured"
            limits = {} if line.limit is None else {name: line.limit}
            values = {"measured": line.measured}
            yield Row(
                key, line.what, judged(values, limits), "reference", values, limits, {}, line.note,
                f"{here} --only {section}", 0,
            )  # fmt: skip


def calibrate(bench: Bench) -> Iterator[Row]:
    """What the verdicts say about known roundings and known mistakes in v4-nano; on the references, whatever is under test."""
    from v4sdk_bench.parity.plants import MISTAKES, ROUNDINGS

    # what sets roundings and mistakes apart is known once all are measured
    if not bench.wants("parity/calibration"):
        return
    what = "planted changes in v4-nano: do the verdicts tell roundings from mistakes?"
    if bench.model is not None:
        yield not_run(
            "parity/calibration",
            what,
            "it belongs to the bundled model: leave out --model",
            command="v4sdk bench run",
        )
        return
    found = []
    with (
        Session.load(None, backend=sides.References(), numerics="exact") as session,
        Checkpoint(model_folder(bench)) as held,
    ):
        quantization = session.config.quantization
        source = WeightSource(held, quantization.block if quantization else (128, 128))
        subject = calibration.Calibration(session, source, ag.default_text(session, 1 if bench.quick else 2))
        for plant in (*ROUNDINGS, *MISTAKES):
            if bench.quick and not plant.quick:
                continue
            late = late_row(bench, f"parity/calibration/{plant.name}", plant.what)
            if late:
                yield late
                continue
            bench.say(plant.what)
            one = subject.measure(plant)
            found.append(one)
            yield _calibration_row(bench, one)
    yield from _separation_rows(bench, found)


def _calibration_row(bench: Bench, one: calibration.Calibrated) -> Row:
    key = f"parity/calibration/{one.plant.name}"
    accepted = ("different model",) if one.plant.wrong else ("same model", "same within precision")
    values: dict[str, Value] = {
        "right_verdict": int(one.verdict in accepted), "verdict": one.verdict,
        "by_mean_kl_written": one.by_mean_kl, "by_mean_kl_everywhere": one.by_mean_kl_everywhere,
        "written_mean_kl": one.written.kl_mean, "everywhere_mean_kl": one.everywhere.kl_mean,
        "layer_relative_l2": one.layer, "same_choices": one.choices,
    }  # fmt: skip
    if one.exact is not None:
        values["exact_relative_l2"] = one.exact.relative_l2
    kind = "mistake" if one.plant.wrong else "rounding"
    what = f"{kind}: {one.plant.what}; expected {' or '.join(accepted)}"
    note = (
        ""
        if one.exact is not None
        else "rounds the weights, which `exact` does not do: judged in `fast` alone"
    )
    return judged_row(
        bench,
        key,
        what,
        values,
        {">=right_verdict": 1},
        note,
        evidence="reference",
        model="v4-nano",
        plant=one.plant.name,
    )


def _separation_rows(bench: Bench, found: list[calibration.Calibrated]) -> Iterator[Row]:
    if not any(c.plant.wrong for c in found):
        return
    for name, apart in calibration.separations(found):
        key = f"parity/calibration/separation/{name.replace('_', '-')}"
        values: dict[str, Value] = {
            "largest_rounding": apart.largest_rounding, "smallest_mistake": apart.smallest_mistake,
            "mistakes_among_roundings": apart.mixed, "mistakes": apart.mistakes,
        }  # fmt: skip
        # limits rest on these; the mean KL of anything to anything is told to show why it is not enough
        rests = name in ("exact_relative_l2", "same_roundings_mean_kl", "layer_relative_l2")
        what = f"{name}: the largest of a rounding and the smallest of a mistake"
        yield judged_row(
            bench,
            key,
            what,
            values,
            {"mistakes_among_roundings": 0} if rests else {},
            evidence="reference",
            model="v4-nano",
        )
    missed = [c.plant.name for c in found if c.plant.wrong and not c.seen_by_layers]
    blamed = [
        c.plant.name for c in found if not c.plant.wrong and not c.plant.touches_weights and c.seen_by_layers
    ]
    yield judged_row(
        bench, "parity/calibration/layer-limits", "mistakes that pass the limits of single layers, and roundings that do not",
        {"missed": len(missed), "blamed": len(blamed)}, {"missed": 0, "blamed": 0}, ", ".join(missed + blamed),
        evidence="reference", model="v4-nano",
    )  # fmt: skip


def invariance(bench: Bench) -> Iterator[Row]:
    """What must not change an answer, in each numerics option."""
    for numerics in NUMERICS:
        prefix = f"parity/invariance/{numerics}"
        if not bench.wants(prefix):
            continue
        late = late_row(bench, prefix, f"invariances in {numerics}")
        if late:
            yield late
            continue
        bench.say(f"invariances in {numerics}")
        for found in invariances.check(
            lambda n=numerics: sides.Side(bench.backend, n).load(bench.model), bench.seed
        ):
            yield judged_row(
                bench, f"{prefix}/{found.check.key}", f"{found.check.name}: {found.check.what}; {found.verdict}",
                {**found.agreement.values(), "verdict": found.verdict}, {found.limit.value: found.limit.size},
                found.limit.reason, model=model_name(bench), numerics=numerics,
            )  # fmt: skip


def tasks(bench: Bench) -> Iterator[Row]:
    """Exact match of v4-nano on held-out questions, through `v4sdk run`."""
    if bench.model is not None:
        why = "the tasks are those of the bundled model: leave out --model"
        yield not_run("parity/task", "exact match on held-out questions", why, command="v4sdk bench run")
        return
    count = 12 if bench.quick else evaluate.ASKED
    wanted = [task for task in evaluate.RIGHT if bench.wants(f"parity/task/{task}")]
    if importlib.util.find_spec("llguidance") is None:
        # a question that is refused says nothing about the model
        why = "some of its questions ask for a format, which needs the extra `grammar`: pip install 'v4sdk[grammar]'"
        for task in [t for t in wanted if any(d.response_format for d in evaluate.sampled(t, count))]:
            wanted.remove(task)
            key = f"parity/task/{task}"
            yield not_run(key, f"{task}: exact match of held-out questions", why, command=bench.command(key))
    bench.say(f"{count} held-out questions of each of {len(wanted)} tasks")
    for task, right, asked, mistakes in evaluate.accuracy(count, wanted, bench.backend.name):
        least = evaluate.least_right(task, asked)
        figure = evaluate.RIGHT[task] / evaluate.ASKED
        yield judged_row(
            bench, f"parity/task/{task}", f"{task}: exact match of {asked} held-out questions",
            {"accuracy": right / asked, "right": right, "asked": asked},
            {">=right": least},
            f"known score {figure:.1%} of {evaluate.ASKED}, less three sigma" + "".join(f"; {m}" for m in mistakes[:1]),
            model="v4-nano", numerics="fast", asked=asked,
        )  # fmt: skip


STAGES: tuple[Stage, ...] = (
    # an interpreter takes a second where a kernel takes a millisecond
    Stage("parity/op", ops, 25, 120, emulated_s=1800),
    Stage("parity/golden", golden, 25, 120),
    Stage("parity/layer", layer, 8, 60),
    Stage("parity/model", model, 30, 180),
    Stage("parity/calibration", calibrate, 18, 120),
    Stage("parity/invariance", invariance, 12, 60),
    Stage("parity/task", tasks, 12, 300),
    onnx_witness.STAGE,
)
