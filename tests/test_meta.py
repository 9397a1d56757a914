"""The references without values: a decode step that reads nothing on the host, and gradients that reach every weight."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from v4sdk import ops as o
from v4sdk.backend import Backend
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT, FAST, REFERENCE, KVFormat, Numerics
from v4sdk.ops.batch import Batch
from v4sdk.ops.compressor import index_scores
from v4sdk.ops.op import OpTable
from v4sdk.ops.rows import load_index
from v4sdk.tensors import expected_tensors
from v4sdk.weights import ExpertWeights, Weight, WeightSource, stack
from v4sdk_bench.parity.golden import KV_ROUNDED, Golden
from v4sdk_bench.parity.tiny import TINY, draw

PROMPT = random.Random(1).choices(range(128), k=131)
GOLDEN = Path(__file__).parent / "golden"
STEPS = [
    ("tiny-fp32", EXACT, "float32"),
    ("tiny-quant", REFERENCE, "native"),
    ("tiny-quant", FAST, "native"),
    ("tiny-quant", FAST, "bf16"),
]


def packed(role: str, experts: ExpertWeights) -> ExpertWeights:
    """Keep only stacks, so experts can be chosen without reading their ids."""
    return ExpertWeights(packed=(stack(experts.w1), stack(experts.w2), stack(experts.w3)))


class Seen(OpTable):
    """The references, and the names of those a model asked for."""

    def __init__(self) -> None:
        super().__init__({})
        self.names: set[str] = set()

    def __getitem__(self, op: Any) -> Any:
        self.names.add(op.name)
        return super().__getitem__(op)


def decode_step(
    golden: Golden, numerics: Numerics, fmt: KVFormat, table: OpTable, mode: Any = None
) -> tuple[Tensor, Tensor]:
    """Prefill two sequences and run one decode step of both, sampling included; fake tensors where a mode is given."""
    tensors = golden.tensors if mode is None else {n: mode.from_tensor(t) for n, t in golden.tensors.items()}
    binder = Binder(golden.config, WeightSource(tensors), prepare_experts=packed)
    model, kv = V4Model(binder, numerics, table), KVCache(golden.config, fmt)
    rows = [kv.allocate(), kv.allocate()]
    ids, starts = PROMPT, [130, 17]
    if mode is None:
        model.forward(kv.batch(rows, [ids[:n] for n in starts], [0, 0]), kv)
    batch = kv.batch(rows, [[ids[n]] for n in starts], starts)
    settings = (torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.zeros(2), torch.full((2,), 0.5))
    if mode is not None:
        # values made under the mode are remembered; a step's arguments must not be
        batch = Batch(**{n: forget(mode, v) for n, v in vars(batch).items()})
        settings = tuple(forget(mode, v) for v in settings)
    logits = model.logits(model.forward(batch, kv))
    token = table[o.sample](logits, None, settings[1], *settings, 4)[0]
    table[o.feed](token, batch.token_ids, batch.positions)
    return logits, token


def forget(mode: Any, value: Any) -> Any:
    return (
        mode.from_tensor(torch.empty_like(value, device="meta").to("cpu"))
        if isinstance(value, Tensor)
        else value
    )


@pytest.mark.parametrize(("name", "numerics", "fmt"), STEPS, ids=lambda v: getattr(v, "name", v))
def test_decode_step_reads_no_value_on_the_host(name: str, numerics: Numerics, fmt: KVFormat) -> None:
    golden = Golden.load(GOLDEN / name)
    table = Seen()
    with torch.no_grad(), FakeTensorMode() as mode:
        logits, token = decode_step(golden, numerics, fmt, table, mode)
    # `linear` serves the MTP block, and the others as a part
    assert table.names == set(o.OPS) - {"linear"}
    assert logits.shape == (2, golden.config.vocab_size)
    assert logits.dtype == torch.float32
    assert token.shape == (2,)


@pytest.mark.parametrize(("name", "numerics", "fmt"), STEPS[:2], ids=lambda v: getattr(v, "name", v))
def test_packed_experts_compute_what_mapped_ones_do(name: str, numerics: Numerics, fmt: KVFormat) -> None:
    golden = Golden.load(GOLDEN / name)
    with torch.no_grad():
        found, _ = decode_step(golden, numerics, fmt, OpTable({}))
        model, kv = golden.model(numerics), KVCache(golden.config, fmt)
        rows = [kv.allocate(), kv.allocate()]
        ids, starts = PROMPT, [130, 17]
        model.forward(kv.batch(rows, [ids[:n] for n in starts], [0, 0]), kv)
        want = model.logits(model.forward(kv.batch(rows, [[ids[n]] for n in starts], starts), kv))
    if numerics is EXACT:
        assert torch.allclose(found, want, atol=1e-5)
    else:
        # summation order may move a value across a rounding
        kl = F.kl_div(found.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean")
        assert float(kl) < 0.02


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_chosen_experts_are_read_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(importlib.import_module("v4sdk.ops.moe"), "DEQUANT_LIMIT_BYTES", limit)
    golden = Golden.load(GOLDEN / "tiny-quant")
    experts = WeightSource(golden.tensors).experts("layers.3.ffn", golden.config.n_routed_experts)
    u = torch.randn(9, golden.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[t % 4, (t + 1) % 4] for t in range(9)], dtype=torch.int32)
    weights = torch.linspace(0.1, 1, 18).view(9, 2)
    want = o.routed_experts(u, ids, weights, experts, 1.0, EXACT)
    assert torch.allclose(o.routed_experts(u, ids, weights, packed("", experts), 1.0, EXACT), want, atol=1e-5)
    # an expert listed twice contributes twice
    twice = o.routed_experts(u, ids[:, :1].expand(-1, 2), weights, packed("", experts), 1.0, EXACT)
    assert torch.allclose(
        twice, o.routed_experts(u, ids[:, :1].expand(-1, 2), weights, experts, 1.0, EXACT), atol=1e-5
    )


def test_no_more_than_the_limit_of_chosen_experts_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden.load(GOLDEN / "tiny-quant")
    experts = WeightSource(golden.tensors).experts("layers.3.ffn", golden.config.n_routed_experts)
    u = torch.randn(3, golden.config.hidden_size, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.full((3, 2), 0.5)
    want = o.routed_experts(u, ids, weights, experts, 1.0, EXACT)
    # one row of the widest matrix, for both choices of a token
    limit = 2 * 4 * max(golden.config.hidden_size, golden.config.moe_intermediate_size)
    for module in ("weights", "ops.moe"):
        monkeypatch.setattr(importlib.import_module(f"v4sdk.{module}"), "DEQUANT_LIMIT_BYTES", limit)
    sizes, whole = list[int](), Weight.dequantize

    def noted(self: Weight, first: int = 0, last: int | None = None) -> Tensor:
        values = whole(self, first, last)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr(Weight, "dequantize", noted)
    stacks = packed("", experts)
    assert torch.allclose(
        o.routed_experts(u, ids, weights, replace(stacks, w1=(), w2=(), w3=()), 1.0, EXACT), want, atol=1e-5
    )
    assert 0 < max(sizes) <= limit


def test_the_check_would_notice_a_host_read() -> None:
    golden = Golden.load(GOLDEN / "tiny-fp32")
    with torch.no_grad(), FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(t) for n, t in golden.tensors.items()}
        model, kv = (
            V4Model(Binder(golden.config, WeightSource(tensors)), EXACT),
            KVCache(golden.config, "float32"),
        )
        rows = [kv.allocate(), kv.allocate()]
        batch = kv.batch(rows, [[1], [2]], [130, 17])
        batch = Batch(**{n: forget(mode, v) for n, v in vars(batch).items()})
        # experts that are not packed are found by id on the host
        with pytest.raises(DynamicOutputShapeException):
            model.forward(batch, kv)


class Trained:
    """A tiny model of Parameters, its MTP block, and a loss that involves every weight."""

    config = replace(TINY, num_nextn_predict_layers=1, compress_ratios=(*TINY.compress_ratios, 0))
    ids = random.Random(0).choices(range(TINY.vocab_size), k=144)

    def __init__(self, numerics: Numerics, dtype: torch.dtype = torch.float32) -> None:
        drawn = draw(self.config, 0)
        self.tensors: dict[str, Tensor] = {
            n: torch.nn.Parameter(t.to(dtype)) if t.is_floating_point() else t for n, t in drawn.items()
        }
        self.scored: list[tuple[Tensor, Tensor]] = []
        table = OpTable({"index_topk": self.index_topk})
        self.model = V4Model(Binder(self.config, WeightSource(self.tensors)), numerics, table, with_mtp=True)

    def index_topk(
        self, q: Tensor, w: Tensor, keys: Tensor, batch: Batch, topk: int, ratio: int, n: Numerics
    ) -> Tensor:
        """Keep the scores of all visible entries, as indexer distillation does."""
        entries = batch.num_tokens // ratio
        stored = load_index(keys[batch.block_table[0].long()].flatten(0, 1)[:entries], q.shape[-1])
        visible = torch.arange(entries) < (batch.positions[:, None] + 1) // ratio
        self.scored.append((index_scores(q, w, stored, n), visible))
        return o.index_topk(q.detach(), w.detach(), keys.detach(), batch, topk, ratio, n)

    def loss(self) -> Tensor:
        """Next tokens, next-but-one tokens of the MTP block, and a fixed target for the indexer's distribution."""
        self.scored.clear()
        kv, draft = (
            KVCache(self.config, "float32"),
            KVCache(self.config, "float32", layers=self.config.mtp_layers),
        )
        ids = torch.tensor(self.ids)
        streams = self.model.forward(kv.batch([kv.allocate()], [self.ids], [0]), kv)
        total = F.cross_entropy(self.model.logits(streams[:-1]), ids[1:])
        following = draft.batch([draft.allocate()], [self.ids[1:]], [0])
        ahead = self.model.mtp_forward(streams[:-1], following, draft.layers[0])
        total = total + F.cross_entropy(ahead[:-1], ids[2:])
        for scores, visible in self.scored:
            some = visible.any(-1)
            log_p = scores[some].masked_fill(~visible[some], -1e9).log_softmax(-1)
            target = torch.linspace(1, 2, log_p.shape[-1]) * visible[some]
            total = total - (target / target.sum(-1, keepdim=True) * log_p).sum(-1).mean()
        return total

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradient by tensor name."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        return {n: t.grad for n, t in self.tensors.items() if t.requires_grad}


@pytest.fixture
def _grad() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.mark.usefixtures("_grad")
@pytest.mark.parametrize("numerics", [EXACT, KV_ROUNDED], ids=lambda n: n.name)
def test_gradients_reach_every_weight(numerics: Numerics) -> None:
    found = Trained(numerics).gradients()
    assert set(found) == {s.name for s in expected_tensors(Trained.config) if s.dtypes[0] != "I64"}
    silent = {n for n, g in found.items() if g is None or not bool(g.any())}
    # the bias only moves the choice of experts: it learns by load, not by gradient
    assert silent == {n for n in found if n.endswith("gate.bias")}
    assert all(bool(torch.isfinite(g).all()) for g in found.values() if g is not None)


@pytest.mark.usefixtures("_grad")
def test_gradients_pass_the_roundings_of_rows_straight_through() -> None:
    plain, rounded = Trained(EXACT).gradients(), Trained(KV_ROUNDED).gradients()
    for name in ("layers.1.attn.wkv.weight", "layers.1.attn.compressor.wkv.weight", "layers.2.attn.compressor.ape",
                 "layers.3.attn.indexer.wq_b.weight", "layers.3.attn.indexer.compressor.wkv.weight"):  # fmt: skip
        a, b = plain[name], rounded[name]
        assert a is not None
        assert b is not None
        assert float(F.cosine_similarity(a.flatten(), b.flatten(), 0)) > 0.5, name


@pytest.mark.usefixtures("_grad")
def test_gradients_are_the_slopes_of_the_loss() -> None:
    trained = Trained(replace(EXACT, float64=True), torch.float64)
    gradients = trained.gradients()
    random_direction = torch.Generator().manual_seed(1)
    for part in (
        "hc_attn_fn",
        "compressor.wkv",
        "indexer",
        "experts",
        "gate.weight",
        "attn_sink",
        "wo_a",
        "mtp.0",
    ):
        names = [n for n, g in gradients.items() if part in n and g is not None]
        move = {n: torch.randn(trained.tensors[n].shape, generator=random_direction).double() for n in names}
        slope = sum(float((g * move[n]).sum()) for n in names if (g := gradients[n]) is not None)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                for n in names:
                    trained.tensors[n] += step * move[n]
                losses.append(float(trained.loss()))
                for n in names:
                    trained.tensors[n] -= step * move[n]
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=0.02, abs=1e-3), part


def test_experts_are_stacked_on_any_device_but_the_cpu() -> None:
    class Elsewhere(Backend):
        name = "elsewhere"

        @property
        def device(self) -> torch.device:
            return torch.device("meta")

        def unavailable(self) -> str | None:
            return None

    mapped = ExpertWeights(*(tuple(Weight(torch.zeros(4, 8)) for _ in range(3)) for _ in range(3)))
    packed = Elsewhere().prepare_experts("layers.0.ffn.experts", mapped).packed
    assert packed is not None
    assert packed[0].data.shape == (3, 4, 8)
    assert packed[0].data.device.type == "meta"
