"""Measurements around v4sdk: parity, speed, claims and the report of them; the synthetic tasks of the bundled model."""

from __future__ import annotations

from typing import Any

from v4sdk.hookspecs import hookimpl


@hookimpl
def v4sdk_commands(cli: Any) -> None:
    """Add `v4sdk bench` and `v4sdk export-onnx`."""
    from v4sdk_bench.cli import bench
    from v4sdk_bench.export.cli import export_onnx

    cli.add_command(bench)
    cli.add_command(export_onnx)
