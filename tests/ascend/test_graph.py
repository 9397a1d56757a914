"""The recorded decode step: first run as it is, then captured, then replayed; and on without a graph where it cannot be."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from ascend.conftest import SOCS, StandIn

RecordedStep = importlib.import_module("v4sdk_ascend.graph").RecordedStep
seconds = importlib.import_module("v4sdk_ascend.identity").seconds


class FakeGraph:
    """Keeps what ran during its capture and runs it again on replay, as a device would."""

    def __init__(self) -> None:
        self.captured: list[Any] = []

    def replay(self) -> None:
        for work in self.captured:
            work()


class FakeDevices:
    """`torch.npu` as far as a recorded step asks it."""

    NPUGraph = FakeGraph

    def __init__(self) -> None:
        self.capturing: FakeGraph | None = None
        self.stream = "usual"

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    @contextmanager
    def graph(self, graph: FakeGraph, pool: Any) -> Iterator[None]:
        assert pool == "pool"
        self.capturing, self.stream = graph, "capture"
        try:
            yield
        except RuntimeError:
            # ending a broken capture fails too, and the vendor's own cleaning up is then skipped
            self.capturing = None
            raise
        self.capturing, self.stream = None, "usual"


class Device:
    """A step that only does its work when it is not being captured."""

    def __init__(self, refuses: bool = False) -> None:
        self.devices = FakeDevices()
        self.done = 0
        self.python_calls = 0
        self._refuses = refuses

    def step(self) -> None:
        self.python_calls += 1
        if self.devices.capturing is None:
            self._work()
            return
        if self._refuses:
            raise RuntimeError("the current stream is capturing, synchronize is not permitted\nmore lines")
        self.devices.capturing.captured.append(self._work)

    def _work(self) -> None:
        self.done += 1


def test_every_call_does_the_work_once_and_python_runs_it_twice() -> None:
    device = Device()
    recorded = RecordedStep(device.step, device.devices, "pool")
    for n in range(1, 6):
        recorded()
        assert device.done == n
    assert device.python_calls == 2
    assert recorded.graph is not None
    assert recorded.reason is None


def test_a_step_that_cannot_be_captured_goes_on_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(refuses=True)
    recorded = RecordedStep(device.step, device.devices, "pool")
    for n in range(1, 5):
        recorded()
        assert device.done == n
    assert recorded.graph is None
    assert recorded.reason == "the current stream is capturing, synchronize is not permitted"
    assert device.devices.stream == "usual", "what follows must not run on the stream of a failed capture"
    assert caplog.text.count("not captured") == 1


def test_the_clock_takes_the_median_of_events() -> None:
    milliseconds = iter((5.0, 1.0, 3.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return next(milliseconds)

    devices = type("Devices", (), {"Event": Event})
    assert seconds(devices, lambda: None, rounds=3) == pytest.approx(3e-3)


def test_the_wheel_has_what_a_recorded_step_calls(stand_in: StandIn) -> None:
    found = stand_in.facts(SOCS["910B"], "graph_names.py")
    assert found["missing"] == []
    assert {"npu_graph", "pool"} <= set(found["graph"])
    assert found["graph_members"] == ["replay", "reset", "pool"]
    assert found["event"] == ["record", "synchronize", "elapsed_time"]
    assert found["properties"] == ["uuid", "name", "total_memory"]
    assert found["cann"]
