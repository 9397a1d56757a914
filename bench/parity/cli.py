"""`v4sdk bench compare` and `v4sdk bench invariances`: parity as commands. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from v4sdk_bench.parity.agreement import Comparison, Text
    from v4sdk_bench.parity.same_tokens import SameTokens
    from v4sdk_bench.parity.sides import Side

_MODEL = click.option("--model", metavar="PATH|ID", help="Checkpoint folder or hub id (default: v4-nano).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")


@click.command(short_help="Put two ways to compute a model beside each other.")
@click.option(
    "--a", "first", default="references:reference", show_default=True, metavar="SIDE",
    help="What is measured against: BACKEND[:NUMERICS[:KV_FORMAT]].",
)  # fmt: skip
@click.option(
    "--b", "second", default="auto:fast", show_default=True, metavar="SIDE", help="What is measured."
)
@_MODEL
@click.option(
    "--prompts", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text, one prompt per line; a line that is a JSON list is token ids. Default: held-out dialogues of v4-nano, random "
    "ids of any other model.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(1), default=32, show_default=True, help="Greedy tokens per prompt."
)
@click.option("--seed", default=0, show_default=True, help="Of random ids.")
@click.option(
    "--tokens-only",
    is_flag=True,
    help="Only the greedy tokens and their rule: for sides as slow as an interpreter.",
)
@_JSON
def compare(
    first: str, second: str, model: str | None, prompts: Path | None, tokens: int, seed: int, tokens_only: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Compare two sides over the same tokens: logits by position, choices, greedy tokens, and a verdict in words.

    A side is a backend, a numerics option and a KV format, for instance auto:reference:native or auto:fast:bf16. The backend
    `references` runs every op's plain definition. Two different backends are also compared in `exact` numerics, where a
    wrong equation cannot hide behind a rounding. Exit code 1 for `different model`, and where the rule for the same tokens
    is broken.
    """
    from v4sdk_bench.parity import agreement as ag
    from v4sdk_bench.parity.metrics import overall
    from v4sdk_bench.parity.same_tokens import same_tokens
    from v4sdk_bench.parity.sides import Side, label

    sides = Side.parse(first), Side.parse(second)
    if tokens_only:
        return _compare_tokens(sides, model, prompts, tokens, seed, as_json)
    with sides[0].load(model) as a, sides[1].load(model) as b:
        text = ag.read_prompts(prompts, a) if prompts else ag.default_text(a, seed=seed)
        same = (a.loaded.backend.name, a.numerics, a.kv_format) == (
            b.loaded.backend.name,
            b.numerics,
            b.kv_format,
        )
        rounded = a.numerics.bf16_activations or b.numerics.bf16_activations or a.kv_format != b.kv_format
        found = ag.compare(
            ag.score(a.loaded, text),
            ag.score(b.loaded, text),
            text,
            a.config,
            same_side=same,
            rounded=rounded,
        )
        asked = None if prompts is None else text.prompts
        written = same_tokens(a, b, asked, tokens, seed)
        names, backends = (label(a), label(b)), (a.loaded.backend, b.loaded.backend)
        is_rule = a.numerics.name == b.numerics.name == "reference"
    equations = (
        _equations(backends, model, text) if rounded and backends[0].name != backends[1].name else None
    )
    verdict = found.verdict if equations is None else overall(found.verdict, equations.verdict)
    broken = is_rule and bool(written.broken)
    if as_json:
        report = _report(names, text, found, written, equations, verdict, is_rule)
        click.echo(json.dumps(report, indent=1))
    else:
        _show(names, text, found, written, equations, verdict, is_rule)
    return int(verdict == "different model" or broken)


def _compare_tokens(
    sides: tuple[Side, Side], model: str | None, prompts: Path | None, tokens: int, seed: int, as_json: bool
) -> int:
    from v4sdk_bench.parity import agreement as ag
    from v4sdk_bench.parity.same_tokens import same_tokens
    from v4sdk_bench.parity.sides import label

    with sides[0].load(model) as a, sides[1].load(model) as b:
        asked = ag.read_prompts(prompts, a).prompts if prompts else None
        written, names = same_tokens(a, b, asked, tokens, seed), (label(a), label(b))
        evidence = b.loaded.backend.evidence
        is_rule = a.numerics.name == b.numerics.name == "reference"
    if as_json:
        about = {**asdict(written), "threshold": written.threshold, "is_rule": is_rule}
        click.echo(
            json.dumps({"a": names[0], "b": names[1], "evidence": evidence, "tokens": about}, indent=1)
        )
    else:
        click.echo(
            f"a     {names[0]}\nb     {names[1]} (evidence: {evidence})\n{_tokens_in_words(written, is_rule)}"
        )
        click.echo(
            f"logits: mean KL {written.kl_mean:.1e}, largest difference {written.logit_difference:.1e}"
        )
    return int(is_rule and bool(written.broken))


def _equations(backends: tuple[Any, Any], model: str | None, text: Text) -> Comparison:
    """Both backends without roundings."""
    from v4sdk_bench.parity import agreement as ag
    from v4sdk_bench.parity.sides import Side

    with Side(backends[0], "exact").load(model) as a, Side(backends[1], "exact").load(model) as b:
        found: Comparison = ag.compare(
            ag.score(a.loaded, text), ag.score(b.loaded, text), text, a.config, rounded=False
        )
        return found


def _report(
    names: tuple[str, str], text: Text, found: Comparison, written: SameTokens, equations: Comparison | None,
    verdict: str, is_rule: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "a": names[0], "b": names[1], "text": text.what, "verdict": verdict, "precision": found.verdict,
        "equations": None if equations is None else {"verdict": equations.verdict, **equations.everywhere.values()},
        "counted": found.counted.values(), "everywhere": found.everywhere.values(),
        "positions": {name: part.values() for name, part in found.buckets.items()},
        "same_experts": found.routes, "same_picks": found.picks, "least": found.worst_choice,
        "tokens": {**asdict(written), "threshold": written.threshold, "is_rule": is_rule},
    }  # fmt: skip


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "positions": ("n", "d"), "max_abs": ("max-abs", ".1e"), "relative_l2": ("rel L2", ".1e"),
    "cosine_min": ("cosine min", ".4f"), "kl_mean": ("KL mean", ".1e"), "kl_p99": ("KL p99", ".1e"),
    "kl_max": ("KL max", ".1e"), "top1": ("top-1", ".2%"), "top5": ("top-5", ".2%"),
}  # fmt: skip


def _show(
    names: tuple[str, str], text: Text, found: Comparison, written: SameTokens, equations: Comparison | None,
    verdict: str, is_rule: bool,
) -> None:  # fmt: skip
    click.echo(f"a     {names[0]}\nb     {names[1]}\ntext  {text.what}\n")
    click.echo("".join(f"{title:>20}" if not i else f"{title:>12}" for i, title in enumerate(
        ("position", *(title for title, _ in _COLUMNS.values())))))  # fmt: skip
    parts = {"what counts": found.counted, "everywhere": found.everywhere, **found.buckets}
    for name, part in parts.items():
        values = part.values()
        click.echo(
            f"{name:>20}" + "".join(f"{format(values[k], how):>12}" for k, (_, how) in _COLUMNS.items())
        )
    click.echo()
    for what, share in (("experts", found.routes), ("picked entries", found.picks)):
        if share is not None:
            click.echo(f"same {what}: {share:.2%} of tokens and layers")
    click.echo(_tokens_in_words(written, is_rule))
    if equations is not None:
        click.echo(
            f"equations, both in exact numerics: {equations.verdict} (relative L2 {equations.everywhere.relative_l2:.1e})"
        )
    click.echo(f"verdict: {verdict}")


def _tokens_in_words(written: SameTokens, is_rule: bool) -> str:
    made = f"greedy tokens: {written.tokens} after {written.prompts} prompts"
    first = written.first
    if first is None:
        told = f"{made}, all the same"
    else:
        told = (
            f"{made}, {written.compared} before the first differences; the clearest after prompt {first.prompt}, token "
            f"{first.at}: {first.b} in place of {first.a}, margin {first.margin:.1e}"
        )
    if not is_rule:
        return told
    share = f"{written.share:.1%} of margins exceed 4 times the logit difference, {written.threshold:.1e}"
    return f"{told}\nthe same tokens: {'no, ' + '; '.join(written.broken) if written.broken else 'yes'} ({share})"


@click.command(short_help="Check what must not change an answer: cutting, batching, saving, forking.")
@_MODEL
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="What to check.")
@click.option(
    "--numerics", type=click.Choice(["exact", "reference", "fast"]), default="fast", show_default=True,
    help="Arithmetic, and with it the limits.",
)  # fmt: skip
@click.option(
    "--kv-format", type=click.Choice(["float32", "bf16", "native"]), help="How cache rows are stored."
)
@click.option("--seed", default=0, show_default=True, help="Of random ids.")
@_JSON
def invariances(
    model: str | None, backend: str, numerics: str, kv_format: str | None, seed: int, as_json: bool
) -> int:
    """Read one text in pairs of ways that must agree, and say how far the logits are apart.

    Prefill and decode, chunks and whole, batch and alone, saved and fresh, fork and original, rewound and fresh, run and
    rerun. Exit code 1 if one is beyond its limit.
    """
    from v4sdk_bench.parity.invariances import check
    from v4sdk_bench.parity.sides import Side

    side = Side(backend, numerics, kv_format)
    found = []
    for one in check(lambda: side.load(model), seed):
        found.append(one)
        if not as_json:
            if len(found) == 1:
                click.echo(f"{'check':18}{'max-abs':>10}{'rel L2':>10}{'KL mean':>10}  verdict")
            a = one.agreement
            numbers = "".join(f"{value:>10.1e}" for value in (a.max_abs, a.relative_l2, a.kl_mean))
            click.echo(f"{one.check.name:18}{numbers}  {one.verdict} ({one.limit.reason})")
    if as_json:
        rows = [
            {"check": f.check.name, "what": f.check.what, "verdict": f.verdict, "holds": f.holds,
             "limit": asdict(f.limit), **f.agreement.values()}
            for f in found
        ]  # fmt: skip
        click.echo(json.dumps({"backend": backend, "numerics": numerics, "checks": rows}, indent=1))
    return int(not all(f.holds for f in found))
