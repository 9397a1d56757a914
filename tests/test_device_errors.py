"""What a device reports becomes one line and a hint, and the sequence stands where it stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from v4sdk import Session
from v4sdk import ops as o
from v4sdk.backend import MemoryInfo
from v4sdk.device_errors import DeviceFailed, translated
from v4sdk.errors import MemoryRefused
from v4sdk.plugins import select

FULL = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8 GiB\nmore lines"


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError(FULL)


def failed() -> Exception:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore lines")


def test_a_full_device_says_what_was_asked_what_is_free_and_what_to_shrink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = select("cpu")
    monkeypatch.setattr(type(backend), "memory", lambda self: MemoryInfo(250_000_000, 8_000_000_000))
    with pytest.raises(MemoryRefused) as caught, translated(backend):
        raise out_of_memory()
    assert caught.value.message == "backend `cpu` needs 1.50 GiB more, 0.25 of 8.00 GB are free"
    assert "prefill_chunk" in (caught.value.hint or "")


@pytest.mark.skipif(
    not hasattr(torch, "AcceleratorError"), reason="torch before 2.8 has no error of its own for a device"
)
def test_an_error_of_the_device_is_its_first_line() -> None:
    with pytest.raises(DeviceFailed) as caught, translated(select("cpu")):
        raise failed()
    assert (
        caught.value.message == "backend `cpu` failed: CUDA error: an illegal memory access was encountered"
    )


def test_a_plain_error_that_the_backend_knows_as_its_devices_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = select("cpu")
    monkeypatch.setattr(
        type(backend), "failure", lambda self, error: "stream 3 died" if "stream" in str(error) else None
    )
    with pytest.raises(DeviceFailed, match="backend `cpu` failed: stream 3 died"), translated(backend):
        raise RuntimeError("the stream is lost\nmore lines")
    with pytest.raises(RuntimeError, match="shape"), translated(backend):
        raise RuntimeError("shape '[2]' is invalid")


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), translated(select("cpu")):
        raise ZeroDivisionError


def _once(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    errors = [error]

    def run(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*args, **kwargs)

    return run


def test_a_session_goes_on_after_a_refusal_in_prefill() -> None:
    with Session.load(backend="cpu") as session:
        want = session.logits([5, 6, 7])
        assert session._engine is not None
        table = session._engine.model.ops
        table.set(o.q_project.name, _once(table[o.q_project], out_of_memory()))
        with pytest.raises(MemoryRefused, match=r"needs 1\.50 GiB more"):
            session.logits([5, 6, 7])
        assert torch.equal(session.logits([5, 6, 7]), want)
