"""Commands that describe: what is installed, what a checkpoint is, what this machine has, whether a backend is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4sdk import plugins
from v4sdk.cli.stream import ProgressLine
from v4sdk.cli.tables import show_table
from v4sdk.errors import V4Error

if TYPE_CHECKING:
    from v4sdk.backend import Backend, Binding, DoctorRow
    from v4sdk.config import ModelConfig
    from v4sdk.testing import CaseResult, Report

_MODEL_HELP = "Checkpoint folder or hub id (default: the bundled demonstration model)."


@click.command()
@click.option("--ops", is_flag=True, help="Also list how each op of the model would run.")
@click.option("--model", metavar="PATH|ID", help=_MODEL_HELP)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def backends(ops: bool, model: str | None, as_json: bool) -> None:
    """List installed backends and whether they can be used here."""
    found = plugins.statuses()
    rows = [
        {
            "name": status.name,
            "state": status.state,
            "reason": status.reason,
            "evidence": status.backend.evidence if status.backend and status.reason is None else None,
            "priority": status.backend.priority if status.backend else None,
            "distribution": status.distribution,
        }
        for status in found
    ]
    bound = {s.name: _bind(s.backend, model) for s in found if ops and s.backend and s.state == "available"}
    if as_json:
        how = {name: {row.op: row.how for row in binding.ops} for name, binding in bound.items()}
        click.echo(json.dumps({"backends": rows} | ({"ops": how} if ops else {})))
        return
    columns = ("backend", "state", "evidence", "from", "reason")
    keys = ("name", "state", "evidence", "distribution", "reason")
    show_table(columns, [["" if row[k] is None else str(row[k]) for k in keys] for row in rows])
    if ops:
        _show_ops(bound)


def _show_ops(bound: dict[str, Binding]) -> None:
    from v4sdk.ops import OPS

    how = {name: {row.op: row for row in binding.ops} for name, binding in bound.items()}
    show_table(
        ("op", *bound),
        [[op, *(_how(how[name][op].how, how[name][op].reason) for name in bound)] for op in OPS],
        "how each op runs",
    )


def _how(how: str, reason: str | None) -> str:
    return how if reason in (None, "no kernel") else f"{how}: {reason}"


def _bind(backend: Backend, model: str | None) -> Binding:
    from v4sdk.backend import EngineConfig, bind

    return bind(backend, _config(model), EngineConfig(capability=backend.capability()))


def _config(model: str | None) -> ModelConfig:
    from v4sdk.config import ModelConfig

    return ModelConfig.from_folder(model if model is not None else _bundled())


def _bundled() -> Path:
    from v4sdk.loading import bundled_folder

    return bundled_folder()


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def info(checkpoint: str | None, revision: str | None, as_json: bool) -> None:
    """Describe CHECKPOINT, a folder, a hub id or a bare config.json, without reading its weights."""
    from v4sdk.hub import resolve
    from v4sdk.info import describe

    progress = ProgressLine()
    path = _bundled() if checkpoint is None else resolve(checkpoint, revision, progress, weights=False)
    progress.clear()
    found = describe(path)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join(found.render()))


@click.command()
@click.option(
    "--backend", metavar="NAME", help="Only this backend, opened as for a run; exit 1 if it cannot be used."
)
@click.option(
    "--device-test",
    is_flag=True,
    help="Run the ops of --backend on its device against their references and keep what was found; exit 1 if one differs.",
)
def doctor(backend: str | None, device_test: bool) -> int:
    """Show what was found on this machine, and what is missing."""
    if device_test:
        if backend is None:
            raise click.UsageError("--device-test wants --backend NAME")
        return _device_test(plugins.select(backend))
    found = plugins.statuses() if backend is None else [plugins.opened(backend)]
    show_table(("subject", "found", "state or way out"), _machine_rows(), "machine")
    for status in found:
        rows = [["usable here", status.reason or "yes", status.hint or status.state]]
        rows += _doctor_rows(status.backend.doctor() if status.backend else ())
        show_table(("subject", "found", "state or way out"), rows, f"backend {status.name}")
    return int(backend is not None and any(status.state != "available" for status in found))


def _doctor_rows(rows: Sequence[DoctorRow], bad: str = "missing") -> list[list[str]]:
    return [[row.subject, row.finding, "ok" if row.ok else row.hint or bad] for row in rows]


def _device_test(backend: Backend) -> int:
    rows = backend.device_test()
    if rows is None:
        raise V4Error(
            f"backend `{backend.name}` has no device test",
            hint=f"v4sdk conformance --backend {backend.name} compares its ops with their references",
        )
    columns = ("subject", "found", "state or way out")
    show_table(columns, _doctor_rows(rows, "failed"), f"device test of {backend.name}")
    return int(not all(row.ok for row in rows))


def _machine_rows() -> list[list[str]]:
    import platform
    from importlib.util import find_spec

    import torch

    from v4sdk import __version__
    from v4sdk.memory import free_memory, gigabytes

    free = free_memory()
    grammar = find_spec("llguidance") is not None
    bundled = (_bundled() / "config.json").exists()
    return [
        ["v4sdk", __version__, "ok"],
        ["python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "ok"],
        ["torch", torch.__version__, "ok"],
        [
            "memory",
            f"{gigabytes(free.nbytes)} free {free.bound}" if free else "the system does not say",
            "ok",
        ],
        ["bundled model", "present" if bundled else "absent", "ok" if bundled else "reinstall v4sdk"],
        [
            "grammars",
            "llguidance installed" if grammar else "llguidance not installed",
            "ok" if grammar else "pip install 'v4sdk[grammar]' for response_format",
        ],
    ]


@click.command()
@click.option("--backend", default=plugins.AUTO, show_default=True, metavar="NAME", help="Backend to test.")
@click.option(
    "--model", metavar="PATH|ID", help="Ask kernels about this model's sizes (default: the bundled one)."
)
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this op; may be repeated.")
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=click.Choice(["tiny", "odd", "edge", "flash", "pro"]),
    help="Sizes of cases; may be repeated (default: tiny, odd and edge).",
)
@click.option("--json", "receipt", type=click.Path(path_type=Path), help="Write the receipt to this file.")
def conformance(
    backend: str, model: str | None, ops: tuple[str, ...], scales: tuple[str, ...], receipt: Path | None
) -> int:
    """Compare every op of a backend with its reference; exit 1 if one differs."""
    from difflib import get_close_matches

    from v4sdk.ops import OPS
    from v4sdk.testing import run_conformance
    from v4sdk.testing.conformance import DEFAULT_SCALES

    for name in ops:
        if name not in OPS:
            close = get_close_matches(name, OPS, 1)
            raise V4Error(
                f"op `{name}` is unknown, expected one of {', '.join(OPS)}",
                hint=f"did you mean `{close[0]}`?" if close else "v4sdk backends --ops lists them",
            )
    chosen = plugins.select(backend)
    report = run_conformance(chosen, _config(model), scales or DEFAULT_SCALES, ops or None)
    _show_report(report)
    if receipt is not None:
        _write(receipt, report.receipt())
    return int(not report.ok)


def _show_report(report: Report) -> None:
    by_op: dict[str, list[CaseResult]] = {}
    for row in report.results:
        by_op.setdefault(row.op, []).append(row)
    rows = []
    for op, results in by_op.items():
        worst = max(r.worst for r in results)
        bad = [r for r in results if r.status != "passed"]
        status = bad[0].status if bad else "passed"
        rows.append([op, results[0].how, results[0].evidence, str(len(results)), f"{worst:.2g}", status])
    show_table(
        ("op", "ran", "evidence", "cases", "error / accepted", "status"), rows, f"backend {report.backend}"
    )
    for row in report.results:
        if row.status != "passed":
            click.echo(f"{row.status}: {row.op}/{row.case}: {row.detail}")
    counts = report.receipt()["counts"]
    click.echo(", ".join(f"{n} {status}" for status, n in counts.items()))


def _write(path: Path, receipt: dict[str, Any]) -> None:
    # NaN and infinity are not JSON: what could not be measured is null
    clean = json.loads(json.dumps(receipt), parse_constant=lambda _: None)
    try:
        path.write_text(json.dumps(clean, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise V4Error(
            f"`{path}` cannot be written: {exc.strerror}", hint="name another file with --json"
        ) from None
