"""Who serves an op: a vendor's library that has proven itself on this chip, our Triton kernel, or torch; decided once, and told.

`V4SDK_CUDA_TIERS` overrides it per op, as in `sparse_attn=triton,hc_pre=torch`; `all` stands for every op.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from v4sdk.backend import Kernel
from v4sdk.errors import V4Error
from v4sdk.ops import OPS

from .launch import Launch
from .vendor import deep_gemm, flash_mla, tile_kernels

Tier = Literal["vendor", "triton", "torch"]
TIERS_VARIABLE = "V4SDK_CUDA_TIERS"


@dataclass(frozen=True)
class Provider:
    """A vendor's library for one op.

    Attributes:
        op: it serves. module, distribution: to import, and to ask for its version. install: arguments of `pip install`.
        chips: compute capabilities it has kernels for.
        make: gives a function that falls back to ours for calls the library does not take.
    """

    op: str
    module: str
    distribution: str
    install: str
    chips: frozenset[int]
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Choice:
    """Who serves an op here, and why nobody better does.

    Attributes:
        passed_over: why others do not. asked: what the environment asks for, None where it says nothing.
    """

    op: str
    tier: Tier
    by: str
    passed_over: tuple[str, ...] = ()
    asked: Tier | None = None


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "sparse_attn", flash_mla.MODULE, flash_mla.DISTRIBUTION, flash_mla.INSTALL, flash_mla.CHIPS,
        lambda ours: flash_mla.FlashMla(ours).sparse_attn,
    ),
    Provider(
        "linear", deep_gemm.MODULE, deep_gemm.DISTRIBUTION, deep_gemm.INSTALL, deep_gemm.CHIPS,
        lambda ours: deep_gemm.DeepGemm(ours).linear,
    ),
    Provider(
        "hc_post", tile_kernels.MODULE, tile_kernels.DISTRIBUTION, tile_kernels.INSTALL, tile_kernels.CHIPS,
        lambda ours: tile_kernels.TileKernels(ours).hc_post,
    ),
)  # fmt: skip


def wanted(providers: Sequence[Provider] = PROVIDERS) -> Mapping[str, Tier]:
    """What the environment asks for, by op; `all=vendor` means every op that some library knows.

    Raises:
        V4Error: an op or a tier of that name does not exist, or no library knows the op that is to be a vendor's.
    """
    found: dict[str, Tier] = {}
    known = tuple(dict.fromkeys(provider.op for provider in providers))
    for word in filter(None, os.environ.get(TIERS_VARIABLE, "").replace(" ", "").split(",")):
        op, _, tier = word.partition("=")
        names = {name: name for name in get_args(Tier)}
        if (op not in OPS and op != "all") or tier not in names:
            raise V4Error(
                f"{TIERS_VARIABLE} has `{word}`, expected OP=TIER with a tier of {', '.join(names)}",
                hint=f"for instance {TIERS_VARIABLE}=sparse_attn=triton; ops are listed by v4sdk doctor --backend cuda",
            )
        if tier == "vendor" and op != "all" and op not in known:
            raise V4Error(
                f"{TIERS_VARIABLE} has `{word}`, but no vendor's library has a function for `{op}`, "
                f"expected one of {', '.join(known)}",
                hint=f"leave it out: {op}=triton is what happens anyway",
            )
        found[op] = tier  # type: ignore[assignment]
    every = found.get("all")
    asked = {name: found.get(name, every) for name in OPS}
    return {name: tier for name, tier in asked.items() if tier and (tier != "vendor" or name in known)}


def choose(
    launch: Launch, rows: Sequence[Kernel[Any, Any]], providers: Sequence[Provider] = PROVIDERS
) -> tuple[Sequence[Kernel[Any, Any]], tuple[Choice, ...]]:
    """Decide for every op; a library is asked only where somebody could use it."""
    asked, kept, choices = wanted(providers), [], []
    ours = {row.op.name: row for row in rows}
    for name in OPS:
        row, tier = ours.get(name), asked.get(name)
        if tier == "torch" or row is None:
            why = f"{TIERS_VARIABLE} asks for it" if tier == "torch" else "no kernel of ours"
            choices.append(Choice(name, "torch", "its parts or its reference", (why,), tier))
            continue
        chosen, by, passed = (row, None, []) if tier == "triton" else _vendor(launch, row, providers)
        kept.append(chosen)
        choices.append(Choice(name, "vendor" if by else "triton", by or "Triton", tuple(passed), tier))
    return tuple(kept), tuple(choices)


def _vendor(
    launch: Launch, row: Kernel[Any, Any], providers: Sequence[Provider]
) -> tuple[Kernel[Any, Any], str | None, list[str]]:
    passed: list[str] = []
    for provider in providers:
        if provider.op != row.op.name:
            continue
        reason, function = _tried(launch, row, provider)
        if function is not None:
            return replace(row, function=function), _named(provider), passed
        passed.append(f"{provider.distribution}: {reason}")
    return row, None, passed


def _named(provider: Provider) -> str:
    try:
        return f"{provider.distribution} {importlib.metadata.version(provider.distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{provider.module} from source"


def _tried(
    launch: Launch, row: Kernel[Any, Any], provider: Provider
) -> tuple[str, Callable[..., Any] | None]:
    """Import a library and hold its numbers against the reference; the reason where it is not used."""
    if launch.target.evidence != "device":
        return "needs a GPU to prove itself", None
    if launch.target.arch not in provider.chips:
        return f"has no kernels for compute capability {launch.target.arch / 10}", None
    if importlib.util.find_spec(provider.module) is None:
        return f"not installed (pip install {provider.install})", None
    from .probe import difference

    try:
        function = provider.make(row.function)
        found = difference(row.op, function, launch.device)
    except (
        Exception
    ) as exc:  # a library that does not fit this torch, driver or chip fails in any way it likes
        return (
            f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else 'no message'}",
            None,
        )
    return ("", function) if found is None else (f"its numbers differ: {found}", None)
