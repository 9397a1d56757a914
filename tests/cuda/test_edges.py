"""Edges that the shared cases leave out: no tokens, many sequences, absent indices, NaN in scratch, float32 scales, strides."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk.config import ModelConfig
from v4sdk.errors import ShapeError
from v4sdk.loading import bundled_folder
from v4sdk.numerics import EXACT, FAST, REFERENCE, Numerics
from v4sdk.ops import OPS, inputs
from v4sdk.ops.batch import Batch
from v4sdk.ops.inputs import CHUNK, DECODE, TINY, Draw, Geometry, Layout, Make
from v4sdk.ops.op import Case
from v4sdk.quant import ue8m0_value
from v4sdk.testing.arguments import clone, is_bit_equal, map_tensors, tensors
from v4sdk.testing.compare import compare, compare_selection, describe, tolerance_for
from v4sdk.testing.conformance import judge_case
from v4sdk.testing.memory import poison, poisoned_memory
from v4sdk.weights import ExpertWeights, Weight, stack

# per kind of arguments: the op, and what makes them
MAKERS: dict[str, tuple[str, Make]] = {
    **{name: (name, getattr(inputs, name)) for name in (
        "embed", "rms_norm", "linear", "logits", "hc_pre", "hc_post", "hc_post_pre", "hc_head", "q_project",
        "kv_project_store", "index_query", "index_topk", "grouped_out", "route", "route_hash", "shared_expert",
    )},
    **{f"compress-{kind}": ("compress", inputs.compress(*how)) for kind, how in (
        ("csa", (4, False)), ("index", (4, True)), ("hca", (128, False)),
    )},
    **{f"sparse_attn-{kind}": ("sparse_attn", inputs.sparse_attn(kind)) for kind in ("swa", "csa", "hca")},
    "routed_experts": ("routed_experts", inputs.routed_experts(True)),
}  # fmt: skip
# arguments with a row per token
ACTIVATIONS = ("x", "y", "u", "h", "q", "kv", "o", "qr", "w", "post", "comb", "weights", "routed")
ROWS = (*ACTIVATIONS, "ids", "token_ids", "rope_table", "picks")
# arguments whose last row belongs to nobody
SCRATCH = ("window", "entries", "state", "keys")
# more sequences than a decode step's tiles have rows, at positions that close blocks of 4 and of 128, and some that do not
MANY = Layout("many", tuple(range(100, 133)), (1,) * 33)
FP8_EXPERTS = replace(TINY, name="fp8-experts", routed="fp8")
# three groups of 64 columns under a scale of their own; the shared geometries have one, released models seven
GROUPS = replace(TINY, name="groups", head_dim=256)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """What a kernel's `unless` is asked about."""
    return ModelConfig.from_folder(bundled_folder())


@pytest.fixture
def judge(cuda: Any, config: ModelConfig) -> Callable[[str, str, dict[str, Any]], None]:
    """Compare one set of arguments with the reference, as the conformance suite does."""

    def run(kind: str, label: str, args: dict[str, Any], apart: float = 0.0) -> None:
        op = served(cuda, kind)
        found = judge_case(OPS[op], Case(label, lambda device: clone(args), "edge"), cuda, config)
        assert found.how == "kernel", found.detail
        assert found.status == "passed" or 0 < found.relative_l2 < apart, found.detail

    return run


def served(cuda: Any, kind: str) -> str:
    """The op of a kind of arguments, which must have a kernel."""
    op = MAKERS[kind][0]
    assert op in {row.op.name for row in cuda.kernels()}, f"`{op}` has no kernel in the backend's table"
    return op


def arguments(
    kind: str, layout: Layout, numerics: Numerics = FAST, geometry: Geometry = TINY
) -> dict[str, Any]:
    """Arguments of one kind, deterministic in all four."""
    label = f"{kind}-{geometry.name}-{layout.name}-{numerics.name}"
    return MAKERS[kind][1](Draw(label, torch.device("cpu")), geometry, numerics, layout)


def of_no_tokens(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with no token and no sequence."""
    none = {
        name: value[:0] if name in ROWS and isinstance(value, Tensor) else value
        for name, value in args.items()
    }
    if "batch" in args:
        b: Batch = args["batch"]
        none["batch"] = Batch(
            b.token_ids[:0],
            b.positions[:0],
            b.cu_seqlens[:1],
            b.slots[:0],
            b.block_table[:0],
            b.seq_ids[:0],
            b.page_tokens,
        )
    return none


@pytest.mark.parametrize("kind", MAKERS)
def test_no_tokens_give_no_rows_and_change_nothing(kind: str, cuda: Any) -> None:
    op = served(cuda, kind)
    function = {row.op.name: row.function for row in cuda.kernels()}[op]
    args = arguments(kind, DECODE)
    like = list(tensors(OPS[op](**clone(args))))
    # `weight` of norms and tables is no row per token, and `weights` of experts is
    given = map_tensors(of_no_tokens(args), cuda.place)
    before = clone(given)
    with poisoned_memory():
        found = list(tensors(function(**given)))
    assert [(t.shape, t.dtype) for t in found] == [((0, *t.shape[1:]), t.dtype) for t in like]
    assert all(is_bit_equal(a, b) for a, b in zip(tensors(given), tensors(before), strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_more_sequences_than_a_decode_tile_has_rows(kind: str, judge: Any) -> None:
    judge(kind, "many", arguments(kind, MANY))


@pytest.mark.parametrize("layout", [DECODE, CHUNK], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "kind", [k for k in MAKERS if k.startswith(("sparse", "compress", "kv_", "index_topk"))]
)
def test_scratch_rows_may_hold_anything(kind: str, layout: Layout, judge: Any) -> None:
    args = arguments(kind, layout)
    for name in SCRATCH:
        if args.get(name) is not None:
            poison(args[name][-1])
    if args.get("picks") is not None:
        # absent picks are the ones that point there
        args["picks"][:, ::2] = -1
        args["picks"][1] = -1
    judge(kind, "scratch", args)


@pytest.mark.parametrize("layout", [DECODE, CHUNK], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "kind", ["sparse_attn-csa", "sparse_attn-hca", "compress-csa", "compress-index", "compress-hca"]
)
def test_absent_pages_are_never_an_address(kind: str, layout: Layout, cuda: Any, interpreter: Any) -> None:
    function = {row.op.name: row.function for row in cuda.kernels()}[served(cuda, kind)]
    args = arguments(kind, layout)
    args["batch"].block_table.fill_(-1)
    before = clone(args)
    function(**args)
    # whatever was written went to the scratch page
    if args.get("entries") is not None:
        assert is_bit_equal(args["entries"][:-1], before["entries"][:-1])


def loud(args: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
    """The same arguments with every group of 64 columns of a KV row four times louder than the one before."""
    width, plain = geometry.head_dim, geometry.head_dim - geometry.rope_dim
    group = torch.arange(width) // 64
    for name in ("kv_norm", "norm"):
        if name in args:
            args[name] = (args[name].float() * 4.0**group).to(args[name].dtype)
    for name in ("window", "entries"):
        if args.get(name) is not None and args[name].dtype == torch.uint8:
            first = plain + 2 * geometry.rope_dim
            args[name][..., first : first + plain // 64] += 2 * torch.arange(plain // 64).to(torch.uint8)
    return args


@pytest.mark.parametrize("layout", [DECODE, CHUNK], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "kind", ["kv_project_store", "compress-csa", "compress-hca", "sparse_attn-csa", "sparse_attn-hca"]
)
def test_rows_may_have_several_scales(kind: str, layout: Layout, judge: Any) -> None:
    # loud columns make sharp choices: where their sums cancel, a rounding shows, though not in the row as a whole
    judge(kind, "groups", loud(arguments(kind, layout, FAST, GROUPS), GROUPS), apart=2**-10)


def test_the_newest_entry_is_seen_at_once(judge: Any) -> None:
    """The entry that a token completes scores best of all, and must be picked by that token."""
    args = arguments("index_topk", MANY, EXACT)
    b, keys = args["batch"], args["keys"]
    args["w"].fill_(1.0)
    for t, position in enumerate(b.positions.tolist()):
        newest = (position + 1) // 4 - 1
        page, row = b.block_table[t, newest // keys.shape[1]], newest % keys.shape[1]
        keys[page, row] = 4.0 * args["q"][t].sum(0)
    judge("index_topk", "newest", args)


def with_float_scales(value: Any) -> Any:
    """Quantised weights with float32 scales that are no powers of two, as Base checkpoints store them."""
    if isinstance(value, Weight) and value.scale is not None:
        g = torch.Generator().manual_seed(zlib.crc32(str(tuple(value.data.shape)).encode()))
        noise = 0.6 + 0.8 * torch.rand(value.scale.shape, generator=g)
        return replace(value, scale=ue8m0_value(value.scale.view(torch.uint8)) * noise)
    if isinstance(value, ExpertWeights):
        w1, w2, w3 = (tuple(map(with_float_scales, ws)) for ws in (value.w1, value.w2, value.w3))
        return ExpertWeights(w1, w2, w3, (stack(w1), stack(w2), stack(w3)))
    return value


@pytest.mark.parametrize("numerics", [FAST, REFERENCE], ids=lambda n: n.name)
@pytest.mark.parametrize("layout", [DECODE, CHUNK], ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        "q_project",
        "kv_project_store",
        "index_query",
        "grouped_out",
        "shared_expert",
        "routed_experts",
    ],
)
def test_scales_of_fp8_weights_may_be_float32(
    kind: str, layout: Layout, numerics: Numerics, judge: Any
) -> None:
    args = arguments(kind, layout, numerics, FP8_EXPERTS)
    # a product scaled afterwards is not bit for bit one of scaled values: BF16 roundings between parts fall either way
    judge(kind, "float-scales", {name: with_float_scales(value) for name, value in args.items()}, apart=2**-9)


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps of NaN between the rows."""
    wide = torch.full(
        (*tensor.shape[:-1], tensor.shape[-1] + 24), 0, dtype=tensor.dtype, device=tensor.device
    )
    poison(wide)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


@pytest.mark.parametrize("layout", [DECODE, CHUNK], ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "embed"])
def test_activations_may_be_views_with_gaps(kind: str, layout: Layout, cuda: Any) -> None:
    op = OPS[served(cuda, kind)]
    function = {row.op.name: row.function for row in cuda.kernels()}[op.name]
    args = arguments(kind, layout)
    expected = list(tensors(op(**clone(args))))
    given = map_tensors(args, cuda.place)
    for name, value in given.items():
        if name in ACTIVATIONS:
            given[name] = spread(value)
    with poisoned_memory():
        result = list(tensors(function(**given)))
    for a, e in zip(result, expected, strict=True):
        choices = op.sensitivity == "selection" and not e.is_floating_point()
        tolerance = tolerance_for(op, e.dtype, args.get("numerics"))
        found = compare_selection(a, e, 0.01) if choices else compare(a, e, tolerance)
        assert found.ok, describe(found)


@pytest.mark.parametrize("numerics", [FAST, REFERENCE], ids=lambda n: n.name)
@pytest.mark.parametrize("layout", [DECODE, CHUNK, MANY], ids=lambda layout: layout.name)
def test_experts_in_single_steps_compute_the_same(layout: Layout, numerics: Numerics, cuda: Any) -> None:
    """What the fused experts are measured against has to do their work, by rows and in buckets."""
    op, run = OPS["routed_experts"], cuda.variants("routed_experts")["unfused"]
    args = arguments("routed_experts", layout, numerics)
    expected = op(**clone(args))
    given = map_tensors(args, cuda.place)
    with poisoned_memory():
        found = compare(run(**given), expected, tolerance_for(op, expected.dtype, numerics))
    assert found.ok, describe(found)


def test_single_steps_are_for_fp4_experts(cuda: Any) -> None:
    args = arguments("routed_experts", DECODE, FAST, FP8_EXPERTS)
    with pytest.raises(ShapeError, match="stacked FP4 matrices and BF16 inputs only"):
        cuda.variants("routed_experts")["unfused"](**args)
    assert not cuda.variants("linear")


@pytest.mark.parametrize("geometry", [TINY, FP8_EXPERTS], ids=lambda g: g.name)
def test_the_last_piece_of_a_prompt_may_be_short(
    geometry: Geometry, judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts go in pieces by the memory between the products; the last one here has a single token."""
    prompt = importlib.import_module("v4sdk_cuda.prompt")
    args = arguments("routed_experts", Layout("pieces", (0,), (37,)), FAST, geometry)
    between = 2 * args["ids"].shape[1] * geometry.intermediate
    monkeypatch.setattr(prompt, "LIMIT_BYTES", 36 * between)
    judge("routed_experts", "pieces", args)
