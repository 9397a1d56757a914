"""Tests of a child that stands in for one chip: those of other families are left out, not skipped."""

from __future__ import annotations

import importlib

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers", "families(*names): the families of chips whose documents list what is tested"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests for the chip that the environment names."""
    here = importlib.import_module("v4sdk_ascend.testing.emulators").family()
    others = [
        item for item in items if (mark := item.get_closest_marker("families")) and here not in mark.args
    ]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
