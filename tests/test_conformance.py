"""The conformance suite itself: right kernels pass, wrong ones are caught, whatever way they are wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from v4sdk import ops, plugins
from v4sdk.backend import Backend, EngineConfig, Kernel, bind, kernel
from v4sdk.config import ModelConfig
from v4sdk.errors import KernelMismatch
from v4sdk.numerics import Numerics
from v4sdk.testing import Report, assert_close, compare, poisoned_memory, run_conformance
from v4sdk.testing.compare import (
    EXACT,
    FP8_INPUTS,
    FP8_INPUTS_FP4,
    INT8_INPUTS,
    INT8_INPUTS_FP4,
    by_norm,
    compare_selection,
    describe,
    tolerance_for,
)
from v4sdk.weight_formats import pack_int8
from v4sdk.weights import Weight

CONFIG = ModelConfig(
    vocab_size=24, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=48, o_groups=2, o_lora_rank=40, sliding_window=8, compress_ratios=(0, 4, 8),
    compress_rope_theta=160000.0, rope_theta=10000.0, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=160, num_hash_layers=1,
    routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=2, hc_sinkhorn_iters=3, hc_eps=1e-6, rms_norm_eps=1e-6,
    max_position_embeddings=1024,
)  # fmt: skip
ECHO = Path(__file__).parent / "plugin_echo"


class Planted(Backend):
    """A backend with one planted kernel."""

    name = "planted"
    evidence = "emulated"

    def __init__(self, *rows: Kernel[Any, Any], gaps: dict[str, str] | None = None) -> None:
        self.rows, self.known_gaps = rows, gaps or {}

    def unavailable(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def kernels(self) -> Sequence[Kernel[Any, Any]]:
        return self.rows


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The example plugin, found through an entry point."""
    info = tmp_path / "v4sdk_echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: v4sdk-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[v4sdk]\necho = v4sdk_echo\n")
    monkeypatch.syspath_prepend(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    return plugins.select("echo")


def right_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)


def judge(*rows: Kernel[Any, Any], gaps: dict[str, str] | None = None, only: str = "rms_norm") -> Report:
    return run_conformance(Planted(*rows, gaps=gaps), CONFIG, ops=[only])


def failures(report: Report) -> str:
    return " | ".join(
        f"{r.op}/{r.case} {r.status}: {r.detail}" for r in report.results if r.status != "passed"
    )


def test_the_example_plugin_conforms_with_kernels_of_its_own(echo: Backend) -> None:
    report = run_conformance(echo, CONFIG, ops=["rms_norm", "hc_post", "hc_post_pre", "hc_pre"])
    assert report.ok, failures(report)
    ran = {row.op: (row.how, row.evidence) for row in report.results}
    assert ran == {
        "rms_norm": ("kernel", "emulated"),
        "hc_post": ("kernel", "emulated"),
        # the fused op has no kernel: its parts run, and two of them are the plugin's
        "hc_post_pre": ("parts", "emulated"),
        "hc_pre": ("reference", "reference"),
    }


def test_a_third_kernel_planted_wrong_makes_it_red(echo: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def hc_pre(*args: Any, **kwargs: Any) -> Any:
        u, post, comb = ops.hc_pre(*args, **kwargs)
        return u, post, comb.transpose(1, 2)

    hc_pre.__signature__ = ops.hc_pre.signature  # type: ignore[attr-defined]
    own = tuple(echo.kernels())
    monkeypatch.setattr(type(echo), "kernels", lambda self: (*own, kernel(ops.hc_pre, hc_pre)))
    report = run_conformance(echo, CONFIG, ops=["rms_norm", "hc_post", "hc_pre"])
    assert not report.ok
    assert {row.op for row in report.results if row.status == "failed"} == {"hc_pre"}


def _biased(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return right_norm(x, weight, eps, dtype) * 1.05


def _unwritten(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    if x.shape[0] > 1:
        out[:-1] = right_norm(x, weight, eps, dtype)[:-1]
    return out


def _in_place(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    result = right_norm(x, weight, eps, dtype)
    x.zero_()
    return result


def _wrong_dtype(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return right_norm(x, weight, eps, torch.float64)


def _raises(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    raise RuntimeError("no kernel image")


def _ignores_out(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    return right_norm(x, weight, eps, dtype)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_biased, "times what is accepted"),
        (_unwritten, "NaN on one side only"),
        (_in_place, "argument `x` was changed in place"),
        (_wrong_dtype, "dtype torch.float64"),
        (_raises, "RuntimeError: no kernel image"),
        (_ignores_out, "NaN on one side only"),
    ],
)
def test_a_wrong_kernel_is_caught(function: Any, said: str) -> None:
    report = judge(kernel(ops.rms_norm, function))
    assert not report.ok
    assert said in failures(report)


def test_a_signature_that_differs_is_refused() -> None:
    def rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
        return x

    with pytest.raises(
        KernelMismatch, match=r"takes \(x, weight, dtype, eps\), expected \(x, weight, eps, dtype\)"
    ):
        judge(Kernel(ops.rms_norm, rms_norm))


def test_a_broken_unless_is_reported() -> None:
    def unless(config: ModelConfig, engine: object) -> str | None:
        raise AttributeError("no such field")

    report = judge(kernel(ops.rms_norm, right_norm, unless=unless))
    assert not report.ok
    assert "its `unless` failed: AttributeError: no such field" in failures(report)


def test_a_kernel_that_declines_is_not_run() -> None:
    report = judge(kernel(ops.rms_norm, _raises, unless=lambda config, engine: "not today"))
    assert report.ok
    assert {row.how for row in report.results} == {"reference"}


def test_an_old_api_version_is_refused() -> None:
    backend = Planted()
    backend.api = 0
    with pytest.raises(KernelMismatch, match="written for backend API 0"):
        run_conformance(backend, CONFIG, ops=["rms_norm"])


def test_a_table_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Planted) -> list[Kernel[Any, Any]]:
        raise ImportError("libnothing.so: cannot open shared object file")

    monkeypatch.setattr(Planted, "kernels", broken)
    with pytest.raises(KernelMismatch, match="cannot list its kernels: ImportError: libnothing"):
        bind(Planted(), CONFIG, EngineConfig())
    monkeypatch.setattr(Planted, "kernels", lambda self: [right_norm])
    with pytest.raises(
        KernelMismatch, match=r"lists a function, expected kernels of ops in `v4sdk\.ops\.OPS`"
    ):
        bind(Planted(), CONFIG, EngineConfig())


def test_ties_that_go_to_the_highest_id_are_caught() -> None:
    def route(
        u: Tensor, gate: Tensor, bias: Tensor, num_experts_per_tok: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        ids, weights = ops.route(u, gate.flip(0), bias.flip(0), num_experts_per_tok, scale)
        return gate.shape[0] - 1 - ids, weights

    report = judge(kernel(ops.route, route), only="route")
    failed = {row.case for row in report.results if row.status == "failed"}
    assert failed == {"ties-tiny-decode-exact", "ties-tiny-chunk-exact"}


def test_known_gaps_are_reported_and_an_unexpected_pass_fails() -> None:
    failing = [row.case for row in judge(kernel(ops.rms_norm, _biased)).results if row.status == "failed"]
    gaps = {f"rms_norm/{case}": "a bias we know of" for case in failing}
    known = judge(kernel(ops.rms_norm, _biased), gaps=gaps)
    assert known.ok
    assert {row.status for row in known.results} == {"passed", "known gap"} or len(failing) == len(
        known.results
    )
    repaired = judge(kernel(ops.rms_norm, right_norm), gaps=gaps)
    assert not repaired.ok
    assert "unexpected pass" in failures(repaired)


def test_a_gap_that_names_no_case_fails() -> None:
    report = judge(gaps={"rms_norm/no-such-case": "left over"})
    assert "no op has a case of this name" in failures(report)


def test_the_receipt_is_json_with_op_case_error_and_evidence() -> None:
    receipt = json.loads(json.dumps(judge(kernel(ops.rms_norm, right_norm)).receipt()))
    assert receipt["ok"]
    assert receipt["backend"] == "planted"
    assert {
        "op",
        "case",
        "how",
        "evidence",
        "status",
        "max_abs",
        "worst",
        "detail",
        "relative_l2",
        "cosine",
    } == set(receipt["cases"][0])


def test_a_result_carries_its_relative_l2_and_cosine() -> None:
    worst = max(judge(kernel(ops.rms_norm, _biased)).results, key=lambda row: row.relative_l2)
    # 5% too long in the right direction
    assert abs(worst.relative_l2 - 0.05) < 0.01
    assert worst.cosine > 0.99999


def test_poisoned_memory_ends() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
        assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
    assert "new_empty" not in vars(Tensor)
    assert torch.empty.__name__ == "empty"


def test_comparison_counts_what_is_accepted() -> None:
    one = torch.ones(3)
    assert_close(one, one + 1e-6)
    with pytest.raises(AssertionError, match="times what is accepted"):
        assert_close(one, one + 1e-3)
    assert compare(one, torch.ones(4), EXACT).problem == "shape [3], expected [4]"
    infinite = torch.tensor([float("inf"), float("-inf"), 1.0])
    assert compare(infinite, infinite, EXACT).ok
    assert not compare(infinite, torch.tensor([float("inf"), 0.0, 1.0]), EXACT).ok


def test_choices_are_compared_as_sets() -> None:
    ids = torch.tensor([[3, 1, -1], [0, 2, 5]])
    assert compare_selection(ids[:, [1, 0, 2]], ids, 0.01).ok
    assert not compare_selection(ids + (ids == 5), ids, 0.01).ok


class Integers(Planted):
    """A device with BF16 rows and int8 products only, whose linear rounds its inputs, or is wrong."""

    kv_formats = ("bf16", "float32")
    product_inputs = "int8"

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(kernel(ops.linear, self._linear), kernel(ops.sparse_attn, self._sparse_attn))
        self._factor, self.rows_seen = factor, set[torch.dtype]()

    def converted(self, role: str, weight: Weight) -> Weight:
        data, scale = pack_int8(weight.dequantize())
        return Weight(data, scale, "int8", (1, weight.in_features))

    def _linear(
        self, x: Tensor, weight: Weight, numerics: Numerics, dtype: torch.dtype | None = None
    ) -> Tensor:
        assert weight.encoding == "int8"
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        rounded = (x.float() / scale).round() * scale
        return ops.linear(rounded, weight, numerics, dtype or x.dtype) * self._factor

    def _sparse_attn(
        self, q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, picks: Tensor | None, batch: ops.Batch,
        sink: Tensor, ratio: int, rope_dim: int, numerics: Numerics,
    ) -> Tensor:  # fmt: skip
        self.rows_seen.add(window.dtype)
        return ops.sparse_attn(q, kv, window, entries, picks, batch, sink, ratio, rope_dim, numerics)


def test_cases_have_the_rows_and_matrices_that_the_backend_keeps() -> None:
    backend = Integers()
    assert run_conformance(backend, CONFIG, ops=["sparse_attn", "linear"]).ok
    assert backend.rows_seen == {torch.bfloat16, torch.float32}, "float32 where nothing is rounded"


def test_an_integer_product_is_judged_by_its_norm_and_a_wrong_one_is_caught() -> None:
    report = run_conformance(Integers(1.03), CONFIG, ops=["linear"])
    assert not report.ok
    assert "of the whole tensor" in failures(report)


def test_one_wrong_token_among_many_is_caught() -> None:
    draw = torch.Generator().manual_seed(3)
    expected = torch.randn(512, 64, generator=draw)
    rounded = expected * (1 + 0.01 * torch.randn(512, 64, generator=draw))
    tolerance = tolerance_for(ops.linear, torch.float32)
    assert by_norm(compare(rounded, expected, tolerance), INT8_INPUTS).ok
    noise = rounded.clone()
    noise[7] = torch.randn(64, generator=draw)
    found = compare(noise, expected, tolerance)
    assert found.relative_l2 < FP8_INPUTS.whole.rtol, "of the whole it is little"
    for limits in (INT8_INPUTS, FP8_INPUTS, INT8_INPUTS_FP4, FP8_INPUTS_FP4):
        judged = by_norm(found, limits)
        assert not judged.ok
        assert "of each row" in describe(judged)
