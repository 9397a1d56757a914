"""Expert parallelism on these chips: which way rows take between ranks, and why not another.

The group that joins the ranks is HCCL's, which torch chooses for the device by itself. Ways, the first that is possible on every
rank: `mega_moe` of the transformer pack (exchange and experts in one call), torch_npu's dispatch and combine, and v4sdk's own
exchange by `all_to_all_single`, which has no limits and is the only one that sums in a fixed order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import distributed as dist

from v4sdk.backend import EngineConfig, ExpertExchange, Ranks
from v4sdk.config import ModelConfig

from .chip import Family
from .contract import ContractBroken, Vendor
from .contract import absent as absent_calls
from .ep_exchange import DispatchCombine, MegaMoe, carried_width
from .policy import stored_as
from .roofline import BALANCE, LABEL, PROFILES

log = logging.getLogger("v4sdk")

Way = Literal["mega_moe", "dispatch", "all_to_all"]
WAYS: tuple[Way, ...] = get_args(Way)
CALLS: Mapping[Way, tuple[str, ...]] = {
    "mega_moe": ("cann_ops_transformer.npu_mega_moe",),
    "dispatch": ("npu.npu_moe_distribute_dispatch_v2", "npu.npu_moe_distribute_combine_v2"),
    "all_to_all": (),
}
# HCCL's buffer of one group where HCCL_BUFFSIZE, in MB, is not set
_BUFFER = "HCCL_BUFFSIZE"
_BUFFER_MB = 200
_MEGA_TOKENS = 512
# a decode step of this many tokens should go in one call
_WORTHWHILE_TOKENS = 8


@dataclass(frozen=True)
class Limits:
    """What a document admits of dispatch and combine on one family.

    Attributes:
        hidden: least and most columns of a row, whose number is a multiple of 32. tokens: most of a rank in one call.
        ranks: sizes of the group. source: Ascend/op-plugin, npu_moe_distribute_dispatch_v2, at 04f7867967dd.
    """

    hidden: tuple[int, int]
    tokens: int
    ranks: frozenset[int]


DISPATCH: Mapping[Family, Limits] = {
    "910B": Limits((32, 7168), 256, frozenset((*range(2, 9), 16, 32, 64, 128, 256))),
    "910C": Limits((1024, 8192), 512, frozenset(range(2, 769))),
}
_MEGA_RANKS = frozenset((2, 4, 8, 16, 32))
_MOST_CHOSEN = 16


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        tokens: most of a rank in one call; longer steps take several calls, or v4sdk's own exchange.
        passed_over: why not the ways before.
    """

    way: Way
    tokens: int
    passed_over: tuple[str, ...] = ()


def absent(way: Way, family: Family) -> str | None:
    """Why a way's functions are not there on this chip, with the libraries that are loaded."""
    return absent_calls(CALLS[way], family)


def buffer_bytes_per_token(family: Family, config: ModelConfig, processes: int) -> int:
    """Bytes of HCCL's buffer that dispatch and combine want for every token of a rank.

    Source: as `Limits`; 910B by the formula of `fullmesh`, 910C by that of the default.
    """
    local, chosen = config.n_routed_experts // processes, config.num_experts_per_tok
    row = 2 * carried_width(config.hidden_size, chosen)
    if family == "910B":
        return 2 * processes * min(local, chosen) * row
    slot = _aligned(_aligned(row, 32) + 64, 512)
    # the document counts a shared expert, which is 1 there by default
    return 2 * (local * processes * slot + (chosen + 1) * _aligned(row, 512))


def _aligned(count: int, step: int) -> int:
    return -(-count // step) * step


def plan(
    family: Family, config: ModelConfig, engine: EngineConfig, processes: int,
    environ: Mapping[str, str] = os.environ, absence: Callable[[Way, Family], str | None] = absent,
) -> Plan:  # fmt: skip
    """Choose a way from what is there, the model's shapes, the numerics and HCCL's buffer."""
    passed: list[str] = []
    ways: tuple[tuple[Way, Callable[..., int | str]], ...] = (
        ("mega_moe", _mega_moe_tokens),
        ("dispatch", _dispatch_tokens),
    )
    for way, admitted in ways:
        found: int | str = (
            absence(way, family)
            or _no_vendor(config, engine, processes)
            or admitted(family, config, processes, environ)
        )
        if isinstance(found, int):
            return Plan(way, found, tuple(passed))
        passed.append(f"{way}: {found}")
    return Plan("all_to_all", 0, tuple(passed))


def _no_vendor(config: ModelConfig, engine: EngineConfig, processes: int) -> str | None:
    """What both of the vendor's ways refuse."""
    if engine.numerics.name != "fast":
        return f"it sums experts in BF16 in an order of its own, and numerics are `{engine.numerics.name}`"
    if config.n_routed_experts % processes:
        return f"{config.n_routed_experts} experts do not divide among {processes} ranks"
    if config.num_experts_per_tok > _MOST_CHOSEN:
        return f"{config.num_experts_per_tok} experts for a token, at most {_MOST_CHOSEN} are documented"
    return None


def _mega_moe_tokens(
    family: Family, config: ModelConfig, processes: int, environ: Mapping[str, str]
) -> int | str:
    """Tokens of one call, or why it does not serve. Limits: hicann/ops-transformer, mega_moe.md at 2abd43b1c8ad."""
    if family == "950":
        return "its FP4 matrices are wanted in a layout of the device's own, which nothing here makes"
    if stored_as(config) != {"float"}:
        return "its integer matrices are wanted in a layout of the device's own, which nothing here makes; BF16 serves"
    if processes not in _MEGA_RANKS:
        return f"{processes} ranks, documented are {', '.join(map(str, sorted(_MEGA_RANKS)))}"
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if hidden % 512 or not 1024 <= hidden <= 8192:
        return f"hidden size {hidden}, documented are multiples of 512 from 1024 to 8192"
    if inner % 512 or not 1024 <= inner <= 3072:
        return f"experts of width {inner}, documented are multiples of 512 from 1024 to 3072"
    if config.n_routed_experts // processes > 128:
        return f"{config.n_routed_experts // processes} experts on a rank, at most 128 are documented"
    return _MEGA_TOKENS


def _dispatch_tokens(
    family: Family, config: ModelConfig, processes: int, environ: Mapping[str, str]
) -> int | str:
    """Tokens of one call, as far as HCCL's buffer goes, or why it does not serve."""
    limits = DISPATCH[family]
    width = carried_width(config.hidden_size, config.num_experts_per_tok)
    if config.hidden_size % 32 or not limits.hidden[0] <= width <= limits.hidden[1]:
        least, most = limits.hidden
        return f"rows of {width} with their weights, documented are multiples of 32 from {least} to {most}"
    if processes not in limits.ranks:
        return f"groups of {processes} ranks are not documented"
    text = environ.get(_BUFFER, "")
    megabytes = int(text) if text.isdecimal() else _BUFFER_MB
    # 910B wants 2 MB of each half for itself
    reserved = (4 << 20) if family == "910B" else 0
    room = (megabytes << 20) - reserved
    each = buffer_bytes_per_token(family, config, processes)
    if room < _WORTHWHILE_TOKENS * each:
        wanted = -(-(_WORTHWHILE_TOKENS * each + reserved) >> 20)
        return f"HCCL's buffer of {megabytes} MB is small, {_BUFFER}={wanted} or more is wanted"
    return min(limits.tokens, room // each)


def agreed(chosen: Plan, ranks: Ranks, device: torch.device) -> Plan:
    """What every rank can do: the last way, and the fewest tokens, that any of them chose."""
    numbers = torch.tensor([-WAYS.index(chosen.way), chosen.tokens], dtype=torch.int32, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MIN, group=ranks.group())
    way, tokens = WAYS[-int(numbers[0])], int(numbers[1])
    passed = chosen.passed_over
    if way != chosen.way:
        passed = (*passed, f"{chosen.way}: another rank cannot")
    return Plan(way, tokens, passed)


def hccl_name(group: Any, rank: int) -> str:
    """The name by which HCCL knows a group of torch.distributed; HCCL connects it if it has not yet."""
    return str(group._get_backend(torch.device("npu")).get_hccl_comm_name(rank))


def join(
    vendor: Vendor, family: Family, device: torch.device, plain: ExpertExchange, ranks: Ranks, config: ModelConfig,
    engine: EngineConfig, *, chosen: Plan | None = None, name: Callable[[Any, int], str] = hccl_name,
    buffer: Callable[..., Any] | None = None,
) -> ExpertExchange:  # fmt: skip
    """This rank's side of the way that all ranks agree on; called on every rank once they are connected.

    Args:
        chosen: by this rank, by default what `plan` says. name, buffer: of a group and for `mega_moe`, for tests.
    """
    processes = len(ranks.bounds) - 1
    found = agreed(chosen or plan(family, config, engine, processes), ranks, device)
    passed = found.passed_over
    if found.way != "all_to_all":
        # the vendor wants a group in which nothing else runs
        group = dist.new_group(list(range(processes)), backend=dist.get_backend(ranks.group()))

        def make() -> DispatchCombine | MegaMoe:
            if found.way == "dispatch":
                return DispatchCombine(
                    vendor, family, ranks, config, found.tokens, plain, name(group, ranks.rank)
                )
            return MegaMoe(vendor, ranks, config, found.tokens, (buffer or _symmetric_buffer)(
                group, config.n_routed_experts, found.tokens, config.num_experts_per_tok, config.hidden_size,
                config.moe_intermediate_size,
            ))  # fmt: skip

        made = _tried(make, ranks, device)
        if not isinstance(made, str):
            log.info("experts travel by %s%s", found.way, "".join(f"; {why}" for why in passed))
            return made
        log.warning("%s failed on first use, all_to_all serves from now on: %s", found.way, made)
        passed = (*passed, f"{found.way}: failed on first use: {made}")
    log.info("experts travel by all_to_all%s", "".join(f"; {why}" for why in passed))
    return plain


def _tried(
    make: Callable[[], DispatchCombine | MegaMoe], ranks: Ranks, device: torch.device
) -> DispatchCombine | MegaMoe | str:
    """An exchange that worked once on every rank, or why it did not; later there is no way back, matrices are laid out anew."""
    made, why = None, ""
    try:
        made = make()
        made.trial(device)
    except ContractBroken:
        raise
    # whatever a vendor's library raises, v4sdk's own exchange does without
    except Exception as exc:
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    works = torch.tensor([0 if why else 1], dtype=torch.int32, device=device)
    dist.all_reduce(works, dist.ReduceOp.MIN, group=ranks.group())
    if made is not None and bool(works[0]):
        return made
    return why or "it did so on another rank"


def _symmetric_buffer(group: Any, *sizes: int) -> Any:
    """Memory that all ranks of a group share, made by the transformer pack."""
    from importlib import import_module

    return import_module("cann_ops_transformer.ops").get_symm_buffer_for_mega_moe(group, *sizes)


def environment(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What HCCL reads from the environment and is not set here, in words."""
    wanted = {
        _BUFFER: f"MB of a group's buffer, {_BUFFER_MB} by default: 1024 or more lets longer steps go by dispatch and combine",
        "HCCL_OP_EXPANSION_MODE": "AIV lets vector cores start collectives, which shortens those of a decode step",
        "HCCL_CONNECT_TIMEOUT": "seconds until a group must be connected: raise it where ranks load at different speeds",
        "HCCL_SOCKET_IFNAME": "the network interface between machines, where there are several",
    }
    return tuple(f"{name}: {words}" for name, words in wanted.items() if not environ.get(name))


# 910B between machines: source as `roofline.Profile`
_BETWEEN_MACHINES_GB_S = 25


def balance() -> tuple[tuple[str, float, Mapping[str, bool]], ...]:
    """Whether exchange hides behind computing, by the balance rule: a model, not a measurement.

    Communication hides where operations per second / bytes per second of a link <= 2 * the experts' width.

    Returns:
        device, product and link in words, operations per byte, and for each model whether its exchange hides.

    Source: DeepSeek-V4 report, section 3.1; peaks and links as `roofline.Profile`.
    """
    rows = []
    for p in PROFILES:
        kind, peak = p.widest
        links = [p.link_gb_s, *([_BETWEEN_MACHINES_GB_S] if p.chips[0].startswith("Ascend910B") else [])]
        peaks = [(kind, peak), *([("FP4", 2 * peak)] if kind == "FP8" else [])]
        for product, tera in peaks:
            for link in links:
                ratio = tera * 1e3 / link
                hides = {model: ratio <= bound for model, bound in BALANCE.items()}
                rows.append((f"{p.name}, {product}, {link} GB/s ({LABEL})", ratio, hides))
    return tuple(rows)
