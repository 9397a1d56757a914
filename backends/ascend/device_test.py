"""The minute that an owner of an NPU starts: every op on the device against its reference, and a replayed step against the same
step without a graph. What it writes is the only place from which the evidence word `device` is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from v4sdk import __version__
from v4sdk.backend import Binding, DoctorRow, EngineConfig, bind
from v4sdk.config import ModelConfig
from v4sdk.errors import BackendUnavailable
from v4sdk.numerics import FAST, Numerics
from v4sdk.ops import OPS, Case, inputs
from v4sdk.ops.inputs import FLASH, PREFILL, Draw, Geometry, Layout, Make
from v4sdk.testing import compare, judge_case, tolerance_for
from v4sdk.testing.arguments import as_kept, clone, on_backend, readable, tensors
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import Weight

from . import results
from .chip import Family
from .graph import RecordedStep
from .identity import seconds
from .ops import PROVIDERS
from .policy import POLICIES
from .probe import EMULATE_VARIABLE
from .results import Result, Tested

if TYPE_CHECKING:
    from .backend import AscendBackend

log = logging.getLogger("v4sdk")

# heads, widths, window and picks as released, which vendors' functions ask for; what only takes time is small
GEOMETRY: Geometry = replace(FLASH, name="device", experts=8, intermediate=512, vocab=8192)
# one sequence has more compressed entries than are picked, one has hardly any
DECODE = Layout("decode", (2500, 130, 7), (1, 1, 1))
# pieces of prompts that end and begin inside of compressed entries
CHUNK = Layout("chunk", (100, 3, 511), (15, 1, 9))
LAYOUTS = (DECODE, PREFILL, CHUNK)
_KINDS: Mapping[str, Mapping[str, Make]] = {
    "compress": {
        "csa": inputs.compress(4, False), "hca": inputs.compress(128, False), "index": inputs.compress(4, True)
    },
    "sparse_attn": {kind: inputs.sparse_attn(kind) for kind in ("swa", "csa", "hca")},
    "routed_experts": {"packed": inputs.routed_experts(True)},
}  # fmt: skip
# inputs that stand for what a step has just computed: moved along to see that a replayed graph reads its buffers again
_FRESH = ("x", "u", "h", "y", "o", "qr")

# how `ops.Choice` calls what no provider serves
PARTS = "parts"

Clock = Callable[[Callable[[], object]], float]
Observer = Callable[[str, tuple[Any, ...], Mapping[str, Any]], None]


def config() -> ModelConfig:
    """A model of this geometry, for predicates to look at: four layers, one of each kind and one that routes by hash."""
    g = GEOMETRY
    return ModelConfig(
        vocab_size=g.vocab, hidden_size=g.hidden, num_hidden_layers=4, num_attention_heads=g.heads, head_dim=g.head_dim,
        qk_rope_head_dim=g.rope_dim, q_lora_rank=g.q_rank, o_groups=g.groups, o_lora_rank=g.o_rank,
        sliding_window=g.window, compress_ratios=(0, 4, 128, 4), compress_rope_theta=160000.0, rope_theta=10000.0,
        index_n_heads=g.index_heads, index_head_dim=g.index_dim, index_topk=g.topk, n_routed_experts=g.experts,
        num_experts_per_tok=g.chosen, moe_intermediate_size=g.intermediate, num_hash_layers=1, routed_scaling_factor=1.5,
        swiglu_limit=10.0, hc_mult=g.streams, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6,
        max_position_embeddings=1 << 20,
    )  # fmt: skip


def run(backend: AscendBackend) -> Sequence[DoctorRow]:
    """Test, write the result, and say what was found.

    Raises:
        BackendUnavailable: nothing here is an NPU.
    """
    if backend.machine.is_stand_in or backend.machine.emulates:
        raise BackendUnavailable(
            "a device test wants an NPU, and here one is emulated or stood in for",
            hint=f"on a machine with an NPU and CANN: unset {EMULATE_VARIABLE}, and start it again",
        )
    number = _number(backend)
    devices = torch.get_device_module("npu")
    clock: Clock = lambda work: seconds(devices, work)  # noqa: E731
    values = torch.rand(1 << 24, device=backend.device)
    ops = tuple(judge_ops(backend, clock, tuple(OPS)))
    same, why = judge_graph(backend)
    found = result(backend, number, clock(lambda: values.mul_(1.0)), ops, same)
    rows = [_op_row(one) for one in ops]
    rows.append(DoctorRow("replayed step", why, ok=bool(same), hint="it runs without a graph, op by op"))
    file = results.path()
    try:
        results.write(found, file)
    except OSError as exc:
        hint = f"name another file with {results.FILE_VARIABLE}"
        return [*rows, DoctorRow("result", f"{file} cannot be written: {exc.strerror}", ok=False, hint=hint)]
    read = results.read(file)
    if not isinstance(read, Result):
        return [*rows, DoctorRow("result", str(read), ok=False, hint="nothing is counted as run on a device")]
    what = f"{file}: {read.soc} {read.uuid}, driver {read.driver}, CANN {read.cann}, torch_npu {read.torch_npu}, {read.date}"
    return [*rows, DoctorRow("result", what, ok=True)]


def result(
    backend: AscendBackend, number: str, kernel_s: float, ops: tuple[Tested, ...], same: bool | None
) -> Result:
    """What is kept of a test."""
    npu, machine = backend.npu, backend.machine
    return Result(
        npu.name, npu.code, number, machine.driver or "unknown", npu.cann or machine.cann or "unknown", npu.torch_npu,
        torch.__version__, __version__, results.sources(), datetime.now().astimezone().isoformat(timespec="seconds"),
        kernel_s, ops, same, results.packs_of(machine),
    )  # fmt: skip


def _number(backend: AscendBackend) -> str:
    """UUID of the NPU; what a result cannot count without is said before the minute is spent."""
    npu, machine = backend.npu, backend.machine
    if backend.number is None:
        raise BackendUnavailable(
            f"nothing names this NPU: torch_npu {npu.torch_npu} gives no UUID, and npu-smi no number of its die or board",
            hint="put the driver's npu-smi on the path, in a container too, or use torch_npu 2.13 or newer",
        )
    if machine.driver is None or not (npu.cann or machine.cann):
        what = "driver" if machine.driver is None else "CANN"
        raise BackendUnavailable(
            f"the version of the {what} is not found, without which a device test does not count",
            hint="give a container /usr/local/Ascend/driver/version.info, and source CANN's set_env.sh",
        )
    return backend.number


def judge_ops(backend: AscendBackend, clock: Clock, names: Sequence[str]) -> Iterator[Tested]:
    """Compare and time every op.

    Args:
        clock: gives the seconds a piece of work takes on the device. names: only these ops.
    """
    called: set[str] = set()
    record: Observer = lambda key, args, kwargs: called.add(key)  # noqa: E731
    backend.vendor.observers.append(record)
    try:
        for name in names:
            called.clear()
            yield _judge_op(backend, clock, name, called)
    finally:
        backend.vendor.observers.remove(record)


def _judge_op(backend: AscendBackend, clock: Clock, name: str, called: set[str]) -> Tested:
    worst, detail, took = 0.0, None, None
    family, model = backend.npu.family, config()
    made = list(_cases(name, family=family))
    served: dict[str, str] = {}
    for case in made:
        log.info("device test: %s/%s", name, case.label)
        found = judge_case(OPS[name], case, backend, model)
        worst = max(worst, found.worst)
        if found.status != "passed":
            detail = f"{case.label}: {found.detail}"
            break
        # every case binds anew, so that one which a provider fails is served by the next without a word of it later
        served.setdefault(_serving(backend, name), case.label)
    if detail is None and len(served) > 1:
        detail = f"not one provider for all cases: {', '.join(f'{by} from {label}' for by, label in served.items())}"
    if detail is None:
        took = clock(_call(backend, name, made[0]))
    by = next(iter(served)) if len(served) == 1 else _serving(backend, name)
    own = sorted(called & _keys(name, by, family))
    # an adapter that handed all its cases to the reference has shown nothing of the pack that it stands for
    by = by if own or not _keys(name, by, family) else PARTS
    finite = worst if worst < float("inf") else None
    return Tested(name, by, len(made), detail is None, finite, took, detail, tuple(own))


def _serving(backend: AscendBackend, name: str) -> str:
    return next((c.by for c in backend.choices if c.op == name), PARTS)


def _keys(name: str, pack: str, family: Family | None) -> frozenset[str]:
    """The vendor's functions that a pack's provider of an op may call."""
    rows = [row for row in PROVIDERS if (row.op, row.pack) == (name, pack) and family in row.chips]
    return frozenset(key for row in rows for key in row.calls)


def judge_graph(backend: AscendBackend) -> tuple[bool | None, str]:
    """Run one step of all ops without a graph, captured, and replayed on other inputs.

    Returns:
        Whether all results, and what ops write in place, agree within each op's tolerance, None where the step cannot be
        captured; and the reason in words.
    """
    binding = bound(backend)
    work = [(name, given) for name in OPS for given in _decode_arguments(backend, name)]
    kept = [clone(given) for _, given in work]
    out: list[Any] = [None] * len(work)

    def step(into: list[Any] = out) -> None:
        for at, (name, given) in enumerate(work):
            into[at] = binding.table[OPS[name]](**given)

    def restored(shift: int) -> None:
        for (_, given), before in zip(work, kept, strict=True):
            for name in given:
                for now, then in zip(tensors(given[name]), tensors(before[name]), strict=True):
                    now.copy_(then.roll(shift, -1) if name in _FRESH and shift else then)

    recorded = backend.record(step)
    with torch.inference_mode():
        # the first call runs as it is, the second captures, the third only replays
        for shift in (0, 0, 1):
            restored(shift)
            expected: list[Any] = [None] * len(work)
            # into a list of its own: what a graph writes to is what it was captured with
            step(expected)
            backend.synchronize()
            written = [_written(name, given) for name, given in work]
            restored(shift)
            recorded()
            backend.synchronize()
            for (name, given), got, want, kept_rows in zip(work, out, expected, written, strict=True):
                if not _agree(name, got, want):
                    return False, f"{name} gives other numbers than without a graph"
                if not _agree(name, _written(name, given), kept_rows):
                    return False, f"{name} writes other numbers than without a graph"
    if not isinstance(recorded, RecordedStep):
        return None, "steps are not recorded here"
    if recorded.graph is None:
        return None, f"not captured: {recorded.reason}"
    return True, f"{len(work)} calls captured as one ACL graph and replayed: same numbers"


def _agree(name: str, got: Any, want: Any) -> bool:
    pairs = zip(tensors(got), tensors(want), strict=True)
    return all(compare(a, e, tolerance_for(OPS[name], e.dtype, FAST)).ok for a, e in pairs)


def _written(name: str, given: dict[str, Any]) -> list[Tensor]:
    """Copies of what an op writes in place, as numbers: some give nothing back and do nothing else."""
    return [
        readable(name, argument, tensor, given).clone()
        for argument in OPS[name].mutates
        for tensor in tensors(given[argument])
    ]


def bound(backend: AscendBackend) -> Binding:
    """How the ops of that model run here; `backend.choices` then say by whom, and why by nobody better."""
    fmt = FAST.default_kv_format if FAST.default_kv_format in backend.kv_formats else backend.kv_formats[0]
    return bind(backend, config(), EngineConfig(FAST, fmt, backend.capability()))


def _call(backend: AscendBackend, name: str, case: Case) -> Callable[[], object]:
    given = on_backend(as_kept(name, case.make(torch.device("cpu")), backend), backend)
    function: Callable[..., object] = bound(backend).table[OPS[name]]
    return lambda: function(**given)


def _decode_arguments(backend: AscendBackend, name: str) -> Iterator[dict[str, Any]]:
    for case in _cases(name, (DECODE,), backend.npu.family):
        yield on_backend(as_kept(name, case.make(torch.device("cpu")), backend), backend)


def _integer_linear(draw: Draw, g: Geometry, n: Numerics, layout: Layout) -> dict[str, Any]:
    """Arguments of `linear` with a matrix as `v4sdk convert` writes it for chips of integer products."""
    given = inputs.linear(draw, g, n, layout)
    values = given["weight"].dequantize()
    return given | {"weight": Weight(*pack_int8(values), "int8", (1, values.shape[-1]))}


def _cases(name: str, layouts: Sequence[Layout] = LAYOUTS, family: Family | None = None) -> Iterator[Case]:
    """Cases of an op at this geometry; ops that depend on none keep their own small ones."""
    own = getattr(inputs, name, None)
    # what that module only imports makes no arguments
    own = own if getattr(own, "__module__", "") == inputs.__name__ else None
    kinds: Mapping[str, Make] = _KINDS.get(name) or ({"": own} if own else {})
    if name == "linear" and family is not None and POLICIES[family].activations == "int8":
        # first, so that it is the one that is timed
        kinds = {"int8": _integer_linear, **kinds}
    for kind, make in kinds.items():
        for layout in layouts:
            label = "-".join(filter(None, (kind, GEOMETRY.name, layout.name)))
            yield Case(label, _maker(label, make, layout))
    if not kinds and (cases := OPS[name].inputs) is not None:
        yield from [case for case in cases() if case.scale == "tiny"][: len(layouts)]


def _maker(label: str, make: Make, layout: Layout) -> Callable[[torch.device], dict[str, Any]]:
    return lambda device: make(Draw(label, device), GEOMETRY, FAST, layout)


def _op_row(one: Tested) -> DoctorRow:
    error = f", {one.worst:.2g} of what is accepted" if one.worst is not None else ""
    took = f", {one.seconds * 1e6:.1f} us for {DECODE.name}" if one.seconds is not None else ""
    finding = one.detail or f"{one.provider}: {one.cases} cases{error}{took}"
    return DoctorRow(
        one.op,
        finding,
        ok=one.ok,
        hint="report this line with the last one; v4sdk conformance --backend ascend has more cases",
    )
