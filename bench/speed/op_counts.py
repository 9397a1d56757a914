"""What a step is made of: calls by op, library calls below them, and the sum of what the ops must move and compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from v4sdk.model import V4Model
from v4sdk.ops.op import Cost, Op, OpTable


class CountingTable(OpTable):
    """Hands out another table's functions, and counts their calls and, where asked, their cost.

    Attributes:
        calls: by op name. read_bytes, write_bytes, flops: summed over all calls.
    """

    def __init__(self, inner: OpTable, costs: bool = False) -> None:
        super().__init__({})
        self._inner, self._costs = inner, costs
        self.calls: Counter[str] = Counter()
        self.read_bytes = self.write_bytes = self.flops = 0

    @property
    def cost(self) -> Cost:
        """Of everything that was called."""
        return Cost(self.read_bytes, self.write_bytes, self.flops)

    def __getitem__(self, op: Op[..., Any]) -> Callable[..., Any]:
        function = self._inner[op]

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[op.name] += 1
            if self._costs and op.cost is not None:
                # before the call, which may change what the cost is read from
                one = op.cost(*args, **kwargs)
                self.read_bytes += one.read_bytes
                self.write_bytes += one.write_bytes
                self.flops += one.flops
            return function(*args, **kwargs)

        return run


class LibraryCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the library's own operations, views included: what the host issues whatever the device is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(model: V4Model, costs: bool = False) -> Iterator[CountingTable]:
    """Count the op calls of a model; parts of a fused op are part of its one call."""
    table = CountingTable(model.ops, costs)
    before, model.ops = model.ops, table
    try:
        yield table
    finally:
        model.ops = before
