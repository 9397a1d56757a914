"""Stage `model/memory`: peaks of processes of their own, chunks in exact numerics, the first token of a new process."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from v4sdk_bench.record import Row, Value, not_run
from v4sdk_bench.stage import Bench
from v4sdk_bench.suites.model_rows import Subject, row_of, subject

# the shorter one is several chunks long already: within the first few the workspace itself still grows
_MEMORY = {True: (4096, 8192), False: (16_384, 131_072)}
_CHUNK_TOKENS = {True: 4096, False: 131_072}
_PAIRS = 5


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of processes that read a short and a long context, chunks in exact numerics, and the time to a first token."""
    from v4sdk_bench.speed import long_context as lc

    about = subject(bench)
    short_n, long_n = _MEMORY[bench.quick]
    key = f"model/{about.name}/memory/{long_n}"
    what = f"{about.name}: memory from {short_n:,} to {long_n:,} tokens, and the KV formula"
    setting = about.setting | {"tokens": long_n, "short_tokens": short_n}
    if bench.backend.device.type != "cpu":
        yield not_run(
            key, what, "the peak of a process is not the device's; the frontiers tell that", setting=setting
        )
    elif bench.wants(key):
        runs = [
            lc.in_a_process(about.folder, n, None, None, None, bench.say, bench.backend.name)
            for n in (short_n, long_n)
        ]
        grown, formula, limit = lc.growth(*runs)
        values: dict[str, Value] = {
            "grown_bytes": grown, "kv_formula_bytes": formula, "workspace_bytes": max(lc.workspace(run) for run in runs),
            "peak_bytes": runs[1]["rss_peak_bytes"],
        }  # fmt: skip
        limits = {"grown_bytes": limit, "workspace_bytes": lc.WORKSPACE_LIMIT_BYTES}
        yield row_of(bench, key, what, setting, values, limits=limits)
    yield from _chunks(bench, about)
    yield from _first_token(bench, about)


def _chunks(bench: Bench, about: Subject) -> Iterator[Row]:
    from v4sdk_bench.speed import long_context as lc

    tokens = _CHUNK_TOKENS[bench.quick]
    key = f"model/{about.name}/chunks/{tokens}"
    if not bench.wants(key):
        return
    paths = [bench.scratch / f"chunk-{chunk}.pt" for chunk in lc.CHUNKS]
    for chunk, path in zip(lc.CHUNKS, paths, strict=True):
        lc.in_a_process(about.folder, tokens, "exact", chunk, path, bench.say, bench.backend.name)
    what = f"{about.name}: last logits of {tokens:,} tokens read in chunks of {lc.CHUNKS[0]} and of {lc.CHUNKS[1]:,}"
    setting = about.setting | {"tokens": tokens, "numerics": "exact"}
    yield row_of(
        bench,
        key,
        what,
        setting,
        {"relative_l2": lc.chunk_difference(paths)},
        limits={"relative_l2": lc.CHUNK_LIMIT},
    )


def _first_token(bench: Bench, about: Subject) -> Iterator[Row]:
    from v4sdk_bench.speed import first_token as ft

    key, what = (
        f"model/{about.name}/first-token",
        f"{about.name}: `v4sdk run` to its first token, beside `import torch`",
    )
    if bench.quick or bench.model is not None:
        why = (
            "takes a minute; a full run measures it"
            if bench.quick
            else "measured with the bundled model only"
        )
        yield not_run(
            key, what, why, setting=about.setting, command="python -m v4sdk_bench.speed.first_token"
        )
        return
    bench.say(f"{about.name}: the first token of a new process")
    pairs = ft.pairs(_PAIRS)
    differences = [run - imported for imported, run in pairs]
    values: dict[str, Value] = {
        "difference": statistics.median(differences), "difference_least": min(differences),
        "difference_most": max(differences), "import_s": statistics.median(p[0] for p in pairs),
        "first_token_s": statistics.median(p[1] for p in pairs), "pairs": len(pairs),
    }  # fmt: skip
    yield row_of(
        bench,
        key,
        what,
        about.setting,
        values,
        limits={"difference": ft.LIMIT_S},
        note="differences in seconds",
    )
