"""The architecture, checked: who may import whom, which words live where, what stays out of start-up, and complete ops."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda", "ascend")

# A room imports only rooms of the lines above its own; rooms of one line do not know each other.
ROOMS = (
    ("errors", "progress", "recorded"),
    ("encodings",),
    ("config", "hub", "numerics", "quant", "sampling", "tokenizer"),
    ("config_file", "presets", "prompts", "tensors", "weight_formats", "weights"),
    ("headers", "ops"),
    ("backend", "checkpoint", "convert", "kv_cache"),
    ("device_errors", "expert_parallel", "hookspecs", "memory", "model", "sequence", "testing"),
    ("conversion", "decode", "info", "plugins", "state"),
    ("engine", "loading", "output"),
    ("scheduler",),
    ("prompting", "stream"),
    ("session",),
    ("cli",),
    ("__main__",),
)
# what a backend may know of v4sdk; `testing` is the public suite, by which it may try a vendor's library
BACKEND_MAY_IMPORT = {
    "backend",
    "config",
    "encodings",
    "errors",
    "hookspecs",
    "numerics",
    "ops",
    "quant",
    "recorded",
    "testing",
    "weight_formats",
    "weights",
}
# third-party library -> rooms of v4sdk that may import it
ONE_ROOM = {
    "click": {"cli"},
    "rich": {"cli"},
    "pluggy": {"hookspecs", "plugins"},
    "huggingface_hub": {"hub"},
    "tokenizers": {"tokenizer"},
    "pytest": set(),
    "transformers": set(),
    "onnx": set(),
    "onnxruntime": set(),
    "triton": set(),
    "torch_npu": set(),
}
NO_TORCH = set(
    """errors progress encodings hub numerics config config_file presets tensors tokenizer prompts hookspecs plugins sampling
    headers""".split()
)
VENDOR_WORDS = re.compile(r"(?<![a-z])(cuda|npu|ascend|triton|nvidia|huawei)(?![a-z])", re.IGNORECASE)
VOCABULARY = """embed hc_pre hc_post hc_post_pre hc_head rms_norm linear q_project kv_project_store compress index_query
    index_topk sparse_attn grouped_out route route_hash routed_experts shared_expert logits sample rope_table feed""".split()


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Dotted names a file imports, each with whether that happens at module level and outside TYPE_CHECKING."""

    def walk(nodes: list[ast.stmt], eager: bool) -> Iterator[tuple[str, bool]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, eager) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                # `from v4sdk import ops` imports the room `v4sdk.ops`
                names = (
                    [f"v4sdk.{a.name}" for a in node.names] if node.module == "v4sdk" else [str(node.module)]
                )
                yield from ((name, eager) for name in names)
            else:
                typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                inner = [
                    child
                    for child in ast.iter_child_nodes(node)
                    if isinstance(child, (ast.stmt, ast.excepthandler))
                ]
                yield from walk(inner, eager and not typing_only and not deferred)  # type: ignore[arg-type]

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")).body, True))


def room(path: Path) -> str:
    """`v4sdk/ops/norm.py` and `v4sdk/ops/__init__.py` are in the room `ops`."""
    return path.relative_to(ROOT / "v4sdk").parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name, _ in imports(path))
    rooms = {parts[1] for parts in names if parts[0] == "v4sdk" and len(parts) > 1}
    return {r for r in rooms if (ROOT / "v4sdk" / r).exists() or (ROOT / "v4sdk" / f"{r}.py").exists()}


@pytest.mark.parametrize("path", sources("v4sdk"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    if path == ROOT / "v4sdk" / "__init__.py":
        return
    level = {name: i for i, line in enumerate(ROOMS) for name in line}
    own = room(path)
    assert own in level, f"`{own}` is a new room: give it its place in ROOMS"
    upward = {r for r in rooms_imported(path) - {own} if level.get(r, len(ROOMS)) >= level[own]}
    assert not upward, f"`{own}` may not import {sorted(upward)}"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_knows_ops_and_nothing_of_the_model(name: str) -> None:
    for path in sources(f"backends/{name}"):
        assert rooms_imported(path) <= BACKEND_MAY_IMPORT, path
        others = {f"v4sdk_{other}" for other in BACKENDS}
        assert not others & {n.split(".")[0] for n, _ in imports(path)}, f"{path} imports a backend by name"


@pytest.mark.parametrize("folder", ["v4sdk", "bench", "tests", "examples"])
def test_nobody_imports_a_backend_by_name(folder: str) -> None:
    for path in sources(folder):
        top = {name.split(".")[0] for name, _ in imports(path)}
        assert not top & {f"v4sdk_{name}" for name in BACKENDS}, path


@pytest.mark.parametrize("path", sources("v4sdk"), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_lives_in_its_room(path: Path) -> None:
    for name, _ in imports(path):
        library = name.split(".")[0]
        assert room(path) in ONE_ROOM.get(library, {room(path)}), f"`{library}` may not be imported here"


def test_rooms_that_need_no_torch_do_not_import_it() -> None:
    for path in sources("v4sdk"):
        eager = {name.split(".")[0] for name, eager in imports(path) if eager}
        assert "torch" not in eager or room(path) not in NO_TORCH, path


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_import_no_vendor_library_at_module_level(name: str) -> None:
    for path in (ROOT / "backends" / name / "__init__.py", ROOT / "backends" / name / "backend.py"):
        eager = {n.split(".")[0] for n, eager in imports(path) if eager}
        assert not eager & {"triton", "torch_npu", "onnxruntime", "tilelang", "cuda"}, path


def test_core_names_no_vendor() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("v4sdk")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if VENDOR_WORDS.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import v4sdk",
        "import v4sdk.plugins as p; p.load_all()",
        "import sys, v4sdk.cli\nsys.argv = ['v4sdk', '--help']\ntry: v4sdk.cli.main()\nexcept SystemExit: pass",
    ],
    ids=["import", "plugins", "help"],
)
def test_start_up_leaves_torch_out(code: str) -> None:
    check = "import sys; heavy = {'torch', 'tokenizers', 'huggingface_hub', 'rich'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True, capture_output=True, text=True)


def test_the_wheel_holds_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "v4sdk").rglob("__init__.py")}
    assert inside == {name for name in listed if name.split(".")[0] == "v4sdk"}
    assert {"v4sdk_bench", *(f"v4sdk_{name}" for name in BACKENDS)} <= set(listed)


def test_the_vocabulary_is_whole() -> None:
    from v4sdk.ops import OPS

    assert sorted(OPS) == sorted(VOCABULARY)


@pytest.mark.parametrize("name", VOCABULARY)
def test_every_op_is_complete(name: str) -> None:
    from v4sdk.ops import OPS

    op = OPS[name]
    assert op.doc.strip().splitlines()[0].endswith("."), "the first line is a sentence"
    assert "Shapes:" in op.doc
    assert set(op.mutates) <= set(op.signature.parameters)
    assert all(part.name in OPS for part in op.parts)
    assert op.inputs is not None, "no input generator"
    cases = list(op.inputs())
    assert len({case.label for case in cases}) == len(cases), "labels name cases"
    assert {"tiny", "odd"} <= {case.scale for case in cases}
    assert {"flash", "pro"} & {case.scale for case in cases}, "no case of real shapes"
    assert op.cost is not None, "no cost function"
    assert all(tolerance.reason for tolerance in op.tolerances.values())
