"""Fixtures every test file may use: reference data beside the repository, poisoned memory, the backend under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent


def shared_dir() -> Path | None:
    """The folder with the official configurations and prompt goldens, which are not part of this repository.

    The environment variable `V4SDK_SHARED`, or `shared` beside the repository; None if there is neither.
    """
    named = os.environ.get("V4SDK_SHARED")
    folder = Path(named) if named else _REPOSITORY.parent / "shared"
    return folder if (folder / "data").is_dir() else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="cpu", help="backend to test (default: cpu)")


@pytest.fixture(scope="session")
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name given with --backend."""
    return str(request.config.getoption("--backend"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data; tests that need it are skipped where it is absent."""
    folder = shared_dir()
    if folder is None:
        pytest.skip("reference data not found: set V4SDK_SHARED to its folder")
    return folder


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN for the length of a test."""
    from v4sdk.testing import poisoned_memory

    with poisoned_memory():
        yield
