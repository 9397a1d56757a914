"""The recorded decode step: first run as it is, then captured, then replayed; and on without a graph where it cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

RecordedStep = importlib.import_module("v4sdk_cuda.graph").RecordedStep


class FakeGraph:
    """Keeps what ran during its capture and runs it again on replay, as a driver would."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        for work in self.captured:
            work()


class Device:
    """A step that only does its work when it is not being captured."""

    def __init__(self, refuses: bool = False) -> None:
        self.done = 0
        self.python_calls = 0
        self._refuses = refuses

    def step(self) -> None:
        self.python_calls += 1
        if FakeGraph.capturing is None:
            self._work()
            return
        if self._refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        FakeGraph.capturing.captured.append(self._work)

    def _work(self) -> None:
        self.done += 1


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(graph: FakeGraph, pool: Any) -> Iterator[None]:
        assert pool == "pool"
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.usefixtures("_fake")
def test_every_call_does_the_work_once_and_python_runs_it_twice() -> None:
    device = Device()
    recorded = RecordedStep(device.step, "pool")
    for n in range(1, 6):
        recorded()
        assert device.done == n
    assert device.python_calls == 2
    assert recorded.graph is not None
    assert recorded.reason is None


@pytest.mark.usefixtures("_fake")
def test_a_step_that_cannot_be_captured_goes_on_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(refuses=True)
    recorded = RecordedStep(device.step, "pool")
    for n in range(1, 5):
        recorded()
        assert device.done == n
    assert recorded.graph is None
    assert recorded.reason == "operation not permitted when stream is capturing"
    assert "not captured" in caplog.text
