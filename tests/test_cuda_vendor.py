"""Adapters of vendors' libraries: the probe really asks the library, mistakes are noticed, other calls go to ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from vendor_libraries import PUBLISHED, flash_mla_sparse_fwd, fp8_gemm_nt, install, mhc_post_fwd

from v4sdk.numerics import REFERENCE
from v4sdk.ops import OPS
from v4sdk.ops.inputs import PREFILL, TINY, Draw, hc_post, linear
from v4sdk.quant import ue8m0_value

tiers = importlib.import_module("v4sdk_cuda.tiers")
probe = importlib.import_module("v4sdk_cuda.probe")

CPU = torch.device("cpu")


def made(op: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    """The adapter of an op over a function of ours."""
    provider = next(p for p in tiers.PROVIDERS if p.op == op)
    function: Callable[..., Any] = provider.make(ours)
    return function


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this call is the library's")


@pytest.mark.parametrize("provider", tiers.PROVIDERS, ids=lambda p: p.op)
def test_the_probe_is_served_by_the_library_alone(monkeypatch: pytest.MonkeyPatch, provider: Any) -> None:
    install(monkeypatch, provider.distribution)
    assert probe.difference(OPS[provider.op], provider.make(refuse), CPU) is None


@pytest.mark.parametrize("provider", tiers.PROVIDERS, ids=lambda p: p.op)
def test_a_provider_says_where_its_library_is(provider: Any) -> None:
    assert PUBLISHED[provider.distribution][0].partition(".")[0] == provider.module
    assert provider.distribution in provider.install


MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "logits unscaled": ("sgl-flash-mla", lambda q, kv, at, _, d, **k: flash_mla_sparse_fwd(q, kv, at, 1.0, d, **k)),
    "scales of other tokens": ("sgl-deep-gemm", lambda a, b, d: fp8_gemm_nt((a[0], a[1].flip(0)), b, d)),
    "scales of other columns of tokens": ("sgl-deep-gemm", lambda a, b, d: fp8_gemm_nt((a[0], a[1].flip(1)), b, d)),
    "scales of other rows of the weight": ("sgl-deep-gemm", lambda a, b, d: fp8_gemm_nt(a, (b[0], b[1].flip(0)), d)),
    "scales of other columns of the weight": ("sgl-deep-gemm", lambda a, b, d: fp8_gemm_nt(a, (b[0], b[1].flip(1)), d)),
    "scales of the weight doubled": ("sgl-deep-gemm", lambda a, b, d: fp8_gemm_nt(a, (b[0], 2 * b[1]), d)),
    "mixes transposed": ("tile-kernels", lambda x, r, p, c, out: mhc_post_fwd(x, r, p, c.mT.contiguous(), out=out)),
    "streams out of order": ("tile-kernels", lambda x, r, p, c, out: mhc_post_fwd(x, r.flip(2), p, c, out=out)),
    "weights of other streams": ("tile-kernels", lambda x, r, p, c, out: mhc_post_fwd(x, r, p.flip(2), c, out=out)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    distribution, wrong = MISTAKES[name]
    install(monkeypatch, distribution, wrong)
    provider = next(p for p in tiers.PROVIDERS if p.distribution == distribution)
    assert probe.difference(OPS[provider.op], provider.make(refuse), CPU) is not None


# what the library takes of the small cases; everything else is ours
TAKEN = {
    "linear": {"tiny-prefill-reference", "tiny-chunk-reference"},
    "hc_post": {
        f"{case}-{numerics}"
        for case in ("tiny-decode", "tiny-first", "tiny-prefill", "tiny-chunk")
        for numerics in ("reference", "fast")
    }
    | {f"wide-{layout}-fast" for layout in ("decode", "first", "prefill", "chunk")},
}


@pytest.mark.parametrize(("op", "distribution"), [("linear", "sgl-deep-gemm"), ("hc_post", "tile-kernels")])
def test_an_adapter_takes_what_the_library_has_kernels_for_and_no_more(
    monkeypatch: pytest.MonkeyPatch, op: str, distribution: str
) -> None:
    asked = []

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(case.label)
        result: Tensor = OPS[op](*args, **kwargs)
        return result

    install(monkeypatch, distribution)
    adapter, generate = made(op, ours), OPS[op].inputs
    assert generate is not None
    small = [case for case in generate() if case.scale not in ("flash", "pro")]
    for case in small:
        got, want = (run(**case.make(CPU)) for run in (adapter, OPS[op]))
        allowed = OPS[op].tolerances[want.dtype]
        torch.testing.assert_close(got, want, rtol=allowed.rtol, atol=allowed.atol, msg=case.label)
    assert {case.label for case in small} - set(asked) == TAKEN[op]


def arguments() -> dict[str, Any]:
    """Of a product that DeepGEMM takes."""
    return linear(Draw("vendor", CPU), TINY, REFERENCE, PREFILL)


def test_scales_may_be_exponents_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sgl-deep-gemm")
    args = arguments()
    typed = replace(args["weight"], scale=args["weight"].scale.view(torch.float8_e8m0fnu))
    adapter = made("linear", refuse)
    assert torch.equal(adapter(**args), adapter(**args | {"weight": typed}))


def test_what_the_library_has_no_kernel_for_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "sgl-deep-gemm", refuse)
    args = arguments()
    draw, weight = Draw("others", CPU), args["weight"]
    others = (
        {"weight": replace(weight, scale=ue8m0_value(weight.scale))},
        {"weight": replace(weight, block=(64, 128), scale=weight.scale.repeat_interleave(2, 0))},
        {"weight": draw.weight("fp4", TINY.q_rank, TINY.hidden)},
        {"weight": draw.weight("float", TINY.q_rank, TINY.hidden)},
        {"weight": draw.weight("fp8", 192, TINY.hidden)},
        {"weight": draw.weight("fp8", 128, 192), "x": args["x"][:, :192]},
        {"dtype": torch.float32},
        {"x": args["x"][:16]},
    )
    for other in others:
        call = args | other
        assert torch.equal(made("linear", OPS["linear"])(**call), OPS["linear"](**call))


@pytest.mark.parametrize(
    ("op", "make", "distribution"),
    [("linear", linear, "sgl-deep-gemm"), ("hc_post", hc_post, "tile-kernels")],
)
def test_the_result_lies_where_the_caller_wants_it(
    monkeypatch: pytest.MonkeyPatch, op: str, make: Callable[..., dict[str, Any]], distribution: str
) -> None:
    install(monkeypatch, distribution)
    args = make(Draw("vendor", CPU), TINY, REFERENCE, PREFILL)
    want = made(op, refuse)(**args)
    for out in (torch.full_like(want, float("nan")), torch.full_like(want, float("nan")).mT.contiguous().mT):
        assert made(op, refuse)(**args, out=out) is out
        assert torch.equal(out, want)


def test_streams_of_float32_and_of_no_token_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tile-kernels", refuse)
    args = hc_post(Draw("vendor", CPU), TINY, REFERENCE, PREFILL)
    for other in ({name: value.float() for name, value in args.items()}, {n: v[:0] for n, v in args.items()}):
        assert torch.equal(made("hc_post", OPS["hc_post"])(**other), OPS["hc_post"](**other))
