"""What a user needs to know about this machine's Ascend software, in words, with the way out of everything that is missing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from v4sdk.backend import DoctorRow, Evidence
from v4sdk.ops import OPS

from . import results, roofline
from .chip import FAMILIES
from .contract import contract
from .ep import balance, environment
from .ops import Choice
from .probe import EMULATED_RUN, RUNTIME, TOOLKIT_VARIABLE, VISIBLE_VARIABLE, Device, Machine
from .providers import Provider
from .verdict import verdict
from .versions import NEWEST_CANN, cann_of, fits_cann, pair_for

PACK_NAMES = {
    "transformer": "cann_ops_transformer",
    "vendorpack": "vllm-ascend's _C_ascend",
    "stock": "torch_npu",
    "kernels": "our Triton kernels",
    "parts": "parts or reference",
}
DEVICE_TEST = "v4sdk doctor --backend ascend --device-test"
_GRAPH: Mapping[bool | None, str] = {
    True: "a replayed step equals one without a graph", False: "a replayed step differs from one without a graph",
    None: "no step was captured as a graph",
}  # fmt: skip


def machine_rows(m: Machine) -> Sequence[DoctorRow]:
    """torch_npu, CANN, driver, device nodes, and other distributions; from a look, without any import."""
    npu_version = m.torch_npu or ("of unknown version" if m.has_package else None)
    found = f"{m.cann or 'of unknown version'} in {m.toolkit}" if m.toolkit else "no toolkit found"
    said = os.environ.get(TOOLKIT_VARIABLE)
    if said and m.toolkit is None:
        found = f"{TOOLKIT_VARIABLE} is {said}, where there is no folder"
    if m.is_stand_in:
        found = "a link-time stand-in: no NPU behind it"
    rows = [
        DoctorRow(
            "torch_npu", f"{npu_version} beside torch {m.torch}" if npu_version else "not installed",
            ok=npu_version is not None, hint=None if npu_version else EMULATED_RUN if m.emulates else pair_for(m.cann, m.torch),
        ),
        DoctorRow(
            "CANN", found, ok=m.toolkit is not None or m.is_stand_in,
            hint=f"install CANN {cann_of(m.torch_npu or '') or NEWEST_CANN}, and source its set_env.sh",
        ),
        DoctorRow(
            RUNTIME, m.missing or "can be loaded", ok=m.missing is None,
            hint=f"source CANN's set_env.sh, which sets {TOOLKIT_VARIABLE} and the library path",
        ),
        DoctorRow("driver", m.driver or "not found", ok=m.driver is not None, hint="install the NPU's driver and firmware"),
        DoctorRow(
            "device nodes", ", ".join(m.nodes) or "no /dev/davinci*", ok=bool(m.nodes),
            hint="npu-smi info lists the NPUs of a host; a container wants --device /dev/davinci0",
        ),
        DoctorRow(
            "emulation", "on: the vendor's functions are computed on the CPU" if m.emulates else "off", ok=True
        ),
    ]  # fmt: skip
    if m.accelerator:
        rows.append(
            DoctorRow("torch serves", m.accelerator, ok=False, hint="torch_npu wants torch's CPU build")
        )
    return (*rows, *_pair_rows(m.torch_npu, m.cann), *_pack_rows(m))


def _pair_rows(torch_npu: str | None, cann: str | None) -> Sequence[DoctorRow]:
    if torch_npu is None:
        return ()
    paired = cann_of(torch_npu)
    if paired is None:
        finding = f"torch_npu {torch_npu} is not in the vendor's table of August 2026"
        return (DoctorRow("version pair", finding, ok=True),)
    fits = cann is None or fits_cann(torch_npu, cann) is not False
    finding = f"torch_npu {torch_npu} was released for CANN {paired}" + (f", found {cann}" if cann else "")
    return (
        DoctorRow(
            "version pair", finding, ok=fits, hint=f"install CANN {paired}, or a pair that the table names"
        ),
    )


def _pack_rows(m: Machine) -> Sequence[DoctorRow]:
    rows = [
        DoctorRow(name, f"{version}: its functions are asked for, see the ops", ok=True)
        for name, version in m.packs.items()
        if name != "onnxruntime-cann"
    ]
    if "onnxruntime-cann" in m.packs:
        finding = f"{m.packs['onnxruntime-cann']}: named, not used; it has 34 ONNX operators and none of those V4 is made of"
        rows.append(DoctorRow("onnxruntime-cann", finding, ok=True))
    return rows


def pack_rows(packs: Mapping[str, str | None]) -> Sequence[DoctorRow]:
    """Packs that are installed beside torch_npu, and why one of them cannot be loaded."""
    hint = "each is built for one CANN and one torch: install the build for these, or do without"
    return [
        DoctorRow(
            f"pack {name}",
            "loaded" if reason is None else f"cannot be loaded: {reason}",
            ok=reason is None,
            hint=hint,
        )
        for name, reason in packs.items()
    ]


def device_rows(npu: Device, m: Machine) -> Sequence[DoctorRow]:
    """The NPU in use, and what it can run."""
    memory = f", {npu.memory[0] / 1e9:.1f} of {npu.memory[1] / 1e9:.1f} GB free" if npu.memory else ""
    visible = os.environ.get(VISIBLE_VARIABLE)
    seen = f"device {npu.index} of {npu.count}" + (
        f" with {VISIBLE_VARIABLE}={visible}" if visible is not None else ""
    )
    # one that names itself as what it only stands for must not read like a device
    name = f"{'stands in for ' if m.is_stand_in else ''}{npu.name}, SoC code {npu.code}, {seen}{memory}"
    known = npu.family is not None
    rows = [
        DoctorRow("NPU", name, ok=True),
        DoctorRow(
            "chip",
            verdict(npu),
            ok=known,
            hint=f"known families: {', '.join(FAMILIES)}; newer v4sdk may know it",
        ),
    ]
    rows += [DoctorRow("for --ep, unset", words, ok=True) for words in environment()] if npu.count > 1 else []
    if npu.cann and npu.cann != m.cann:
        rows += [DoctorRow("CANN in use", npu.cann, ok=True), *_pair_rows(npu.torch_npu, npu.cann)]
    return rows


def op_rows(
    choices: Sequence[Choice], evidence: Evidence, tested: results.Result | None
) -> Sequence[DoctorRow]:
    """Who serves each op at the sizes of V4-Flash, on what evidence, and why those before it do not.

    Args:
        evidence: of ops that no device test has shown.
    """
    served = {c.op: c for c in choices}
    right = tested.passed if tested else frozenset()
    groups: dict[tuple[str, str], list[str]] = {}
    for op in OPS:
        by = served[op].by if op in served else "parts"
        shown = "reference" if by == "parts" else "device" if (op, by) in right else evidence
        groups.setdefault((by, shown), []).append(op)
    rows = [
        DoctorRow(f"{len(names)} ops by {PACK_NAMES[by]}", f"{', '.join(names)} ({shown})", ok=True)
        for (by, shown), names in groups.items()
    ]
    rows += [DoctorRow(f"{c.op} not by", why, ok=True) for c in choices for why in c.passed_over]
    return rows


def planned_rows(providers: Sequence[Provider], evidence: Evidence) -> Sequence[DoctorRow]:
    """Who would serve which op, by the table alone: nothing was asked of a vendor's library.

    Providers that decline every model are left out.
    """
    by_op: dict[str, list[str]] = {}
    for one in (p for p in providers if not p.is_declined):
        calls = [contract()[key] for key in one.calls]
        since = ", ".join(dict.fromkeys(f"{call.since} ({call.source})" for call in calls))
        chips = "/".join(f for f in FAMILIES if f in one.chips)
        by_op.setdefault(one.op, []).append(
            f"{PACK_NAMES[one.pack]} on {chips}" + (f" from {since}" if since else "")
        )
    rows = [DoctorRow(op, "; then ".join(served), ok=True) for op, served in by_op.items()]
    rows.append(
        DoctorRow("evidence", f"{evidence}: by the table of calls; torch_npu was not loaded", ok=True)
    )
    return rows


def evidence_rows(evidence: Evidence, tested: results.Result | str | None) -> Sequence[DoctorRow]:
    """The evidence word, and the device test that it rests on."""
    if evidence == "emulated":
        return (DoctorRow("evidence", "emulated: computed on the CPU from the vendor's documents", ok=True),)
    if isinstance(tested, results.Result):
        right = f"{len(tested.passed)} of {len(tested.ops)} ops right"
        what = (
            f"{evidence}: {right} on {tested.soc} {tested.uuid}, driver {tested.driver}, CANN {tested.cann}, "
        )
        finding = f"{what}torch_npu {tested.torch_npu}, {tested.date}; {_GRAPH[tested.graph]}"
        return (DoctorRow("evidence", finding, ok=tested.ok, hint=f"{DEVICE_TEST} shows which differ"),)
    finding = f"{evidence}: never run on this device" if tested is None else f"{evidence}: {tested}"
    return (DoctorRow("evidence", finding, ok=False, hint=f"{DEVICE_TEST} takes about a minute"),)


def roofline_rows(npu: Device) -> Sequence[DoctorRow]:
    """What the vendor's performance model says of the chip."""
    profile = roofline.profile_of(npu.chip.name) if npu.chip else None
    if profile is None:
        return ()
    rows = [DoctorRow(f"roofline ({roofline.LABEL})", line, ok=True) for line in roofline.lines(profile)]
    for what, ratio, hides in balance():
        if what.startswith(f"{profile.name},"):
            models = ", ".join(f"{model} {'hides' if said else 'does not'}" for model, said in hides.items())
            rows.append(DoctorRow("expert exchange", f"{what}: {ratio:.0f} FLOP per byte: {models}", ok=True))
    return rows
