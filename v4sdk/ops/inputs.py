"""Arguments for every op, from tiny to the released shapes: the one generator that tests, conformance and benchmarks use."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4sdk.config import RopeSpec
from v4sdk.numerics import EXACT, FAST, REFERENCE, Numerics
from v4sdk.ops.batch import Batch, make_batch
from v4sdk.ops.op import Case
from v4sdk.ops.precision import activation_dtype
from v4sdk.ops.rope import inv_freq, rope_table
from v4sdk.ops.rows import store_index, store_kv
from v4sdk.quant import q4_round, q8_round, ue8m0_ceil
from v4sdk.weights import Encoding, ExpertWeights, Weight, stack

_EPS = 1e-6
_ROPE = RopeSpec(160000.0, 16.0, 65536)
_TILE = 128


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model, by the dimension letters of the op docstrings, and how its weights are stored."""

    name: str
    hidden: int
    heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    o_rank: int
    groups: int
    streams: int
    experts: int
    chosen: int
    intermediate: int
    vocab: int
    index_heads: int
    index_dim: int
    topk: int
    window: int
    dense: Encoding = "fp8"
    routed: Encoding = "fp4"


TINY = Geometry("tiny", 256, 4, 128, 64, 128, 128, 2, 4, 4, 2, 128, 320, 4, 64, 8, 16)
ODD = Geometry("odd", 192, 6, 96, 32, 96, 48, 3, 3, 5, 3, 96, 131, 3, 32, 5, 12)
FLOAT = replace(TINY, name="float", dense="float", routed="float")
# as many heads as released models have side by side where kernels take sixteen of them at a time
WIDE = replace(TINY, name="wide", heads=32, index_heads=32)
FLASH = Geometry("flash", 4096, 64, 512, 64, 1024, 1024, 8, 4, 256, 6, 2048, 129280, 64, 128, 512, 128)
PRO = Geometry("pro", 7168, 128, 512, 64, 1536, 1024, 16, 4, 384, 6, 3072, 129280, 64, 128, 1024, 128)


class Draw:
    """Random tensors on a device, deterministic in the case's label."""

    def __init__(self, label: str, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal values of standard deviation `scale`."""
        return (torch.randn(*shape, generator=self._generator) * scale).to(self.device, dtype)

    def gain(self, *shape: int) -> Tensor:
        """Norm weights around one, BF16 as stored."""
        return (1 + 0.1 * torch.randn(*shape, generator=self._generator)).to(self.device, torch.bfloat16)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below `high`, int64."""
        return torch.randint(0, high, shape, generator=self._generator).to(self.device)

    def weight(self, encoding: Encoding, rows: int, cols: int) -> Weight:
        """A matrix as a checkpoint stores it, of unit output variance for unit input."""
        if encoding == "float":
            return Weight(self.normal(rows, cols, dtype=torch.bfloat16, scale=cols**-0.5))
        if encoding == "fp4":
            codes = torch.randint(0, 256, (rows, cols // 2), generator=self._generator, dtype=torch.uint8)
            # codes have a root mean square near 2.9
            scale = ue8m0_ceil(torch.full((rows, cols // 32), cols**-0.5 / 5)).to(self.device)
            scale += self.integers(2, *scale.shape).to(torch.uint8)
            return Weight(codes.to(self.device).view(torch.int8), scale, "fp4", (1, 32), True)
        data = self.normal(rows, cols, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn)
        shape = (-(-rows // _TILE), -(-cols // _TILE))
        scale = ue8m0_ceil(torch.full(shape, cols**-0.5 / 100)).to(self.device)
        return Weight(data, scale + self.integers(2, *shape).to(torch.uint8), "fp8", (_TILE, _TILE), True)

    def experts(self, g: Geometry, packed: bool) -> ExpertWeights:
        """The routed experts of one layer; `packed` as a backend lays them out."""
        sizes = ((g.intermediate, g.hidden), (g.hidden, g.intermediate), (g.intermediate, g.hidden))
        w1, w2, w3 = (tuple(self.weight(g.routed, *size) for _ in range(g.experts)) for size in sizes)
        return ExpertWeights(w1, w2, w3, (stack(w1), stack(w2), stack(w3)) if packed else None)


@dataclass(frozen=True)
class Layout:
    """Which tokens a step holds: per sequence its first position and its number of new tokens; and source tokens per page."""

    name: str
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    page_tokens: int = 256

    def batch(self, draw: Draw, vocab: int) -> Batch:
        """The packed step, every sequence on pages and a slot of its own, handed out in reverse."""
        positions = [s + i for s, n in zip(self.starts, self.lengths, strict=True) for i in range(n)]
        bounds = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        counts = [-(-(s + n) // self.page_tokens) for s, n in zip(self.starts, self.lengths, strict=True)]
        free = list(range(sum(counts)))
        tables = [[free.pop() for _ in range(c)] for c in counts]
        width = max(counts)
        table = [t + [-1] * (width - len(t)) for t in tables]
        slots = list(range(len(self.starts)))[::-1]
        ids = draw.integers(vocab, len(positions))
        pos, cu_seqlens, slot, pages = (
            torch.tensor(v, dtype=torch.int32, device=draw.device) for v in (positions, bounds, slots, table)
        )
        return make_batch(ids, pos, cu_seqlens, slot, pages, self.page_tokens)

    @property
    def num_pages(self) -> int:
        """Pages in use, without scratch."""
        return sum(-(-(s + n) // self.page_tokens) for s, n in zip(self.starts, self.lengths, strict=True))


DECODE = Layout("decode", (9, 300, 127), (1, 1, 1))
FIRST = Layout("first", (0,), (1,))
PREFILL = Layout("prefill", (0, 0), (130, 7))
CHUNK = Layout("chunk", (100, 3, 511), (63, 1, 40))
# pages as a run has them by default
LONG_DECODE = Layout("decode-8k", (8191,), (1,), 1024)
LONG_PREFILL = Layout("prefill-8k", (7680,), (512,), 1024)
SMALL_LAYOUTS = (DECODE, FIRST, PREFILL, CHUNK)
LONG_LAYOUTS = (LONG_DECODE, LONG_PREFILL)

Make = Callable[[Draw, Geometry, Numerics, Layout], dict[str, Any]]


def cases(
    make: Make, numerics: tuple[Numerics, ...] = (EXACT, REFERENCE, FAST)
) -> Callable[[], Iterator[Case]]:
    """Spread a maker over geometries, layouts and numerics; many heads and released shapes run in fast numerics only."""

    def generate() -> Iterator[Case]:
        for g in (TINY, ODD, FLOAT):
            for n in numerics if g is not FLOAT else (EXACT,):
                for layout in SMALL_LAYOUTS:
                    yield _case(make, g, n, layout, "tiny" if g is TINY else "odd")
        for layout in SMALL_LAYOUTS:
            yield _case(make, WIDE, numerics[-1], layout, "odd")
        for g in (FLASH, PRO):
            for layout in LONG_LAYOUTS:
                yield _case(make, g, numerics[-1], layout, g.name)

    return generate


def _case(make: Make, g: Geometry, n: Numerics, layout: Layout, scale: str) -> Case:
    label = f"{g.name}-{layout.name}-{n.name}"
    return Case(label, lambda device: make(Draw(label, device), g, n, layout), scale)


def _tokens(layout: Layout) -> int:
    return sum(layout.lengths)


def _hidden(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> Tensor:
    return draw.normal(_tokens(layout), g.hidden, dtype=activation_dtype(n))


def _streams(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> Tensor:
    return draw.normal(_tokens(layout), g.streams, g.hidden, dtype=activation_dtype(n))


def _table(batch: Batch, g: Geometry) -> Tensor:
    return rope_table(batch.positions, inv_freq(_ROPE, g.rope_dim, batch.positions.device))


def _ring(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> Tensor:
    return _kv_rows(draw, g, n, (len(layout.starts) + 1, g.window))


def _kv_rows(draw: Draw, g: Geometry, n: Numerics, shape: tuple[int, ...]) -> Tensor:
    rows = draw.normal(*shape, g.head_dim)
    if not n.q8_kv:
        return rows
    plain = g.head_dim - g.rope_dim
    rows = torch.cat((q8_round(rows[..., :plain], 64), rows[..., plain:].bfloat16().float()), -1)
    return store_kv(rows, torch.empty(0, dtype=torch.uint8), g.rope_dim)


def _index_rows(draw: Draw, g: Geometry, n: Numerics, shape: tuple[int, ...]) -> Tensor:
    keys = draw.normal(*shape, g.index_dim)
    return store_index(q4_round(keys), torch.empty(0, dtype=torch.uint8)) if n.q4_index else keys


def _hyper(draw: Draw, g: Geometry, prefix: str = "") -> dict[str, Any]:
    m = g.streams
    return {
        f"{prefix}fn": draw.normal((2 + m) * m, m * g.hidden, scale=(m * g.hidden) ** -0.5),
        f"{prefix}base": draw.normal((2 + m) * m),
        f"{prefix}scale": draw.normal(3),
    }


def _iterations() -> dict[str, Any]:
    return {"iterations": 20, "norm_eps": _EPS, "hc_eps": _EPS}


def _mixes(draw: Draw, g: Geometry, layout: Layout) -> dict[str, Any]:
    t, m = _tokens(layout), g.streams
    return {"post": draw.normal(t, m).sigmoid() * 2, "comb": torch.softmax(draw.normal(t, m, m), -1)}


def embed(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `embed`."""
    table = draw.normal(g.vocab, g.hidden, dtype=torch.bfloat16)
    ids = draw.integers(g.vocab, _tokens(layout))
    return {"token_ids": ids, "weight": table, "hc_mult": g.streams, "numerics": n}


def rms_norm(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `rms_norm`."""
    x = _hidden(draw, g, n, layout)
    return {"x": x, "weight": draw.gain(g.hidden), "eps": _EPS, "dtype": x.dtype}


def linear(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `linear`."""
    x = _hidden(draw, g, n, layout)
    return {"x": x, "weight": draw.weight(g.dense, g.q_rank, g.hidden), "numerics": n, "dtype": x.dtype}


def logits(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `logits`."""
    return {"h": _hidden(draw, g, n, layout), "head": draw.weight("float", g.vocab, g.hidden)}


def hc_pre(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `hc_pre`."""
    return {"x": _streams(draw, g, n, layout), **_hyper(draw, g), **_iterations()}


def hc_post(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `hc_post`."""
    y, x = _hidden(draw, g, n, layout), _streams(draw, g, n, layout)
    return {"y": y, "x": x, **_mixes(draw, g, layout)}


def hc_post_pre(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `hc_post_pre`."""
    return {
        **hc_post(draw, g, n, layout),
        **_hyper(draw, g),
        "norm_weight": draw.gain(g.hidden),
        **_iterations(),
    }


def hc_head(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `hc_head`."""
    m = g.streams
    fn = draw.normal(m, m * g.hidden, scale=(m * g.hidden) ** -0.5)
    mix = {"fn": fn, "base": draw.normal(m), "scale": draw.normal(1)}
    return {"x": _streams(draw, g, n, layout), **mix, "norm_eps": _EPS, "hc_eps": _EPS}


def q_project(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `q_project`."""
    return {
        "x": _hidden(draw, g, n, layout),
        "wq_a": draw.weight(g.dense, g.q_rank, g.hidden),
        "q_norm": draw.gain(g.q_rank),
        "wq_b": draw.weight(g.dense, g.heads * g.head_dim, g.q_rank),
        "rope_table": _table(layout.batch(draw, g.vocab), g),
        "num_heads": g.heads,
        "eps": _EPS,
        "numerics": n,
    }


def kv_project_store(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `kv_project_store`."""
    batch = layout.batch(draw, g.vocab)
    return {
        "x": _hidden(draw, g, n, layout),
        "wkv": draw.weight(g.dense, g.head_dim, g.hidden),
        "kv_norm": draw.gain(g.head_dim),
        "rope_table": _table(batch, g),
        "batch": batch,
        "window": _ring(draw, g, n, layout),
        "eps": _EPS,
        "numerics": n,
    }


def compress(ratio: int, is_index: bool) -> Make:
    """Arguments of `compress` for one kind of compressor."""

    def make(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
        overlap = ratio == 4
        e = g.index_dim if is_index else g.head_dim
        width, span = (2 * e, 2 * ratio) if overlap else (e, ratio)
        pages = (layout.num_pages + 1, layout.page_tokens // ratio)
        rows = _index_rows(draw, g, n, pages) if is_index else _kv_rows(draw, g, n, pages)
        return {
            "x": _hidden(draw, g, n, layout),
            "wkv": draw.weight("float", width, g.hidden),
            "wgate": draw.weight("float", width, g.hidden),
            "ape": draw.normal(ratio, width),
            "norm": draw.gain(e),
            "inv_freq": inv_freq(_ROPE, g.rope_dim, draw.device),
            "batch": layout.batch(draw, g.vocab),
            "state": draw.normal(len(layout.starts) + 1, span, 2, width),
            "entries": rows,
            "ratio": ratio,
            "is_index": is_index,
            "eps": _EPS,
            "numerics": n,
        }

    return make


def index_query(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `index_query`."""
    x = _hidden(draw, g, n, layout)
    return {
        "x": x,
        "qr": draw.normal(_tokens(layout), g.q_rank, dtype=x.dtype),
        "wq_b": draw.weight(g.dense, g.index_heads * g.index_dim, g.q_rank),
        "weights_proj": draw.weight("float", g.index_heads, g.hidden),
        "rope_table": _table(layout.batch(draw, g.vocab), g),
        "num_heads": g.index_heads,
        "numerics": n,
    }


def index_topk(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `index_topk`."""
    act = activation_dtype(n)
    q = draw.normal(_tokens(layout), g.index_heads, g.index_dim, dtype=act)
    return {
        "q": q4_round(q) if n.q4_index else q,
        "w": draw.normal(_tokens(layout), g.index_heads),
        "keys": _index_rows(draw, g, n, (layout.num_pages + 1, layout.page_tokens // 4)),
        "batch": layout.batch(draw, g.vocab),
        "topk": g.topk,
        "ratio": 4,
        "numerics": n,
    }


def sparse_attn(kind: str) -> Make:
    """Arguments of `sparse_attn` for a window-only (`swa`), picked (`csa`) or fully attended (`hca`) layer."""

    def make(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
        act = activation_dtype(n)
        batch = layout.batch(draw, g.vocab)
        tokens, ratio = _tokens(layout), {"swa": 0, "csa": 4, "hca": 128}[kind]
        fresh = tokens if batch.is_decode else tokens + len(layout.starts) * g.window
        entries = _kv_rows(draw, g, n, (layout.num_pages + 1, layout.page_tokens // ratio)) if ratio else None
        picks = None
        if kind == "csa":
            visible = ((batch.positions + 1) // ratio)[:, None]
            picks = (draw.integers(1 << 30, tokens, g.topk) % visible.clamp_min(1)).to(torch.int32)
            picks = torch.where(visible > 0, picks, -1).sort(-1).values
            # a pick never occurs twice: repeats become absent
            repeated = torch.zeros_like(picks, dtype=torch.bool)
            repeated[:, 1:] = picks[:, 1:] == picks[:, :-1]
            picks = torch.where(repeated, -1, picks)
        return {
            "q": draw.normal(tokens, g.heads, g.head_dim, dtype=act),
            "kv": draw.normal(fresh, g.head_dim, dtype=act),
            "window": _ring(draw, g, n, layout),
            "entries": entries,
            "picks": picks,
            "batch": batch,
            "sink": draw.normal(g.heads),
            "ratio": ratio,
            "rope_dim": g.rope_dim,
            "numerics": n,
        }

    return make


def grouped_out(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `grouped_out`."""
    return {
        "o": draw.normal(_tokens(layout), g.heads, g.head_dim, dtype=activation_dtype(n)),
        "wo_a": draw.weight(g.dense, g.groups * g.o_rank, g.heads // g.groups * g.head_dim),
        "wo_b": draw.weight(g.dense, g.hidden, g.groups * g.o_rank),
        "rope_table": _table(layout.batch(draw, g.vocab), g),
        "groups": g.groups,
        "numerics": n,
    }


def route(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `route`."""
    gate = draw.normal(g.experts, g.hidden, dtype=torch.bfloat16, scale=g.hidden**-0.5)
    u, bias = _hidden(draw, g, n, layout), draw.normal(g.experts, scale=0.1)
    return {"u": u, "gate": gate, "bias": bias, "num_experts_per_tok": g.chosen, "scale": 1.5}


def route_hash(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `route_hash`."""
    gate = draw.normal(g.experts, g.hidden, dtype=torch.bfloat16, scale=g.hidden**-0.5)
    table = (draw.integers(g.experts, g.vocab, 1) + torch.arange(g.chosen, device=draw.device)) % g.experts
    ids = draw.integers(g.vocab, _tokens(layout))
    return {"u": _hidden(draw, g, n, layout), "gate": gate, "tid2eid": table, "token_ids": ids, "scale": 1.5}


def routed_experts(packed: bool) -> Make:
    """Arguments of `routed_experts`, with the experts as mapped or as a backend packs them."""

    def make(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
        first = draw.integers(g.experts, _tokens(layout), 1)
        ids = (first + 2 * torch.arange(g.chosen, device=draw.device)) % g.experts
        if g.experts % 2 == 0 and 2 * g.chosen > g.experts:
            ids = (first + torch.arange(g.chosen, device=draw.device)) % g.experts
        return {
            "u": _hidden(draw, g, n, layout),
            "ids": ids.to(torch.int32),
            "weights": draw.normal(_tokens(layout), g.chosen).sigmoid(),
            "experts": draw.experts(g, packed),
            "limit": 2.0,
            "numerics": n,
        }

    return make


def shared_expert(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `shared_expert`."""
    return {
        "u": _hidden(draw, g, n, layout),
        "routed": draw.normal(_tokens(layout), g.hidden),
        "w1": draw.weight(g.dense, g.intermediate, g.hidden),
        "w2": draw.weight(g.dense, g.hidden, g.intermediate),
        "w3": draw.weight(g.dense, g.intermediate, g.hidden),
        "limit": 2.0,
        "numerics": n,
    }


def variants(**makers: Make) -> Callable[[], Iterator[Case]]:
    """Cases of several makers of one op, each label led by the variant's name."""

    def generate() -> Iterator[Case]:
        for name, make in makers.items():
            for case in cases(make)():
                yield replace(case, label=f"{name}-{case.label}")

    return generate


def edges(usual: Callable[[], Iterator[Case]], **makers: Make) -> Callable[[], Iterator[Case]]:
    """The usual cases, then one per maker for an edge rule of the op."""

    def generate() -> Iterator[Case]:
        yield from usual()
        for name, make in makers.items():
            for layout in (DECODE, CHUNK):
                case = _case(make, TINY, EXACT, layout, "edge")
                yield replace(case, label=f"{name}-{case.label}")

    return generate


def route_ties(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `route` under which all experts score alike: the lowest ids win."""
    arguments = route(draw, g, n, layout)
    return arguments | {
        "gate": torch.zeros_like(arguments["gate"]),
        "bias": torch.zeros_like(arguments["bias"]),
    }


def index_ties(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `index_topk` under which all entries score alike: the lowest numbers win."""
    arguments = index_topk(draw, g, n, layout)
    return arguments | {"w": torch.zeros_like(arguments["w"])}


def same_expert_twice(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `routed_experts` that list one expert in every place of a token."""
    arguments = routed_experts(packed=True)(draw, g, n, layout)
    return arguments | {"ids": arguments["ids"][:, :1].expand(-1, g.chosen).contiguous()}
