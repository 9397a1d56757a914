"""Reports of records: what is compared, what is refused, what a reader sees, and what a hostile record cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from v4sdk_bench.record import Record, Row, not_run

OPS = ("embed", "rms_norm", "linear", "hc_pre", "sparse_attn", "index_topk", "routed_experts", "logits")
CONTEXTS = (512, 1024, 2048, 4096, 8192)
BUCKETS = ("0-3", "4-7", "8-127", "128-131", "to the top-k limit", "beyond")
PRINT = "3f9ac2d1b7e84a55"


def command(key: str) -> str:
    """As a suite would write it."""
    return f"v4sdk bench run --quick --only '{key}'"


def sample(
    speed: float = 1.0, backend: str = "cpu", processor: str = "AMD EPYC 9V45", threads: int = 2, fingerprint: str = PRINT,
    fails: tuple[str, ...] = (), noise: float = 0.03, quick: bool = True, evidence: Any = "reference", **rest: Any,
) -> Record:  # fmt: skip
    """A record as a run of every suite leaves it behind; rows whose key begins with one of `fails` are wrong."""
    record = Record(
        "2026-11-22T22:10:04+00:00", f"v4sdk bench run --backend {backend} --quick",
        {"suites": ["parity", "ops", "model", "claims"], "backend": backend, "quick": quick, "seed": 0, "peers": {}},
        {"processor": processor, "cores": 2, "threads": threads, "memory_bytes": 25_276_502_016, "load": 0.4},
        {"python": "3.11.7", "v4sdk": "0.1.0", "torch": "2.13.0+cpu", "v4sdk_sources": "a1b2c3d4e5f6"},
        finished="2026-11-22T22:19:40+00:00", status="complete",
        models={"v4-nano": {"fingerprint": fingerprint, "parameters": 2_800_000, "bytes": 2_900_000}},
        ceilings=[
            {"name": n, "value": v / speed, "unit": u, "low": v * 0.95 / speed, "high": v / speed, "threads": threads,
             "buffer_bytes": 3 << 29, "date": "2026-11-22T22:12:00+00:00", "how": "stream"}
            for n, v, u in (("copy", 1.6e10, "bytes_per_s"), ("read", 2.7e10, "bytes_per_s"),
                            ("gemm/float32", 3.3e11, "flops_per_s"), ("gemm/bfloat16", 2.1e12, "flops_per_s"))
        ],
        stages={f"{s}/all": {"state": "done", "seconds": 61.2, "budget_s": 90.0, "note": ""} for s in ("parity", "ops", "model", "claims")},
    )  # fmt: skip
    for row in [
        *parity_rows(evidence),
        *op_rows(speed),
        *model_rows(speed),
        *peer_rows(speed),
        *claim_rows(noise),
    ]:
        record.add(spoilt(row) if fails and row.key.startswith(fails) else row)
    for name, value in rest.items():
        setattr(record, name, value)
    return record


def spoilt(row: Row) -> Row:
    """The same row with a wrong result: over its limit, and without speeds."""
    values = {
        k: v for k, v in row.values.items() if not k.endswith(("_s", "_per_s", "_of_ceiling", "_ratio"))
    }
    values |= {k: v * 40 for k, v in row.limits.items() if not k.startswith(">=")}
    return replace(row, state="failed", values=values, note="planted fault")


def parity_rows(evidence: Any) -> list[Row]:
    """Ops, layers, whole model by position, invariances, tasks, witness, calibration."""
    rows = []
    for i, op in enumerate(OPS):
        for j, case in enumerate(
            ("tiny-decode-exact", "tiny-prefill-fast", "odd-prefill-exact", "float-prefill-exact")
        ):
            found = {
                "error": 0.02 + 0.11 * i * (j + 1) % 0.9,
                "max_abs": 3e-6 * (i + 1),
                "relative_l2": 2e-7 * (j + 1),
                "cosine_min": 0.9999998,
            }
            key = f"parity/op/{op}/{case}"
            rows.append(
                Row(
                    key,
                    f"{op}, {case}, against its reference",
                    "ok",
                    evidence,
                    found,
                    {"error": 1.0},
                    {"case": case},
                    command=command(key),
                    seed=0,
                )
            )
    for layer in range(6):
        key = f"parity/layer/v4-nano/{layer}"
        rows.append(
            Row(
                key,
                f"v4-nano, layer {layer}",
                "ok",
                evidence,
                {"max_abs": 4e-6 * (layer + 1), "relative_l2": 1e-6},
                {"max_abs": 1e-4},
                command=command(key),
            )
        )
    for i, bucket in enumerate(("all", *BUCKETS)):
        key = f"parity/model/v4-nano/fast-to-reference/{bucket}"
        found = {"positions": 400 + i, "max_abs": 0.031, "relative_l2": 2.1e-3, "cosine_min": 0.99991, "kl_mean": 7.7e-6 * (i + 1),
                 "kl_p99": 4e-5, "kl_max": 9e-4, "top1": 0.998, "top5": 0.991, "verdict": "same within precision"}  # fmt: skip
        rows.append(
            Row(
                key,
                f"v4-nano: fast against reference, positions {bucket}",
                "ok",
                evidence,
                found,
                {"kl_mean": 2e-3},
                {"tokens": 512},
                command=command(key),
                seed=0,
            )
        )
    for name in ("prefill = decode", "chunked = whole", "batched = alone", "resumed = fresh", "run = rerun"):
        key = f"parity/invariance/v4-nano/{name.replace(' = ', '-')}"
        rows.append(
            Row(
                key,
                name,
                "ok",
                evidence,
                {"relative_l2": 8.2e-7, "max_abs": 3e-6, "verdict": "same model"},
                {"relative_l2": 1e-5},
                command=command(key),
            )
        )
    for task, share in (("arithmetic", 1.0), ("look-up", 1.0), ("tool call", 0.948), ("copy", 0.944)):
        key = f"parity/tasks/{task.replace(' ', '-')}"
        rows.append(
            Row(
                key,
                f"v4-nano: {task}",
                "ok",
                evidence,
                {"accuracy": share, "questions": 50},
                {">=accuracy": 0.9},
                command=command(key),
                seed=1,
            )
        )
    rows.append(
        Row(
            "parity/onnx/v4-nano",
            "prefill exported and run elsewhere",
            "ok",
            evidence,
            {"relative_l2": 4e-7, "max_abs": 9e-6},
            {"relative_l2": 1e-5},
            command=command("parity/onnx"),
        )
    )
    for name, kl, word in (
        ("KV rows in BF16", 2e-4, "same within precision"),
        ("one layer without rope", 0.31, "different model"),
    ):
        key = f"parity/calibration/{name.replace(' ', '-')}"
        rows.append(
            Row(
                key, name, "ok", evidence, {"kl_mean": kl, "top1": 0.7, "verdict": word}, command=command(key)
            )
        )
    rows.append(
        not_run(
            "parity/official",
            "official greedy continuations",
            "no released weights at hand",
            command=command("parity/official"),
        )
    )
    return rows


def op_rows(speed: float) -> list[Row]:
    """Timed ops, the noise of the machine, a kernel against its reference."""
    rows = []
    for i, op in enumerate(OPS):
        for case, size in (("tiny-decode-fast", 1), ("flash-decode-fast", 1000)):
            key = f"ops/{op}/{case}"
            flops = 0 if op == "embed" else int(3e5 * size * (i + 1) ** 2)
            took = 1.4e-5 * size**0.9 * (i + 1) / speed
            found = {"error": 0.1, "moved_bytes": 60_000 * size * (i + 1), "flops": flops, "how": "reference", "in_cache": size == 1,
                     "median_s": took, "low_s": took * 0.97, "high_s": took * 1.06, "rounds": 40, "spread": 0.09}  # fmt: skip
            if size > 1:
                found |= {"floor_s": took * 0.31, "bound": "bytes", "share_of_ceiling": 0.31}
            rows.append(
                Row(
                    key,
                    f"{op}, {case}",
                    "ok",
                    "reference",
                    found,
                    {"error": 1.0},
                    {"op": op, "case": case, "dtype": "bfloat16"},
                    command=command(key),
                )
            )
    return rows


def model_rows(speed: float) -> list[Row]:
    """Frontiers, batches, a real layer."""
    rows = []
    for n in CONTEXTS:
        key, tpot = f"model/v4-nano/frontier/{n}", (0.011 + n * 4e-7) / speed
        found = {"ttft_s": 0.0011 * n**0.95 / speed, "ttft_low_s": 0.00105 * n**0.95 / speed, "ttft_high_s": 0.0012 * n**0.95 / speed,
                 "tpot_s": tpot, "tpot_low_s": tpot * 0.96, "tpot_high_s": tpot * 1.07, "prefill_tokens_per_s": 880 * speed,
                 "kv_bytes": 30_000 + 58 * n, "kv_formula_bytes": 29_000 + 58 * n, "peak_bytes": 310_000_000 + 900 * n, "rounds": 16}  # fmt: skip
        rows.append(
            Row(
                key,
                f"v4-nano after {n:,} tokens",
                "info",
                "reference",
                found,
                {},
                {"tokens": n, "numerics": "fast", "kv_format": "native"},
                command=command(key),
                seed=0,
            )
        )
    rows.append(
        not_run(
            "model/v4-nano/frontier/131072",
            "v4-nano after 131,072 tokens",
            "quick run: contexts up to 8,192 tokens",
            command="v4sdk bench run --suite model",
            setting={"tokens": 131072},
        )
    )
    rows.append(
        Row(
            "model/v4-nano/batch/4",
            "4 sequences at once",
            "info",
            "reference",
            {"tpot_s": 0.021 / speed, "tokens_per_s": 190 * speed},
            command=command("model/v4-nano/batch"),
        )
    )
    rows.append(
        Row(
            "model/layer/flash-csa",
            "one CSA layer of Flash sizes",
            "info",
            "reference",
            {"median_s": 0.12 / speed, "low_s": 0.11 / speed, "high_s": 0.14 / speed},
            setting={"dtype": "fp8"},
            command=command("model/layer"),
        )
    )
    return rows


def peer_rows(speed: float) -> list[Row]:
    """One peer that computes the same, one that does not, one that is not installed."""
    values = {
        "kl_mean": 4.4e-4,
        "top1": 0.984,
        "verdict": "same within precision",
        "prefill_tokens_per_s": 245.0 * speed,
        "tpot_s": 0.0202 / speed,
    }
    return [
        Row("model/peers/transformers/bf16", "transformers 5.23, BF16", "ok", "reference", values, {"kl_mean": 1e-2}, {"threads": 2}, command=command("model/peers")),
        Row("model/peers/other/native", "an engine with other equations", "failed", "reference", {"kl_mean": 0.4, "top1": 0.349, "verdict": "different model"}, {"kl_mean": 5e-2}, note="mean KL 0.4 nats: it computes a different model", command=command("model/peers")),
        not_run("model/peers/llama_cpp", "llama.cpp", "not given: --peer llama_cpp=PYTHON", command=command("model/peers")),
    ]  # fmt: skip


def claim_rows(noise: float) -> list[Row]:
    """The noise row, a ratio and the exchange between ranks."""
    pair = {
        "a_median_s": 0.010,
        "b_median_s": 0.007,
        "speed_ratio": 1.42,
        "low_ratio": 1.38,
        "high_ratio": 1.47,
        "noise": noise,
    }
    still = pair | {"speed_ratio": 1.01, "low_ratio": 0.97, "high_ratio": 1.04}
    return [
        Row("ops/noise", "the same call against itself", "info", "reference", still | {"verdict": "no difference (within the noise of 3%)"}, command=command("ops/noise")),
        Row("ops/linear/flash-decode-fast/against-reference", "linear: reference (a) and kernel (b) in turns", "info", "reference", pair | {"verdict": "b is 1.42 times faster (1.38 to 1.47)"}, command=command("ops/linear")),
        Row("claims/expert-parallel/overlap-2", "wave overlap vs our sequential exchange (gloo, 2 processes)", "info", "reference", pair | {"verdict": "b is 1.42 times faster"}, command=command("claims/expert-parallel")),
    ]  # fmt: skip
