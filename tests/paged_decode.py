"""Run by the test of paging, in a process of its own: decodes under a memory limit and reports the most memory it had.

Arguments: checkpoint folder, bytes allowed beyond what the process has before, `bounded` or `unbounded`, tokens of the prompt.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable

from v4sdk import SamplingParams, Session, plugins
from v4sdk.backend import ExpertPaging
from v4sdk.memory import used_memory

TOKENS = 48


class Peak:
    """The most memory this process has had, looked at every millisecond."""

    def __init__(self) -> None:
        self.nbytes = used_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.nbytes = max(self.nbytes, used_memory())

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self.nbytes, used_memory())


def without_bound(page_experts: Callable[[int], ExpertPaging]) -> Callable[[int], ExpertPaging]:
    """The planted fault: a cache that never gives anything back."""
    return lambda budget_bytes: page_experts(1 << 60)


def main() -> None:
    folder, allowed, kind, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    backend = plugins.select("cpu")
    # what torch allocates and maps on first use is there before the measure begins
    with Session.load(backend=backend) as session:
        session.generate("a", SamplingParams(max_tokens=8))
    if kind == "unbounded":
        backend.page_experts = without_bound(backend.page_experts)  # type: ignore[method-assign,assignment]
    before = used_memory()
    notices: list[str] = []
    peak = Peak()
    with Session.load(
        folder, backend=backend, memory_limit=before + allowed, context_limit=tokens + TOKENS,
        prefill_chunk=1024, on_progress=lambda p: notices.append(p.text) if p.kind == "notice" else None,
    ) as session:  # fmt: skip
        prompt = [3 + at * 7 % 50 for at in range(tokens)]
        result = session.generate(
            prompt, SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=5, ignore_eos=True)
        )
        paging = session.loaded.paging
        assert paging is not None
        usage = paging.usage()
        # it holds the weights
        del paging
    with open("/proc/self/maps", encoding="utf-8") as maps:
        still_mapped = sum(folder in line for line in maps)
    report = {
        "grown": peak.end() - before,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "notices": notices,
        "usage": vars(usage),
        "hit_rate": usage.hit_rate,
        "still_mapped": still_mapped,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
