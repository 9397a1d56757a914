"""Indices that would be silent corruption on a GPU are refused by name where checks are asked for."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from v4sdk.backend import kernel
from v4sdk.ops import OPS

DEBUG_VARIABLE = importlib.import_module("v4sdk_cuda.debug").DEBUG_VARIABLE
IndexOutOfRange = importlib.import_module("v4sdk_cuda.debug").IndexOutOfRange
checked = importlib.import_module("v4sdk_cuda.debug").checked
is_debugging = importlib.import_module("v4sdk_cuda.debug").is_debugging

CPU = torch.device("cpu")


def guarded(op: str, label: str) -> tuple[Any, dict[str, Any]]:
    """An op's reference behind its checks, and the arguments of one of its cases."""
    inputs = OPS[op].inputs
    assert inputs is not None
    args = next(case for case in inputs() if case.label == label).make(CPU)

    def function(*given: Any, **named: Any) -> Any:
        return OPS[op](*given, **named)

    function.__signature__ = OPS[op].signature  # type: ignore[attr-defined]
    return checked([kernel(OPS[op], function)])[0].function, args


def change(args: dict[str, Any], name: str, value: int) -> None:
    """Put a wrong index into an argument, or into a field of its batch."""
    if name in args:
        args[name] = args[name].clone()
        args[name].view(-1)[1] = value
    else:
        wrong = getattr(args["batch"], name).clone()
        wrong.view(-1)[1] = value
        args["batch"] = replace(args["batch"], **{name: wrong})


@pytest.mark.parametrize(
    ("op", "label", "name", "value", "said"),
    [
        (
            "embed",
            "tiny-decode-fast",
            "token_ids",
            320,
            r"token id 320 at place 1 of \[3\], expected 0 to 319",
        ),
        ("embed", "tiny-decode-fast", "token_ids", -1, "token id -1"),
        ("route_hash", "tiny-decode-fast", "token_ids", 999, "token id 999"),
        ("routed_experts", "packed-tiny-decode-fast", "ids", 4, "expert 4 at place 1 .* expected 0 to 3"),
        ("sparse_attn", "csa-tiny-decode-fast", "picks", 1 << 20, "entry 1048576"),
        ("sparse_attn", "csa-tiny-decode-fast", "block_table", 40, "page 40"),
        ("kv_project_store", "tiny-decode-fast", "slots", 3, "slot 3 at place 1 .* expected 0 to 2"),
        ("compress", "csa-tiny-decode-fast", "slots", -1, "slot -1"),
        ("index_topk", "tiny-decode-fast", "block_table", -2, "page -2"),
    ],
)
def test_a_wrong_index_is_named(op: str, label: str, name: str, value: int, said: str) -> None:
    function, args = guarded(op, label)
    function(**args)
    change(args, name, value)
    with pytest.raises(IndexOutOfRange, match=f"op `{op}` got {said}"):
        function(**args)


def test_checks_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    assert not is_debugging()
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    assert is_debugging()
    rows = [kernel(OPS["rms_norm"], lambda x, weight, eps, dtype: x)]
    assert checked(rows)[0].function is rows[0].function
