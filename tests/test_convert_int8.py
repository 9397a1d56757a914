"""Integer matrices: packing within its bound, folders that say how they are read, and `v4sdk convert` with every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from v4sdk import Session, plugins
from v4sdk.backend import Backend
from v4sdk.checkpoint import Checkpoint
from v4sdk.cli import main
from v4sdk.config import ModelConfig
from v4sdk.config_file import config_dict
from v4sdk.conversion import convert
from v4sdk.convert import FloatTensors, released, round_weights, unquantised, write_checkpoint
from v4sdk.encodings import IntegerLayout
from v4sdk.errors import CheckpointError, ConfigError, ShapeError, V4Error
from v4sdk.info import describe
from v4sdk.loading import bundled_folder
from v4sdk.numerics import FAST, REFERENCE
from v4sdk.ops import linear
from v4sdk.progress import Progress
from v4sdk.quant import int4_pack, int4_unpack
from v4sdk.weight_formats import pack_fp4, pack_int4, pack_int8, round_int4, round_int8
from v4sdk.weights import ExpertWeights, Weight, WeightSource, pick, stack

EIGHT = IntegerLayout("test-w8", int8=("*.attn.wq_b", "*.attn.wo_b", "*.ffn.experts.*", "*.ffn.shared_experts.*"))  # fmt: skip
FOUR = replace(EIGHT, name="test-w4", int8=("*.attn.w?_b",), int4=("*.ffn.experts.*",))
SEEDS, SIZES = st.integers(0, 2**31), st.integers(1, 90)
# a float32 quotient may lie on the wrong side of a tie
HALF = 0.5 + 2.0**-16


def drawn(seed: int, rows: int, cols: int, size: float = 1.0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * size


def eight(x: Tensor) -> Weight:
    return Weight(*pack_int8(x), "int8", (1, x.shape[1]))


def four(x: Tensor, group: int = 0) -> Weight:
    return Weight(*pack_int4(x, group), "int4", (1, group or x.shape[1]))


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, SIZES, st.floats(1e-30, 1e30))
def test_int8_moves_a_value_by_at_most_half_a_scale(seed: int, rows: int, cols: int, size: float) -> None:
    x = drawn(seed, rows, cols, size)
    packed = eight(x)
    assert packed.scale is not None
    assert (packed.data.dtype, packed.scale.dtype) == (torch.int8, torch.float32)
    assert (packed.data.shape, packed.scale.shape) == ((rows, cols), (rows, 1))
    assert int(packed.data.abs().max()) <= 127
    error = (packed.dequantize().double() - x.double()).abs()
    assert bool((error <= HALF * packed.scale.double()).all())
    # no larger than needed: the largest magnitude uses the range, but for the bits that are cut off a scale
    top = x.abs().amax(1, keepdim=True).double() / 127
    power = torch.frexp(packed.scale)[0] == 0.5
    assert bool(((packed.scale <= top * (1 + 2.0**-14)) | power).all())


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 4), st.sampled_from([0, 2, 16, 32]), st.floats(1e-30, 1e30))
def test_int4_moves_a_value_by_at_most_half_a_scale(
    seed: int, rows: int, groups: int, group: int, size: float
) -> None:
    x = drawn(seed, rows, 32 * groups, size)
    packed = four(x, group)
    assert packed.scale is not None
    assert packed.data.shape == (rows, 16 * groups)
    assert packed.in_features == 32 * groups
    assert packed.scale.shape == (rows, 32 * groups // group if group else 1)
    steps = packed.scale.double().repeat_interleave(group or 32 * groups, 1)
    assert bool(((packed.dequantize().double() - x.double()).abs() <= HALF * steps).all())


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, SIZES, st.floats(1e-30, 1e30))
def test_integer_times_scale_is_exact_and_packing_again_changes_nothing(
    seed: int, rows: int, half: int, size: float
) -> None:
    x = drawn(seed, rows, 2 * half, size)
    for weight, again in ((eight(x), eight), (four(x), four)):
        assert weight.scale is not None
        codes = int4_unpack(weight.data) if weight.encoding == "int4" else weight.data
        assert torch.equal(weight.dequantize().double(), codes.double() * weight.scale.double())
        assert torch.equal(again(weight.dequantize()).dequantize(), weight.dequantize())


def test_known_vectors() -> None:
    # the largest magnitude 254 gives scale 2; ties go to the even code; nothing falls on a power-of-two grid of 127 steps
    packed = eight(torch.tensor([[254.0, -254.0, 1.0, 3.0, 4.5, -0.5]]))
    assert packed.data.tolist() == [[127, -127, 0, 2, 2, 0]]
    assert packed.scale is not None
    assert packed.scale.item() == 2.0
    nibbles = int4_pack(torch.tensor([[1, -1, 7, -8, 0, 5]], dtype=torch.int8))
    assert nibbles.view(torch.uint8).tolist() == [[0xF1, 0x87, 0x50]]
    assert int4_unpack(nibbles).tolist() == [[1.0, -1.0, 7.0, -8.0, 0.0, 5.0]]
    packed = four(torch.tensor([[14.0, -14.0, 1.0, 3.0, 5.0, 1.5]]))
    assert int4_unpack(packed.data).tolist() == [[7.0, -7.0, 0.0, 2.0, 2.0, 1.0]]
    zero = eight(torch.zeros(2, 4))
    assert zero.scale is not None
    assert zero.scale.tolist() == [[1.0], [1.0]]
    assert eight(torch.full((1, 2), 2.0**-149)).dequantize().isfinite().all()


def test_a_third_of_scale_is_cut_upward_to_sixteen_bits() -> None:
    packed = eight(torch.tensor([[1.0, 0.3]]))
    assert packed.scale is not None
    scale = packed.scale.double()
    assert scale.item() * 2**22 == int(scale.item() * 2**22), "16 bits below 2**-6"
    assert 1 / 127 <= scale.item() < 1 / 127 + 2.0**-22
    assert packed.data.tolist() == [[127, 38]]


def test_rows_on_a_power_of_two_grid_keep_their_values() -> None:
    # FP4 values are multiples of half a group's scale: rows whose scales lie within a factor of 8 fit into 127 steps
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (64, 64), generator=generator, dtype=torch.uint8).view(torch.int8)
    scale = torch.randint(120, 124, (64, 4), generator=generator, dtype=torch.uint8)
    near = Weight(codes, scale, "fp4", (1, 32)).dequantize()
    assert torch.equal(eight(near).dequantize(), near)
    wide = torch.cat((scale[:, :2], scale[:, 2:] + 40), 1)
    far = Weight(codes, wide, "fp4", (1, 32)).dequantize()
    assert not torch.equal(eight(far).dequantize(), far)
    one = torch.tensor([[127.0, 1.0], [127.0, 0.5]])
    assert torch.equal(eight(one).dequantize()[0], one[0])
    assert not torch.equal(eight(one).dequantize()[1], one[1])


def test_rounding_passes_the_gradient_straight_through() -> None:
    for fake in (round_int8, round_int4):
        x = drawn(1, 5, 32).requires_grad_()
        y = fake(x)
        assert not torch.equal(y, x)
        y.backward(drawn(2, 5, 32))
        assert x.grad is not None
        assert torch.equal(x.grad, drawn(2, 5, 32))


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ShapeError, match="3 columns, expected a multiple of 2"):
        pack_int4(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="48 columns, expected a multiple of 32"):
        pack_int4(torch.zeros(2, 48), 32)
    with pytest.raises(ShapeError, match="float matrix"):
        pack_int8(torch.zeros(2, 2, 2))


@pytest.mark.parametrize("make", [eight, four, lambda x: four(x, 16)], ids=["int8", "int4", "int4 groups"])
def test_stacks_picks_and_row_ranges_read_the_same_values(make: Any) -> None:
    weights = tuple(make(drawn(seed, 24, 48)) for seed in range(3))
    whole = torch.stack([w.dequantize() for w in weights])
    stacked = stack(weights)
    assert stacked.data.dtype == torch.int8
    assert torch.equal(stacked.dequantize(), whole)
    chosen = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(pick(stacked, chosen).dequantize(), whole[chosen])
    assert torch.equal(stacked.to(torch.device("cpu")).dequantize(5, 17), whole[:, 5:17])
    assert torch.equal(ExpertWeights(packed=(stacked, stacked, stacked)).expert(1)[2].dequantize(), whole[1])
    assert stacked.nbytes == sum(w.nbytes for w in weights)


def test_the_reference_does_not_round_inputs_of_integer_matrices_to_fp8() -> None:
    x, weight = drawn(4, 3, 128), eight(drawn(5, 16, 128))
    want = x @ weight.dequantize().T
    for numerics in (FAST, REFERENCE):
        assert torch.equal(linear(x, weight, numerics, torch.float32), want)


TINY = ModelConfig(
    vocab_size=24, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=64, qk_rope_head_dim=16,
    q_lora_rank=48, o_groups=2, o_lora_rank=40, sliding_window=8, compress_ratios=(0, 4, 8, 0),
    compress_rope_theta=160000.0, rope_theta=10000.0, index_n_heads=2, index_head_dim=32, index_topk=4,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=160, num_hash_layers=1,
    routed_scaling_factor=1.5, swiglu_limit=10.0, hc_mult=2, hc_sinkhorn_iters=3, hc_eps=1e-6, rms_norm_eps=1e-6,
    max_position_embeddings=1024, rope_factor=16.0, rope_original_context=64, num_nextn_predict_layers=1,
)  # fmt: skip


def float_model(config: ModelConfig) -> dict[str, Tensor]:
    from v4sdk.tensors import expected_tensors

    g = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randint(config.n_routed_experts, spec.shape, generator=g)
        if spec.dtypes[0] == "I64"
        else torch.randn(spec.shape, generator=g) * 0.1
        for spec in expected_tensors(unquantised(config))
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder with companions."""
    folder = tmp_path_factory.mktemp("released") / "source"
    write_checkpoint(folder, released(TINY), float_model(TINY))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("terms")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding.py").write_text("TOOLS = ''")
    (folder / "README.md").write_text("about the released files")
    return folder


@pytest.mark.parametrize("layout", [EIGHT, FOUR, replace(FOUR, int4_group=16)], ids=["w8", "w4", "w4 groups"])
def test_a_converted_folder_is_bound_and_read_by_its_own_configuration(
    source: Path, tmp_path: Path, layout: IntegerLayout
) -> None:
    found = convert(source, tmp_path / "target", layout)
    config = ModelConfig.from_folder(tmp_path / "target")
    assert config == replace(unquantised(TINY), integers=layout)
    with Checkpoint(source) as old, Checkpoint(tmp_path / "target") as new:
        assert (found.source_bytes, found.target_bytes) == (old.nbytes, new.nbytes)
        before, after, weights = FloatTensors(old.config, old), FloatTensors(config, new), WeightSource(new)
        assert list(before) == list(after) or set(before) == set(after)
        rounded = round_weights(config, dict(before))
        for name, x in before.items():
            matrix = name.removesuffix(".weight")
            encoding = layout.encoding(matrix) if f"{matrix}.scale" in new else "float"
            want = rounded[name]
            if encoding == "float":
                # FP8 values are BF16 values, times a power of two
                assert torch.equal(after[name].to(x.dtype), x), name
            else:
                assert weights.weight(matrix).encoding == encoding
                assert torch.equal(after[name], want), name
        names = {n.removesuffix(".scale") for n in new if n.endswith(".scale")}
        assert names == {
            n.removesuffix(".scale")
            for n in old
            if n.endswith(".scale") and layout.encoding(n.removesuffix(".scale")) != "float"
        }
        assert any(n.startswith("mtp.0.ffn.experts.") for n in names)
    kinds = {(r.before, r.after): r for r in found.roundings}
    assert kinds["FP8 E4M3", "BF16"].unchanged == kinds["FP8 E4M3", "BF16"].matrices
    assert 0 < kinds["FP8 E4M3", "INT8"].mean <= kinds["FP8 E4M3", "INT8"].largest < 0.02
    experts = kinds["FP4 E2M1", "INT4" if layout.int4 else "INT8"]
    assert experts.matrices == 4 * 3 * 3
    assert experts.largest < (0.3 if layout.int4 else 0.02)


def test_what_a_conversion_reports_is_the_error_of_the_files(source: Path, tmp_path: Path) -> None:
    found = convert(source, tmp_path / "target", FOUR)
    with Checkpoint(source) as old, Checkpoint(tmp_path / "target") as new:
        before, after = FloatTensors(old.config, old), FloatTensors(new.config, new)
        errors = {
            name: float((after[name] - x).norm() / x.norm())
            for name, x in before.items()
            if old.headers.tensors[name].dtype == "I8"
        }
    (row,) = [r for r in found.roundings if r.after == "INT4"]
    assert row.largest == pytest.approx(max(errors.values()))
    assert errors[row.worst] == max(errors.values())
    assert row.mean == pytest.approx(sum(errors.values()) / len(errors))


def test_companions_travel_and_nothing_else_appears(source: Path, tmp_path: Path) -> None:
    reports: list[Progress] = []
    convert(source, tmp_path / "target", EIGHT, reports.append)
    names = {str(p.relative_to(tmp_path / "target")) for p in (tmp_path / "target").rglob("*") if p.is_file()}
    shards = {f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)}
    assert names == shards | {
        "config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE", "encoding/encoding.py"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert oct((tmp_path / "target").stat().st_mode & 0o700) == oct(0o700)
    assert {r.kind for r in reports} == {"convert"}
    assert [r.done for r in reports] == sorted(r.done for r in reports)
    assert reports[-1].done <= reports[-1].total


def test_an_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []

    def stop(report: Progress) -> None:
        seen.append(report)
        if len(seen) == 30:
            assert len(list(tmp_path.iterdir())) == 1, "it is being written beside the target"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", EIGHT, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_and_while_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("v4sdk.convert._flush", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(source, tmp_path / "target", EIGHT)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"takes .* but `.*` has .* free"):
        convert(source, tmp_path / "target", EIGHT)


def test_a_layout_that_does_not_fit_the_shapes_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"experts.0.w2` has 160 columns, expected a multiple of 64 .*`test-w4`"
    ):
        convert(source, tmp_path / "target", replace(FOUR, int4_group=64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [EIGHT, replace(FOUR, int4_group=32)])
def test_the_layout_survives_the_file(layout: IntegerLayout) -> None:
    config = replace(unquantised(TINY), integers=layout)
    assert ModelConfig.from_dict(json.loads(json.dumps(config_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": ""}, "`quantization_config.layout` is ''"),
        ({"int8": [], "int4": []}, "names no matrix"),
        ({"int8": "*.wq_b"}, "`quantization_config.int8` is '*.wq_b'"),
        ({"int4": [3]}, "`quantization_config.int4` is (3,)"),
        ({"int4_group": 3}, "`quantization_config.int4_group` is 3"),
        ({"quant_method": "int9"}, "'int9'"),
    ],
)
def test_a_wrong_quantization_config_is_named(change: dict[str, Any], said: str) -> None:
    raw = config_dict(replace(unquantised(TINY), integers=EIGHT))
    raw["quantization_config"] |= change
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert said in caught.value.message


def test_fp4_experts_beside_integers_are_refused() -> None:
    raw = config_dict(replace(unquantised(TINY), integers=EIGHT)) | {"expert_dtype": "fp4"}
    with pytest.raises(ConfigError, match="`expert_dtype` is 'fp4', expected none"):
        ModelConfig.from_dict(raw)


def test_a_folder_of_another_layout_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "target", FOUR)
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    raw["quantization_config"] |= {"int8": [*FOUR.int8, *FOUR.int4], "int4": []}
    (tmp_path / "target" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight` .* is U8 .* expected I8") as caught:
        Checkpoint(tmp_path / "target")
    assert "layout `test-w4`" in str(caught.value.hint)


def test_info_tells_how_a_converted_folder_is_stored(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "target", FOUR)
    found = describe(tmp_path / "target")
    assert found.encodings == {
        "projections": "float (INT8: *.attn.w?_b)",
        "routed experts": "INT4",
        "scales": "float32 per row",
        "layout": "test-w4",
    }
    assert found.parameters == describe(source).parameters
    assert any("layout test-w4" in line for line in found.render())


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as int8."""
    folder = tmp_path_factory.mktemp("nano") / "w8"
    convert(bundled_folder(), folder, EIGHT)
    return folder


QUESTION = [{"role": "user", "content": "What is 347 + 285?"}]


@pytest.mark.parametrize("numerics", ["reference", "fast"])
def test_a_converted_model_gives_the_answer_of_its_source(nano: Path, numerics: str) -> None:
    answers = []
    for folder in (None, nano):
        with Session.load(folder, backend="cpu", numerics=numerics) as session:
            answers.append(session.chat(QUESTION, thinking=False).content)
    assert answers[1] == answers[0] != ""


class Tight:
    """Room for a quarter of the experts."""

    nbytes = 400_000

    def render(self) -> str:
        return "tight"


def test_paged_integer_experts_give_the_same_logits(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(20, 60))
    with Session.load(nano, backend="cpu") as session:
        want = session.logits(ids)
        assert session.loaded.paging is None
        if not session.loaded.backend.pages_experts:
            pytest.skip("this system cannot page experts; ends on Linux with kernels built")
    monkeypatch.setattr("v4sdk.loading.expert_budget", lambda *args: Tight())
    monkeypatch.setattr("v4sdk.memory.MemoryPlan.warning", lambda self: "tight")
    monkeypatch.setattr("v4sdk.memory.MemoryPlan.is_small", lambda self, step: False)
    with Session.load(nano, backend="cpu") as session:
        assert session.loaded.paging is not None
        assert torch.equal(session.logits(ids), want)
        assert session.loaded.paging.usage().evictions > 0


def test_a_converted_model_computes_what_its_float_folder_computes(nano: Path, tmp_path: Path) -> None:
    with Checkpoint(nano) as checkpoint:
        config = unquantised(checkpoint.config)
        write_checkpoint(
            tmp_path / "f", config, FloatTensors(checkpoint.config, checkpoint), float_dtype="F32"
        )
    ids = list(range(100, 180))
    with (
        Session.load(nano, backend="cpu", numerics="exact") as a,
        Session.load(tmp_path / "f", backend="cpu", numerics="exact") as b,
    ):
        x, y = a.logits(ids), b.logits(ids)
    assert float((x - y).norm() / y.norm()) < 1e-5


# prints how each op of a folder's model is bound by a backend
BOUND = """
import sys
from v4sdk import plugins
from v4sdk.backend import EngineConfig, bind
from v4sdk.config import ModelConfig
backend = plugins.select(sys.argv[1])
config = ModelConfig.from_folder(sys.argv[2])
for row in bind(backend, config, EngineConfig(capability=backend.capability())).ops:
    print(row.op, row.how, row.reason, sep="|")
"""
TAKE_MATRICES = (
    "linear q_project kv_project_store grouped_out index_query routed_experts shared_expert".split()
)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_kernels_that_read_no_integers_decline_them(nano: Path, name: str) -> None:
    if name == "cuda" and find_spec("triton") is None:
        pytest.skip("Triton is not installed; ends with the extra `test` on Linux")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    found = []
    for folder in (bundled_folder(), nano):
        done = subprocess.run(
            [sys.executable, "-c", BOUND, name, str(folder)],
            env=env,
            check=True,
            capture_output=True,
            text=True,
        )
        found.append({row.split("|")[0]: row.split("|")[1:] for row in done.stdout.splitlines()})
    before, after = found
    if name == "cpu" and before["linear"][0] != "kernel":
        pytest.skip("the kernels were not built; ends where a C++17 compiler was there at installation")
    for op in TAKE_MATRICES:
        assert before[op][0] == "kernel", op
        assert after[op][0] != "kernel", op
        assert "integer matrices of layout `test-w8`" in after[op][1], op
    assert {op for op in before if before[op] != after[op]} == set(TAKE_MATRICES)


def test_a_kernel_that_is_given_integers_refuses_them() -> None:
    for weight in (eight(drawn(1, 4, 8)), four(drawn(1, 4, 8))):
        with pytest.raises(ShapeError, match=f"no kernel reads a matrix of {weight.encoding}"):
            import_module("v4sdk_cpu.arguments").matrix(weight)
        with pytest.raises(ShapeError, match=f"no kernel reads a matrix of {weight.encoding}"):
            import_module("v4sdk_cuda.operands").data_of(weight, None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """`v4sdk convert` where the example plugin is installed."""
    info = tmp_path / "installed" / "v4sdk_echo-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: v4sdk-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[v4sdk]\necho = v4sdk_echo\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.syspath_prepend(Path(__file__).parent / "plugin_echo")

    def convert_command(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["v4sdk", "convert", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return convert_command


def test_the_command_prints_bytes_and_errors_and_promises_nothing(
    run: Any, source: Path, tmp_path: Path
) -> None:
    status, out, err = run(source, tmp_path / "target", "--for", "echo-w8")
    assert status == 0, err
    assert "FP8 E4M3 to BF16" in out
    assert "FP4 E2M1 to INT8" in out
    with Checkpoint(source) as old, Checkpoint(tmp_path / "target") as new:
        assert f"{new.nbytes:,} bytes of tensors, from {old.nbytes:,}; layout echo-w8" in out
    assert "values were rounded" in out
    assert "lossless" not in (out + err).lower()


def test_the_command_gives_json(run: Any, source: Path, tmp_path: Path) -> None:
    status, out, _ = run(source, tmp_path / "target", "--for", "echo-w8", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["layout"]["name"] == "echo-w8"
    assert {r["after"] for r in found["roundings"]} == {"BF16", "INT8"}


def check_error(done: tuple[int, str, str], said: str, hinted: str) -> None:
    status, out, err = done
    lines = err.splitlines()
    assert (status, out) == (1, "")
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], err
    assert said in lines[0]
    assert hinted in lines[1]


def test_every_mistake_is_one_error_and_a_hint(run: Any, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    check_error(
        run(source, target, "--for", "echo-w9"), "`echo-w8` (backend echo)", "did you mean `echo-w8`?"
    )
    check_error(run(source, target, "--for", "zzz"), "layout `zzz` is unknown", "--for LAYOUT")
    check_error(run(tmp_path / "no", target, "--for", "echo-w8"), "does not exist", "checkpoint folder")
    check_error(
        run(source, tmp_path / "no" / "target", "--for", "echo-w8"),
        f"folder `{tmp_path / 'no'}` does not",
        "make it",
    )
    check_error(run(source, source, "--for", "echo-w8"), "overwrites nothing", "does not exist")
    # the target is looked at before a checkpoint is fetched
    check_error(run("owner/name", source, "--for", "echo-w8"), "overwrites nothing", "does not exist")
    assert run(source, target, "--for", "echo-w8")[0] == 0
    check_error(
        run(target, tmp_path / "again", "--for", "echo-w8"),
        "already converted, to layout `echo-w8`",
        "made from",
    )
    check_error(
        run(tmp_path, tmp_path / "again", "--for", "echo-w8"), "config.json` does not exist", "config.json"
    )
    assert not (tmp_path / "again").exists()


def test_two_backends_with_a_layout_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "convert_targets", lambda self: {"same": EIGHT})
    with pytest.raises(V4Error, match="layout `same` is offered by backends"):
        plugins.convert_targets()


def test_fp4_is_still_read_as_fp4() -> None:
    data, scale = pack_fp4(drawn(1, 4, 64))
    assert WeightSource({"m.weight": data, "m.scale": scale}).weight("m").encoding == "fp4"
    data, scale = pack_int8(drawn(1, 4, 64))
    assert WeightSource({"m.weight": data, "m.scale": scale}).weight("m").encoding == "int8"
    data, scale = pack_int4(drawn(1, 4, 64), 32)
    found = WeightSource({"m.weight": data.view(torch.uint8), "m.scale": scale}).weight("m")
    assert (found.encoding, found.block, found.in_features) == ("int4", (1, 32), 64)
    assert torch.equal(found.dequantize(), four(drawn(1, 4, 64), 32).dequantize())
