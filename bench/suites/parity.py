"""The parity suite: is it the same model? By op, by layer, as a whole by position, through time, and by what it answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from v4sdk import Session
from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.loading import bundled_folder
from v4sdk.ops import OPS
from v4sdk.testing import CaseResult, run_conformance
from v4sdk.weights import WeightSource
from v4sdk_bench import agreement as ag
from v4sdk_bench import calibration, evaluate, invariances, layers, metrics, onnx_witness, sides
from v4sdk_bench import parity as table
from v4sdk_bench import same_tokens as rule
from v4sdk_bench.golden import SETS_EQUAL_LIMIT
from v4sdk_bench.record import Row, Value, judged, not_run
from v4sdk_bench.stage import Bench, Stage

NUMERICS = ("exact", "reference", "fast")
_LAYER_TOKENS = 288
# in `fast`, index scores are not rounded to BF16, so more of them are near ties: another order of summation alone moved 4% of
# v4-nano's picks, over all layers, by way of the layers in front
_SAME_CHOICES_FAST = 0.9
_NO_TIME = "the stage's time was used up: run it alone with --only, or without --quick"


def command(bench: Bench, key: str) -> str:
    """What reproduces a row."""
    parts = [
        "v4sdk bench run --suite parity",
        f"--only {key}",
        f"--backend {bench.backend.name}",
        f"--seed {bench.seed}",
    ]
    parts += ["--quick"] * bench.quick + ([f"--model {bench.model}"] if bench.model else [])
    return " ".join(parts)


def _row(
    bench: Bench, key: str, what: str, values: Mapping[str, Value], limits: Mapping[str, float], note: str = "",
    **setting: Value,
) -> Row:  # fmt: skip
    """A judged row of this run."""
    state = judged(values, limits)
    return Row(
        key,
        what,
        state,
        bench.backend.evidence,
        values,
        limits,
        setting,
        note,
        command(bench, key),
        bench.seed,
    )


def _late(bench: Bench, key: str, what: str) -> Row | None:
    """The row that says a part was left out, where no time is left."""
    return not_run(key, what, _NO_TIME, command=command(bench, key)) if bench.left() <= 0 else None


def _folder(bench: Bench) -> Path:
    return bench.model or bundled_folder()


def _model_name(bench: Bench) -> str:
    return bench.model.name if bench.model else "v4-nano"


def ops(bench: Bench) -> Iterator[Row]:
    """Every op on its own cases against the pure reference: conformance, one row per case."""
    config = ModelConfig.from_folder(_folder(bench))
    for name in OPS:
        if not bench.wants(f"parity/op/{name}/"):
            continue
        late = _late(bench, f"parity/op/{name}/all", f"cases of {name}")
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
        found.detail or "", command(bench, key), None,
    )  # fmt: skip


def golden(bench: Bench) -> Iterator[Row]:
    """The table of `python -m v4sdk_bench.parity`: the official forward pass and transformers."""
    here = (
        f"python -m v4sdk_bench.parity --golden {bench.golden}"
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
        late = _late(bench, f"parity/golden/{section}/all", section)
        if late:
            yield late
            continue
        for line in lines():
            bench.say(line.what)
            key = f"parity/golden/{section}/{_slug(line.what)}"
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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def layer(bench: Bench) -> Iterator[Row]:
    """Every layer on the reference's own input streams, in every numerics option."""
    for numerics in NUMERICS:
        late = _late(bench, f"parity/layer/{numerics}", f"layers in {numerics}")
        if late:
            yield late
            continue
        bench.say(f"layers in {numerics}")
        with (
            sides.Side(sides.References(), numerics).load(bench.model) as reference,
            sides.Side(bench.backend, numerics).load(bench.model) as other,
        ):
            ids = _layer_ids(reference, bench.seed)
            pair = reference.loaded.model, other.loaded.model
            for part in layers.compare_layers(*pair, reference.kv_format, ids):
                key = f"parity/layer/{part.kind.replace(', ', '-')}/{part.layer}/{numerics}/{part.part}"
                values = {
                    "max_abs": part.max_abs, "relative_l2": part.relative_l2, "cosine_min": part.cosine_min,
                    "same_choices": part.choices,
                }  # fmt: skip
                limits = {
                    "relative_l2": layers.relative_limit(part.part, numerics),
                    ">=same_choices": SETS_EQUAL_LIMIT,
                }
                what = f"layer {part.layer} ({part.kind}), {part.part} on the reference's input streams, {numerics}"
                yield _row(
                    bench, key, what, values, limits, model=_model_name(bench), numerics=numerics,
                    kv_format=reference.kv_format, tokens=len(ids),
                )  # fmt: skip


def _layer_ids(session: Session, seed: int) -> list[int]:
    if session.loaded.is_bundled:
        return [i for ids in ag.default_text(session, 1).prompts for i in ids][:_LAYER_TOKENS]
    length = min(_LAYER_TOKENS, session.context_limit)
    return random.Random(seed).choices(range(session.config.vocab_size), k=length)


# of a side: without kernels?, numerics, KV format
_Key = tuple[bool, str, str | None]
# pair -> (side a, side b) as (numerics, KV format); both on the backend under test
_PAIRS: dict[str, tuple[tuple[str, str | None], tuple[str, str | None]]] = {
    "fast-vs-reference": (("reference", None), ("fast", None)),
    "reference-vs-exact": (("exact", None), ("reference", None)),
    "kv-native-vs-float32": (("fast", "float32"), ("fast", "native")),
    "kv-native-vs-bf16": (("fast", "bf16"), ("fast", "native")),
    "kv-bf16-vs-float32": (("fast", "float32"), ("fast", "bf16")),
    "exact-kv-bf16-vs-float32": (("exact", "float32"), ("exact", "bf16")),
}


def model(bench: Bench) -> Iterator[Row]:
    """The whole model: the backend against the references, numerics and KV formats against each other."""
    with ExitStack() as stack:
        scored: dict[_Key, tuple[Session, ag.Scored]] = {}
        text: ag.Text | None = None

        def side(references: bool, numerics: str, fmt: str | None) -> tuple[Session, ag.Scored]:
            nonlocal text
            at = references, numerics, fmt
            if at not in scored:
                backend = sides.References() if references else bench.backend
                session = stack.enter_context(sides.Side(backend, numerics, fmt).load(bench.model))
                text = text or ag.default_text(session, 1 if bench.quick else 4, bench.seed)
                bench.say(f"reading in {sides.label(session)}")
                scored[at] = session, ag.score(session.loaded, text)
            return scored[at]

        pairs: list[tuple[str, _Key, _Key]] = [
            (f"backend-vs-references/{n}", (True, n, None), (False, n, None)) for n in NUMERICS
        ]
        pairs += [(name, (False, *a), (False, *b)) for name, (a, b) in _PAIRS.items()]
        for name, first, second in pairs:
            key = f"parity/model/{name}"
            if not bench.wants(key):
                continue
            late = _late(bench, key, name)
            if late:
                yield late
                continue
            (a, scored_a), (b, scored_b) = side(*first), side(*second)
            assert text is not None
            # rows of a narrower format are rounded, whatever the numerics
            rounded = first[1:] != second[1:] or first[1] != "exact"
            found = ag.compare(scored_a, scored_b, text, a.config, rounded=rounded)
            yield from _model_rows(bench, key, (sides.label(a), sides.label(b)), found, text)
        if bench.wants("parity/model/backend-vs-references/same-tokens"):
            bench.say("greedy answers of both")
            yield _same_tokens_row(bench, side(True, "reference", None)[0], side(False, "reference", None)[0])


def _model_rows(
    bench: Bench, key: str, labels: tuple[str, str], found: ag.Comparison, text: ag.Text
) -> Iterator[Row]:
    setting = {"model": _model_name(bench), "a": labels[0], "b": labels[1], "text": text.what}
    pair = f"{labels[1]} against {labels[0]}"
    whole = found.counted if found.rounded else found.everywhere
    kl = metrics.BF16_MEAN_KL if bench.model is None else metrics.QUANTISED_MEAN_KL
    limits = {"kl_mean": kl} if found.rounded else {"relative_l2": metrics.EXACT_SAME_RELATIVE}
    a, b = (name.split(":")[1:] for name in labels)
    fast = a[0] == "fast"
    if a == b and fast and bench.model is None:
        limits["kl_mean_everywhere"] = metrics.SAME_ROUNDINGS_MEAN_KL
    values = {**whole.values(), "verdict": found.verdict, "kl_mean_everywhere": found.everywhere.kl_mean}
    yield _row(bench, f"{key}/all", f"{pair}: {found.verdict}", values, limits, **setting)
    shares = {"same_experts": found.routes, "same_picks": found.picks}
    told = {name: share for name, share in shares.items() if share is not None}
    # between two numerics options roundings may choose; in the same one only near ties may fall the other way
    wanted = (
        {f">={name}": _SAME_CHOICES_FAST if fast else SETS_EQUAL_LIMIT for name in told} if a == b else {}
    )
    yield _row(
        bench, f"{key}/choices", f"{pair}: experts and picked entries of a token are the same sets", told, wanted,
        f"least in {found.worst_choice}", **setting,
    )  # fmt: skip
    for name, part in found.buckets.items():
        bound = {"kl_mean": metrics.DIFFERENT_MEAN_KL} if found.rounded else limits
        what = f"{pair}, positions {name}, prompts included"
        yield _row(bench, f"{key}/{_slug(name)}", what, part.values(), bound, **setting, positions=name)


def _same_tokens_row(bench: Bench, a: Session, b: Session) -> Row:
    key = "parity/model/backend-vs-references/same-tokens"
    found = rule.same_tokens(a, b, seed=bench.seed)
    values: dict[str, Value] = {
        "broken": len(found.broken), "share": found.share, "kl_mean": found.kl_mean, "prompts": found.prompts,
        "tokens": found.tokens, "compared": found.compared, "logit_difference": found.logit_difference,
        "threshold": found.threshold,
    }  # fmt: skip
    if found.first is not None:
        values |= {
            "first_prompt": found.first.prompt,
            "first_at": found.first.at,
            "first_margin": found.first.margin,
        }
    limits = {"broken": 0.0, ">=share": rule.MARGIN_SHARE, "kl_mean": metrics.BF16_MEAN_KL}
    pair = f"{sides.label(b)} and {sides.label(a)}"
    what = f"greedy tokens of {pair}: equal wherever the margin exceeds 4 times the logit difference"
    return _row(bench, key, what, values, limits, "; ".join(found.broken), model=_model_name(bench))


def calibrate(bench: Bench) -> Iterator[Row]:
    """What the verdicts say about known roundings and known mistakes in v4-nano."""
    from v4sdk_bench.plants import MISTAKES, ROUNDINGS

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
        Checkpoint(_folder(bench)) as held,
    ):
        quantization = session.config.quantization
        source = WeightSource(held, quantization.block if quantization else (128, 128))
        subject = calibration.Calibration(session, source, ag.default_text(session, 1 if bench.quick else 2))
        for plant in (*ROUNDINGS, *MISTAKES):
            if bench.quick and not plant.quick:
                continue
            late = _late(bench, f"parity/calibration/{plant.name}", plant.what)
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
    return _row(bench, key, what, values, {">=right_verdict": 1}, note, model="v4-nano", plant=one.plant.name)


def _separation_rows(bench: Bench, found: list[calibration.Calibrated]) -> Iterator[Row]:
    if not any(c.plant.wrong for c in found):
        return
    for name, apart in calibration.separations(found):
        key = f"parity/calibration/separation/{name.replace('_', '-')}"
        values: dict[str, Value] = {
            "largest_rounding": apart.largest_rounding, "smallest_mistake": apart.smallest_mistake,
            "mistakes_among_roundings": apart.mixed, "mistakes": sum(c.plant.wrong for c in found),
        }  # fmt: skip
        # limits rest on these; the mean KL of anything to anything is told to show why it is not enough
        rests = name in ("exact_relative_l2", "same_roundings_mean_kl", "layer_relative_l2")
        what = f"{name}: the largest of a rounding and the smallest of a mistake"
        yield _row(
            bench, key, what, values, {"mistakes_among_roundings": 0} if rests else {}, model="v4-nano"
        )
    missed = [c.plant.name for c in found if c.plant.wrong and not c.seen_by_layers]
    blamed = [
        c.plant.name for c in found if not c.plant.wrong and not c.plant.touches_weights and c.seen_by_layers
    ]
    yield _row(
        bench, "parity/calibration/layer-limits", "mistakes that pass the limits of single layers, and roundings that do not",
        {"missed": len(missed), "blamed": len(blamed)}, {"missed": 0, "blamed": 0}, ", ".join(missed + blamed), model="v4-nano",
    )  # fmt: skip


def invariance(bench: Bench) -> Iterator[Row]:
    """What must not change an answer, in each numerics option."""
    for numerics in NUMERICS:
        prefix = f"parity/invariance/{numerics}"
        if not bench.wants(prefix):
            continue
        late = _late(bench, prefix, f"invariances in {numerics}")
        if late:
            yield late
            continue
        bench.say(f"invariances in {numerics}")
        for found in invariances.check(
            lambda n=numerics: sides.Side(bench.backend, n).load(bench.model), bench.seed
        ):
            yield _row(
                bench, f"{prefix}/{found.check.key}", f"{found.check.name}: {found.check.what}; {found.verdict}",
                {**found.agreement.values(), "verdict": found.verdict}, {found.limit.value: found.limit.size},
                found.limit.reason, model=_model_name(bench), numerics=numerics,
            )  # fmt: skip


def tasks(bench: Bench) -> Iterator[Row]:
    """Exact match of v4-nano on held-out questions, through `v4sdk run`."""
    if bench.model is not None:
        why = "the tasks are those of the bundled model: leave out --model"
        yield not_run("parity/task", "exact match on held-out questions", why, command="v4sdk bench run")
        return
    count = 12 if bench.quick else evaluate.ASKED
    bench.say(f"{count} held-out questions of each of {len(evaluate.RIGHT)} tasks")
    for task, right, asked, mistakes in evaluate.accuracy(count, backend=bench.backend.name):
        least = evaluate.least_right(task, asked)
        figure = evaluate.RIGHT[task] / evaluate.ASKED
        yield _row(
            bench, f"parity/task/{task}", f"{task}: exact match of {asked} held-out questions",
            {"accuracy": right / asked, "right": right, "asked": asked},
            {">=right": least},
            f"known score {figure:.1%} of {evaluate.ASKED}, less three sigma" + "".join(f"; {m}" for m in mistakes[:1]),
            model="v4-nano", numerics="fast", asked=asked,
        )  # fmt: skip


STAGES: tuple[Stage, ...] = (
    Stage("parity/op", ops, 25, 120),
    Stage("parity/golden", golden, 25, 120),
    Stage("parity/layer", layer, 8, 60),
    Stage("parity/model", model, 30, 180),
    Stage("parity/calibration", calibrate, 18, 120),
    Stage("parity/invariance", invariance, 12, 60),
    Stage("parity/task", tasks, 12, 300),
    onnx_witness.STAGE,
)
