"""The library of kernels: levels, threads, and results that depend on neither threads nor neighbours in a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from v4sdk import Session, plugins
from v4sdk.errors import ConfigError
from v4sdk.numerics import EXACT, FAST, NUMERICS, REFERENCE, Numerics
from v4sdk.ops import OPS, inputs
from v4sdk.ops.batch import make_batch
from v4sdk.ops.inputs import TINY, WIDE, Draw, Geometry, Layout
from v4sdk.ops.op import Case
from v4sdk.presets import V4_FLASH
from v4sdk.testing.arguments import clone, is_bit_equal, readable, tensors
from v4sdk.testing.compare import PACKED, compare, tolerance_for
from v4sdk.testing.conformance import judge_case

BACKEND = plugins.select("cpu")


@pytest.fixture
def library() -> Any:
    found = import_module(type(BACKEND).__module__.rpartition(".")[0] + ".kernels").native_library()
    if found is None:
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    level, threads = found.level, found.threads
    yield found
    found.set_level(level)
    found.set_threads(threads)


def kernels() -> dict[str, Any]:
    return {row.op.name: row.function for row in BACKEND.kernels()}


def outcome(name: str, args: dict[str, Any]) -> list[torch.Tensor]:
    given = clone(args)
    result = kernels()[name](**given)
    return [*tensors(result), *(t for argument in OPS[name].mutates for t in tensors(given[argument]))]


@pytest.mark.parametrize("name", sorted(OPS))
def test_results_do_not_depend_on_threads(library: Any, name: str) -> None:
    cases = [case for case in OPS[name].inputs() if case.scale in ("tiny", "odd")]  # type: ignore[misc]
    for level in library.levels:
        library.set_level(level)
        for case in cases:
            args = case.make(torch.device("cpu"))
            found = []
            for threads in (1, 2, 5):
                library.set_threads(threads)
                found.append(outcome(name, args))
            for other in found[1:]:
                same = [is_bit_equal(a, b) for a, b in zip(found[0], other, strict=True)]
                assert all(same), f"{level}: {case.label}"


def rows_of(value: Any, count: int, size: int) -> Any:
    """The first `size` of `count` rows of everything that has a row per token."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count:
        return value[:size].clone()
    return value


@pytest.mark.parametrize(
    "name",
    ["linear", "rms_norm", "hc_pre", "hc_post_pre", "route", "routed_experts", "shared_expert", "logits"],
)
@pytest.mark.parametrize("size", [1, 2, 7, 31])
def test_a_row_of_a_batch_equals_the_row_in_a_smaller_batch(library: Any, name: str, size: int) -> None:
    """Up to 32 rows, whatever the others are: decode gives an answer the same logits alone and among others."""
    layout = Layout("batch", tuple(range(40, 72)), (1,) * 32)
    make = getattr(inputs, name)
    make = make(False) if name == "routed_experts" else make
    args = make(Draw(f"{name}-{size}", torch.device("cpu")), TINY, FAST, layout)
    few = {key: rows_of(value, 32, size) for key, value in args.items()}
    for level in library.levels:
        library.set_level(level)
        whole, part = outcome(name, args), outcome(name, few)
        assert all(is_bit_equal(a[:size], b) for a, b in zip(whole, part, strict=True)), level


# per op that works on sequences, or lies between those that do: its arguments
MAKERS = {
    "q_project": inputs.q_project,
    "kv_project_store": inputs.kv_project_store,
    "compress-csa": inputs.compress(4, False),
    "compress-index": inputs.compress(4, True),
    "compress-hca": inputs.compress(128, False),
    "index_query": inputs.index_query,
    "index_topk": inputs.index_topk,
    "sparse_attn-swa": inputs.sparse_attn("swa"),
    "sparse_attn-csa": inputs.sparse_attn("csa"),
    "sparse_attn-hca": inputs.sparse_attn("hca"),
    "grouped_out": inputs.grouped_out,
}
GEOMETRIES = (
    TINY,
    WIDE,
    replace(TINY, name="tiny-203", hidden=203),
    replace(WIDE, name="wide-203", hidden=203),
)
# a row per token
ROWS = ("x", "qr", "q", "w", "o", "rope_table", "picks")


def of_sequences(args: dict[str, Any], layout: Layout, first: int, last: int) -> dict[str, Any]:
    """The arguments of some of the sequences; caches are those of all."""
    lo, hi = sum(layout.lengths[:first]), sum(layout.lengths[:last])
    part = {key: value[lo:hi] if key in ROWS and value is not None else value for key, value in args.items()}
    if "batch" in args:
        b = args["batch"]
        bounds = b.cu_seqlens[first : last + 1] - lo
        part["batch"] = make_batch(
            b.token_ids[lo:hi], b.positions[lo:hi], bounds, b.slots[first:last], b.block_table[first:last], b.page_tokens
        )  # fmt: skip
    if "kv" in args:
        rings, fresh = of_rings(args["kv"], layout, args["window"].shape[1])
        part["kv"] = torch.cat((*rings[first:last], fresh[lo:hi]))
    return part


def of_rings(kv: torch.Tensor, layout: Layout, window: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """KV rows of a step: of a prompt each sequence's ring, then the new rows."""
    count = 0 if max(layout.lengths) == 1 else len(layout.lengths)
    return torch.split(kv[: count * window], window) if count else (), kv[count * window :]


def in_pieces(name: str, args: dict[str, Any], layout: Layout, size: int) -> list[torch.Tensor]:
    """What an op gives for so many sequences at a time, put together; then what it has written to."""
    found: list[list[torch.Tensor]] = []
    rings: list[torch.Tensor] = []
    bounds = [*range(0, len(layout.lengths), size), len(layout.lengths)]
    for first, last in pairwise(bounds):
        result = list(tensors(kernels()[name](**of_sequences(args, layout, first, last))))
        if name == "kv_project_store":
            some = Layout("", layout.starts[first:last], layout.lengths[first:last])
            old, new = of_rings(result[0], some, args["window"].shape[1])
            rings += old
            result = [new]
        found.append(result)
    joined = [torch.cat(parts) for parts in zip(*found, strict=True)]
    if rings:
        joined = [torch.cat((*rings, *joined))]
    return joined + written(name, args)


def written(name: str, args: dict[str, Any]) -> list[torch.Tensor]:
    """What an op has written to, but for the last row, which belongs to nobody."""
    return [t[:-1] for argument in OPS[name].mutates for t in tensors(args[argument])]


def arguments(kind: str, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    return MAKERS[kind](Draw(f"{kind}-{g.name}-{n.name}-{layout.name}", torch.device("cpu")), g, n, layout)


DECODE = Layout("decode", (*range(100, 130), 255, 300), (1,) * 32)
FEW = Layout("few", (100, 0, 253), (9, 3, 20))
MANY = Layout("many", (100, 0, 253), (40, 3, 29))


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("g", GEOMETRIES, ids=lambda g: g.name)
def test_a_sequence_of_a_batch_equals_the_sequence_alone(library: Any, kind: str, g: Geometry) -> None:
    """Decode steps and short prompts, bit for bit."""
    name = kind.partition("-")[0]
    library.set_threads(1)  # many small calls; that threads change nothing is tested above
    for n in (EXACT, REFERENCE, FAST):
        for layout, sizes in ((DECODE, (1, 7)), (FEW, (1, 2))):
            args = arguments(kind, g, n, layout)
            for level in library.levels:
                library.set_level(level)
                whole = in_pieces(name, clone(args), layout, len(layout.lengths))
                for size in sizes:
                    found = in_pieces(name, clone(args), layout, size)
                    same = [is_bit_equal(a, b) for a, b in zip(found, whole, strict=True)]
                    assert all(same), f"{level}, {n.name}, {layout.name}, {size} at a time"


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("g", GEOMETRIES, ids=lambda g: g.name)
def test_a_long_prompt_of_a_batch_equals_the_prompt_alone(library: Any, kind: str, g: Geometry) -> None:
    """Bit for bit where no matrix is multiplied, else within the op's tolerance: more than 32 rows may meet it in another way."""
    name = kind.partition("-")[0]
    op = OPS[name]
    for n in (EXACT, REFERENCE, FAST):
        args = arguments(kind, g, n, MANY)
        for level in library.levels:
            library.set_level(level)
            alone, whole = clone(args), clone(args)
            found, expected = in_pieces(name, alone, MANY, 1), in_pieces(name, whole, MANY, len(MANY.lengths))
            if name in ("sparse_attn", "index_topk"):
                assert all(is_bit_equal(a, b) for a, b in zip(found, expected, strict=True)), (
                    f"{level}, {n.name}"
                )
                continue
            results = len(found) - len(written(name, args))
            pairs = [
                (a, b, tolerance_for(op, b.dtype, n)) for a, b in zip(found[:results], expected, strict=False)
            ]
            for argument in op.mutates:
                a, b = (readable(name, argument, side[argument], side) for side in (alone, whole))
                packed = args[argument].dtype == torch.uint8
                pairs.append((a, b, PACKED if packed else tolerance_for(op, b.dtype)))
            for a, b, tolerance in pairs:
                difference = compare(a, b, tolerance)
                assert difference.ok, f"{level}, {n.name}: {difference}"


@pytest.mark.parametrize("g", [TINY, WIDE], ids=lambda g: g.name)
@pytest.mark.parametrize(
    ("starts", "lengths"), [((300,), (20,)), ((300, 0), (20, 3)), ((0, 300), (3, 20)), ((300, 41), (12, 12))]
)
def test_entries_decoded_once_or_one_by_one_give_the_same(
    library: Any, g: Geometry, starts: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    """Places for picks that stay empty make decoding all entries ahead worth it, and change nothing else.

    Of two sequences one may see no entry, whichever comes first.
    """
    layout = Layout("expanded", starts, lengths)
    args = arguments("sparse_attn-csa", replace(g, topk=3), FAST, layout)
    seen = [(start + length) // args["ratio"] for start, length in zip(starts, lengths, strict=True)]
    picks = args["picks"]
    wider = torch.nn.functional.pad(picks, (0, 32), value=-1)

    def one_by_one(width: int) -> int:
        return sum(length * min(width, n) for length, n in zip(lengths, seen, strict=True))

    assert one_by_one(picks.shape[1]) < sum(seen) <= one_by_one(wider.shape[1])
    expected = OPS["sparse_attn"](**args)
    for level in library.levels:
        library.set_level(level)
        for threads in (1, 3):
            library.set_threads(threads)
            single, once = outcome("sparse_attn", args)[0], outcome("sparse_attn", args | {"picks": wider})[0]
            assert is_bit_equal(single, once), f"{level}, {threads} threads"
            difference = compare(once, expected, tolerance_for(OPS["sparse_attn"], once.dtype, FAST))
            assert difference.ok, f"{level}: {difference}"


@pytest.mark.parametrize("numerics", sorted(NUMERICS))
def test_experts_of_more_tokens_than_are_worked_on_together(library: Any, numerics: str) -> None:
    layout = Layout("long", (0, 7), (1025, 1100))

    def make(device: torch.device) -> dict[str, Any]:
        return inputs.routed_experts(False)(Draw("long", device), TINY, NUMERICS[numerics], layout)

    for level in library.levels:
        library.set_level(level)
        library.set_threads(3)
        row = judge_case(OPS["routed_experts"], Case("long", make), BACKEND, V4_FLASH)
        assert (row.status, row.how) == ("passed", "kernel"), f"{level}: {row.detail}"


def test_a_level_that_is_not_there_is_refused(library: Any) -> None:
    with pytest.raises(ConfigError, match=r"instruction level `sse9` is not available, this processor has"):
        library.set_level("sse9")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("V4SDK_CPU_LEVEL", "sse9", "instruction level `sse9` is not available"),
        ("V4SDK_CPU_THREADS", "0", "expected a number of threads from 1 to 1024"),
        ("V4SDK_CPU_THREADS", "many", "V4SDK_CPU_THREADS is `many`"),
        ("V4SDK_CPU_WEIGHTS", "sometimes", "expected auto, mapped or resident"),
        ("V4SDK_CPU_AFFINITY", "0-", "expected processors such as"),
        ("V4SDK_CPU_AFFINITY", "4000", "names processor 4000"),
    ],
)
def test_bad_settings_are_one_line(library: Any, variable: str, value: str, text: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "v4sdk", "run", "hello"],
        capture_output=True,
        text=True,
        env=os.environ | {variable: value},
    )
    assert found.returncode != 0
    assert text in found.stderr
    assert "Traceback" not in found.stderr


def test_another_version_s_arguments_are_refused(library: Any) -> None:
    import ctypes

    with pytest.raises(TypeError, match="it is of another version"):
        library.run("rms_norm", (ctypes.c_char * 3)())  # type: ignore[arg-type]


def test_a_closed_session_leaves_no_thread(library: Any) -> None:
    library.set_threads(3)
    library.rest()
    before = len(list(Path("/proc/self/task").iterdir()))
    with Session.load(backend="cpu") as session:
        session.generate("copy: 'red'")
        assert len(list(Path("/proc/self/task").iterdir())) > before
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_without_a_library_the_references_answer(tmp_path: Path) -> None:
    """As after an installation without a compiler."""
    missing = os.environ | {"V4SDK_CPU_LIBRARY": str(tmp_path / "none.so")}
    found = subprocess.run(
        [sys.executable, "-m", "v4sdk", "run", "What is 3 + 4?"], capture_output=True, text=True, env=missing
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "7"
    assert found.stderr.count("run the reference on cpu") == 1
    doctor = subprocess.run(
        [sys.executable, "-m", "v4sdk", "doctor"], capture_output=True, text=True, env=missing
    )
    assert "not built" in doctor.stdout


def test_a_team_of_another_size_for_a_while(library: Any) -> None:
    before = library.threads
    with plugins.select("cpu").with_threads(before + 2):
        assert library.threads == before + 2
    assert library.threads == before
