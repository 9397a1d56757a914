"""What the machine can do at all: bandwidth of memory and rate of matrix products, measured in the run that uses them.

Buffers are far larger than any cache, hold random data and were touched before. Each rate is the best of the ways tried, and of
its rounds: a ceiling is what can be reached. Nothing measured may lie above it; what does shows a wrong measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from v4sdk.memory import free_memory
from v4sdk_bench.speed.timing import Call, Sample, sample
from v4sdk_bench.stage import BenchError, now

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from v4sdk.backend import Backend
    from v4sdk.ops.op import Cost

BUFFER_BYTES = 1_500_000_000
BYTES, FLOPS = "bytes_per_s", "flops_per_s"
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
_GEMM_SIDES = (1024, 2048, 4096, 8192)
# a product that takes this long hides its start, and a larger one would only cost time
_LONG_ENOUGH_S = 0.05
_DEVICE_LAST_LEVEL = "L2_cache_size"
_PROBE_READS = 7
# floats of the random pattern that fills a buffer, and columns of the matrix that is read
_TILE, _COLUMNS = 1 << 20, 1 << 12


@dataclass(frozen=True)
class Ceiling:
    """One measured limit of the machine.

    Attributes:
        name: `copy`, `read`, or `gemm/` and a dtype. value: the best round, in `unit`.
        low, high: 10th and 90th percentile of the rounds. threads: of torch, the same as in everything compared with it.
        buffer_bytes: size of each operand. how: the way that was fastest. date: UTC.
    """

    name: str
    value: float
    unit: str
    low: float
    high: float
    threads: int
    buffer_bytes: int
    date: str
    how: str = ""


def measure(
    device: torch.device,
    sync: Call | None,
    budget_s: float,
    dtypes: Sequence[str] = DTYPES,
    buffer_bytes: int = BUFFER_BYTES,
) -> list[Ceiling]:
    """Measure copy and read bandwidth, and matrix products in every dtype of `dtypes` that the device has.

    Args:
        sync: waits for the device. buffer_bytes: of each buffer; less is taken only where memory is short.
    """
    import torch

    with torch.inference_mode():
        # a third for each kind of bandwidth, the rest for the products
        found = _bandwidths(device, sync, budget_s * 2 / 3, buffer_bytes)
        for dtype in dtypes:
            gemm = _gemm(device, sync, budget_s / 3 / len(dtypes), dtype)
            if gemm is not None:
                found.append(gemm)
    return found


class ReadProbe:
    """Reads one buffer whenever it is asked: the bandwidth of a moment, on a machine that is shared.

    Raises:
        BenchError: if memory has no room for the buffer.
    """

    def __init__(self, device: torch.device, sync: Call | None, buffer_bytes: int = BUFFER_BYTES) -> None:
        free = _free_on(device)
        if free is not None and free < 2 * buffer_bytes:
            raise BenchError(f"{free:,} bytes of memory are free, reading {buffer_bytes:,} needs twice that")
        self._sync, self._source = sync, _buffer(device, buffer_bytes)
        self._read = min(
            _reads(self._source), key=lambda way: sample(way[1], 0.0, least=3, sync=sync).median
        )[1]

    def rate(self) -> float:
        """Bytes per second, the middle of a few reads."""
        seconds: float = sample(self._read, 0.0, least=_PROBE_READS, sync=self._sync).median
        return self._source.nbytes / seconds


def best(ceilings: Sequence[Ceiling | Mapping[str, Any]]) -> list[Ceiling]:
    """One ceiling of each name, the highest: of measurements before and after, or as a record keeps them."""
    highest: dict[str, Ceiling] = {}
    for one in ceilings:
        ceiling = one if isinstance(one, Ceiling) else Ceiling(**one)
        if ceiling.name not in highest or ceiling.value > highest[ceiling.name].value:
            highest[ceiling.name] = ceiling
    return list(highest.values())


def floor_s(cost: Cost, ceilings: Sequence[Ceiling], dtype: str, in_cache: bool = False) -> tuple[float, str]:
    """The least time a call can take, and what sets it: `bytes` or `flops`.

    Products of a narrow dtype may run in float32 where the device is faster there, so the faster of the two counts.

    Args:
        dtype: of the matrix products, `float32` or `bfloat16`. in_cache: memory is not read, so its bandwidth sets no floor.

    Raises:
        BenchError: if a ceiling that is needed was not measured.
    """
    wide = {"float32", dtype}
    rate = max((c.value for c in ceilings if c.name.removeprefix("gemm/") in wide), default=0.0)
    bandwidth = max((c.value for c in ceilings if c.unit == BYTES), default=0.0)
    if (cost.flops and not rate) or not bandwidth:
        missing = "memory bandwidth" if not bandwidth else f"matrix products in {dtype}"
        raise BenchError(f"the ceiling of {missing} was not measured, so there is no floor to compare with")
    by_bytes = 0.0 if in_cache else cost.bytes / bandwidth
    by_flops = cost.flops / rate if cost.flops else 0.0
    return (by_bytes, "bytes") if by_bytes >= by_flops and not in_cache else (by_flops, "flops")


def share(floor: float, seconds: float) -> float:
    """The measured call as a share of the ceiling.

    Raises:
        BenchError: above 1, since nothing is faster than its floor: the measurement is wrong.
    """
    found = floor / seconds
    if found > 1:
        raise BenchError(
            f"the measured time, {seconds:.3g} s, is below its floor, {floor:.3g} s: {found:.0%} of the ceiling",
            hint="measure again on a quiet machine; if it stays, the cost of the op or the ceiling is wrong",
        )
    return found


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache in front of the device's memory; 0 where nobody says."""
    if device.type != "cpu":
        import torch

        properties = torch.get_device_module(device).get_device_properties(device)
        return int(getattr(properties, _DEVICE_LAST_LEVEL, 0))
    from v4sdk_bench.machine import last_level_cache_bytes as of_host

    return of_host() or 0


def free_bytes(backend: Backend) -> int | None:
    """What may still be allocated where the backend's tensors live; None if nobody says."""
    of_device = backend.memory()
    if of_device is not None:
        return of_device.free_bytes
    of_system = free_memory() if backend.device.type == "cpu" else None
    return of_system.nbytes if of_system else None


def _free_on(device: torch.device) -> int | None:
    if device.type == "cpu":
        found = free_memory()
        return found.nbytes if found else None
    import torch

    return int(torch.get_device_module(device).mem_get_info(device)[0])


def _bandwidths(device: torch.device, sync: Call | None, budget_s: float, wanted: int) -> list[Ceiling]:
    free = _free_on(device)
    # two buffers, and room for everybody else
    size = wanted if free is None else min(wanted, free // 4)
    source, into = _buffer(device, size), _buffer(device, size)
    ways = (("copy", 2, _copies(source, into)), ("read", 1, _reads(source)))
    return [
        _fastest(name, calls, factor * source.nbytes, source.nbytes, sync, budget_s / 2)
        for name, factor, calls in ways
    ]


def _buffer(device: torch.device, size: int) -> Tensor:
    """Random numbers, all of them written: float32 in [0, 1), whose bits serve as integers too."""
    import numpy as np
    import torch

    tile = torch.rand(min(size // 4, _TILE), device=device)
    # up to whole tiles, since no buffer may be smaller than was asked for
    shape = max(1, -(-size // 4 // tile.numel())), tile.numel()
    if device.type == "cpu":
        # NumPy asks the system for large pages, which are touched in a tenth of the time
        return torch.from_numpy(np.empty(shape, np.float32)).copy_(tile).view(-1)
    return torch.empty(shape, device=device).copy_(tile).view(-1)


def _copies(source: Tensor, into: Tensor) -> Iterator[tuple[str, Call]]:
    yield "tensor copy", lambda: into.copy_(source)
    if source.device.type == "cpu":
        yield "array copy", _array_copy(source, into)


def _array_copy(source: Tensor, into: Tensor) -> Call:
    """Another routine of the C library, which may write past the caches; on as many threads as torch has."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    threads = torch.get_num_threads()
    pairs = list(
        zip(np.array_split(into.numpy(), threads), np.array_split(source.numpy(), threads), strict=True)
    )
    if threads == 1:
        return lambda: np.copyto(*pairs[0])
    pool = ThreadPoolExecutor(threads)
    # NumPy lets other threads run while it copies
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def _reads(source: Tensor) -> Iterator[tuple[str, Call]]:
    import torch

    yield "integer sum", source.view(torch.int64).sum
    yield "float sum", source.sum
    matrix = source[: source.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    vector = torch.rand(_COLUMNS, device=source.device)
    yield "matrix times vector", lambda: torch.mv(matrix, vector)


def _gemm(device: torch.device, sync: Call | None, budget_s: float, dtype: str) -> Ceiling | None:
    """The fastest square product; None where the device or torch has none of this dtype."""
    import torch

    fastest: Ceiling | None = None
    for side in _GEMM_SIDES:
        try:
            call, nbytes = _product(device, side, getattr(torch, dtype))
            once = sample(call, 0.0, least=1, sync=sync)
        except (RuntimeError, AttributeError, ValueError):
            # this build of torch has no such product, or memory none of this size: the smaller ones count, and a dtype
            # without any has no ceiling until torch brings one
            break
        found = _rates(f"gemm/{dtype}", once, 2 * side**3, FLOPS, nbytes, f"{side} x {side} x {side}")
        if fastest is None or found.value > fastest.value:
            fastest = found
            best_call, best_side, best_bytes = call, side, nbytes
        if once.median > _LONG_ENOUGH_S or once.median * 8 > budget_s:
            break
    if fastest is None:
        return None
    # many short rounds: one of them finds the machine undisturbed
    rounds = sample(best_call, budget_s, least=8, sync=sync)
    return _rates(f"gemm/{dtype}", rounds, 2 * best_side**3, FLOPS, best_bytes, fastest.how)


def _product(device: torch.device, side: int, dtype: torch.dtype) -> tuple[Call, int]:
    import torch

    if dtype == torch.int8:
        a, b = (torch.randint(-127, 127, (side, side), device=device, dtype=dtype) for _ in range(2))
        return (lambda: torch._int_mm(a, b)), a.nbytes
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if dtype.itemsize == 1:
        one = torch.ones((), device=device)
        # the second operand has to lie column by column
        scaled = torch._scaled_mm
        return (lambda: scaled(x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)), x.nbytes
    out = torch.empty_like(x)
    return (lambda: torch.mm(x, y, out=out)), x.nbytes


def _fastest(
    name: str, ways: Iterator[tuple[str, Call]], work: int, size: int, sync: Call | None, budget_s: float
) -> Ceiling:
    """Try each way shortly, then give the rest of the time to the fastest."""
    tried = [(sample(call, 0.0, least=2, sync=sync), how, call) for how, call in ways]
    first, how, call = min(tried, key=lambda t: min(t[0].seconds))
    left = budget_s - sum(sum(rounds.seconds) for rounds, *_ in tried)
    more = sample(call, left, least=3, sync=sync, warm=0)
    rounds = replace(more, seconds=more.seconds + first.seconds)
    return _rates(name, rounds, work, BYTES, size, how)


def _rates(name: str, rounds: Sample, work: int, unit: str, size: int, how: str) -> Ceiling:
    import torch

    return Ceiling(
        name, work / min(rounds.seconds), unit, work / rounds.high, work / rounds.low, torch.get_num_threads(), size,
        now(), how,
    )  # fmt: skip
