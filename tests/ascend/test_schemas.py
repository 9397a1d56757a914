"""The table of vendor calls against the schemas of the vendors' wheels: read from their bytes, and from a live dispatcher."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

contract = importlib.import_module("v4sdk_ascend.contract").contract
chip = importlib.import_module("v4sdk_ascend.chip")

# what ships a row: the distribution whose tables it is held against
DISTRIBUTION = {"stock": "torch-npu", "vendorpack": "vllm-ascend"}
WHEEL_ROWS = sorted(key for key, call in contract().items() if call.source == "wheel")
# an argument whose type as written changed between releases; a dtype of torch is taken as either
DTYPES = {"int?", "ScalarType?"}
# the defaults of these serve another model, so that they must be passed
OF_ANOTHER_MODEL = {
    "npu.npu_clipped_swiglu": {"alpha": 1.702, "limit": 7.0, "bias": 1.0, "interleaved": True},
    "npu.npu_dequant_swiglu_quant": {
        "clamp_limit": 7.0,
        "glu_alpha": 1.702,
        "glu_bias": 1.0,
        "swiglu_mode": 0,
    },
    "npu.npu_lightning_indexer": {"sparse_count": 2048, "sparse_mode": 3},
    "npu.npu_sparse_flash_attention": {"sparse_mode": 3, "attention_mode": 0},
    "npu.npu_moe_distribute_dispatch_v2": {"shared_expert_num": 1},
    "npu.npu_moe_distribute_combine_v2": {"shared_expert_num": 1},
    "npu.npu_rotary_mul": {"rotary_mode": "half"},
    "_C_ascend.moe_gating_top_k_hash": {"norm_type": 0, "renorm": 0},
}


# registered by the wheel's Python, or without a schema as text
WITHOUT_TEXT = set(
    """print_npugraph_tensor save_npugraph_tensor set_op_timeout_ms super_kernel_scope_begin super_kernel_scope_end""".split()
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A call as it is passed on one family: what the table says of it, to be held against one wheel."""

    key: str
    family: str
    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    since: str

    def misspelt(self) -> Claim:
        """The same with the name of its last argument misspelt."""
        part = "keyword" if self.keyword else "positional"
        names = getattr(self, part)
        return dataclasses.replace(self, **{part: (*names[:-1], f"{names[-1]}_")})


def claims(key: str) -> Iterator[Claim]:
    call = contract()[key]
    for family in sorted(call.chips):
        keyword = call.arguments(family)[len(call.positional) :]
        since = call.since_950 if family == "950" and call.since_950 else call.since
        yield Claim(key, family, call.positional, keyword, since)


def overload(table: Any, claim: Claim) -> Any:
    """The overload that takes a call."""
    found = table.schemas[claim.key.split(".")[1]]
    return next(s for s in found if not s.misfit(claim.positional, claim.keyword))


def of_row(tables: tuple[Any, ...], key: str) -> list[Any]:
    return [t for t in tables if t.distribution == DISTRIBUTION[contract()[key].pack]]


def misfit(table: Any, claim: Claim) -> tuple[str, ...]:
    assert table.namespace == claim.key.split(".")[0]
    return tuple(table.misfit(claim.key.split(".")[1], claim.positional, claim.keyword))


def test_the_tables_are_whole(tables: tuple[Any, ...]) -> None:
    found = {(t.distribution, t.version): len(t.texts) for t in tables}
    assert found == {
        ("torch-npu", "2.8.0.post2"): 335, ("torch-npu", "2.10.0.post4"): 421, ("torch-npu", "2.13.0"): 423,
        ("torch-npu", "2.14.0"): 423, ("vllm-ascend", "0.23.0"): 65,
    }  # fmt: skip
    assert all(t.wheel.startswith(t.distribution.replace("-", "_") + f"-{t.version}-") for t in tables)


@pytest.mark.parametrize("key", WHEEL_ROWS)
def test_a_row_resolves_from_its_version_on_and_not_before(
    tables: tuple[Any, ...], key: str, release: Any
) -> None:
    for claim in claims(key):
        known = [t.version for t in of_row(tables, key)]
        assert claim.since in known, f"{claim.since} has no table, so nothing is known of it"
        for table in of_row(tables, key):
            found = misfit(table, claim)
            if release(table.version) >= release(claim.since):
                assert not found, f"{key} on {claim.family} with {table.version}: {'; '.join(found)}"
            else:
                assert found, (
                    f"{key} on {claim.family} resolves with {table.version} already, before {claim.since}"
                )


@pytest.mark.parametrize("key", WHEEL_ROWS)
def test_a_misspelt_argument_is_reported(tables: tuple[Any, ...], key: str) -> None:
    for claim in claims(key):
        wrong = claim.misspelt()
        name = (*wrong.positional, *wrong.keyword)[-1]
        for table in of_row(tables, key):
            found = misfit(table, wrong)
            assert any(name in text or "not registered" in text for text in found), found


def test_what_else_is_reported(schemas: Any) -> None:
    schema = schemas.parse(
        'npu_x(Tensor a, Tensor b, *, int[2] c=[0, 1], str d="x, y", Tensor(a!)[]? e=None) -> (Tensor, int[])'
    )
    assert [(a.name, a.value, a.keyword) for a in schema.arguments] == [
        ("a", None, False), ("b", None, False), ("c", [0, 1], True), ("d", "x, y", True), ("e", None, True),
    ]  # fmt: skip
    assert schema.returns == ("Tensor", "int[]")
    assert schema.misfit(("a", "b"), ("c", "e")) == ()
    assert schema.misfit(("a",), ()) == ("b must be passed",)
    assert schema.misfit(("b", "a"), ()) == (
        "b is not argument 1 by position",
        "a is not argument 2 by position",
    )
    assert schema.misfit(("a", "b", "c"), ()) == ("c is not argument 3 by position",)
    assert schema.misfit(("a", "b"), ("f",)) == ("no argument f",)
    for text in (
        "npu_x",
        "npu_x(Tensor a",
        "npu_x(Tensor a)",
        "npu_x(%s a) -> Tensor",
        "a()->b() == c",
        "f(int a) -> 1",
    ):
        with pytest.raises(ValueError, match="no "):
            schemas.parse(text)


def test_schemas_are_found_among_other_bytes(schemas: Any) -> None:
    noise = b"\x7fELF\0a() -> if\0npu_y(int a) ->\0"
    data = noise + b"npu_x(Tensor a,\n  int b=1)-> Tensor\0" + noise + b"npu_z() -> ()"
    assert schemas.in_bytes(data) == ("npu_x(Tensor a, int b=1)-> Tensor", "npu_z() -> ()")


@pytest.mark.parametrize("key", WHEEL_ROWS)
def test_defaults_that_are_relied_on_did_not_change(tables: tuple[Any, ...], key: str, release: Any) -> None:
    for claim in claims(key):
        passed = {*claim.positional, *claim.keyword}
        seen: dict[str, Any] = {}
        for table in (t for t in of_row(tables, key) if release(t.version) >= release(claim.since)):
            for argument in overload(table, claim).arguments:
                if argument.name not in passed:
                    assert argument.default is not None
                    # optional tensors, numbers and words: None, the same number, the same word
                    assert seen.setdefault(argument.name, argument.value) == argument.value, (
                        f"{key}: {argument.name}={argument.default} in {table.version}, and it was {seen[argument.name]!r} before"
                    )


@pytest.mark.parametrize("key", sorted(OF_ANOTHER_MODEL))
def test_defaults_of_another_model_are_never_relied_on(
    tables: tuple[Any, ...], key: str, release: Any
) -> None:
    for claim in claims(key):
        assert OF_ANOTHER_MODEL[key].keys() <= {*claim.positional, *claim.keyword}
        table = of_row(tables, key)[-1]
        by_name = {a.name: a.value for a in overload(table, claim).arguments}
        assert {name: by_name[name] for name in OF_ANOTHER_MODEL[key]} == OF_ANOTHER_MODEL[key]


@pytest.mark.parametrize("key", WHEEL_ROWS)
def test_arguments_kept_their_types(tables: tuple[Any, ...], key: str, release: Any) -> None:
    for claim in claims(key):
        seen: dict[str, set[str]] = {}
        for table in (t for t in of_row(tables, key) if release(t.version) >= release(claim.since)):
            for argument in overload(table, claim).arguments:
                # one that became optional takes what it took before
                seen.setdefault(argument.name, set()).add(
                    argument.type if argument.type in DTYPES else argument.type.rstrip("?")
                )
        changed = {
            n: types
            for n, types in seen.items()
            if len(types) > 1 and n in (*claim.positional, *claim.keyword)
        }
        assert all(types <= DTYPES and name.endswith("dtype") for name, types in changed.items()), (
            f"{key}: {changed}"
        )


def test_transcribed_rows_fit_the_schema_they_quote(schemas: Any) -> None:
    rows = [call for call in contract().values() if call.source == "transcribed"]
    assert rows
    for call in rows:
        schema = schemas.parse(call.schema)
        assert schema.name == call.name
        assert call.document, f"{call.key} says not where its schema is from"
        keyword = call.arguments("950")[len(call.positional) :]
        assert not schema.misfit(call.positional, keyword), call.key
        assert schema.misfit(call.positional, (*keyword, "misspelt")), call.key


def test_every_document_is_named_with_its_commit_or_said_to_be_unpinned() -> None:
    for call in contract().values():
        for part in filter(None, call.document.split("; ")):
            assert re.search(r"\b[0-9a-f]{12}\b|\(unpinned: .+\)$", part), f"{call.key}: {part}"


def test_counts(tables: tuple[Any, ...], say: Callable[[str], None]) -> None:
    rows = contract().values()
    by_source = {source: [c for c in rows if c.source == source] for source in ("wheel", "transcribed")}
    checks = sum(len(of_row(tables, key)) * len(list(claims(key))) for key in WHEEL_ROWS)
    say(
        f"L0: {len(by_source['wheel'])} ops by wheel, {checks} checks of op x version x family over {len(tables)} wheels; "
        f"{len(by_source['transcribed'])} ops transcribed from documents are in no wheel here"
    )
    assert checks > len(WHEEL_ROWS)


# --- the live dispatcher, behind the stand-in for CANN ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def facts(stand_in: Any, family: str, socs: dict[str, str]) -> Any:
    return stand_in.facts(socs[family], "facts.py", family)


def test_the_probe_sees_the_chip(facts: Any, family: str, socs: dict[str, str]) -> None:
    known = chip.by_name(socs[family])
    assert known.family == family
    assert facts["probe"] == {
        "available": True, "count": 1, "name": socs[family], "code": known.code, "version": "2.13.0"
    }  # fmt: skip


def test_without_devices_none_is_seen(stand_in: Any, socs: dict[str, str]) -> None:
    code = "import torch, torch_npu; print(torch.npu.is_available(), torch.npu.device_count())"
    ran = stand_in.python(socs["910B"], "-c", code, count=0)
    assert ran.stdout.splitlines()[-1] == "False 0", ran.stderr


def test_the_live_dispatcher_has_the_schemas_of_the_table(
    facts: Any, family: str, tables: tuple[Any, ...], schemas: Any, say: Callable[[str], None]
) -> None:
    table = next(t for t in tables if t.version == facts["probe"]["version"])
    live: dict[tuple[str, str], Any] = {}
    for text in facts["schemas"]:
        if text.removeprefix("npu::").split("(")[0].split(".")[0] not in WITHOUT_TEXT:
            schema = schemas.parse(text.removeprefix("npu::"))
            live[schema.name, schema.overload] = schema
    written = {(s.name, s.overload): s for found in table.schemas.values() for s in found}
    assert live.keys() <= written.keys()
    # of another library of the dispatcher
    assert all(name.startswith("wrap_") for name, _ in written.keys() - live.keys())
    for key in live.keys() & written.keys():
        assert _plain(live[key]) == _plain(written[key]), key
    say(
        f"L1, {family}: {len(live.keys() & written.keys())} schemas of the live dispatcher are those of the table"
    )


def _plain(schema: Any) -> tuple[Any, ...]:
    arguments = [(a.name, a.type, _one(a.value), a.default is None, a.keyword) for a in schema.arguments]
    return (arguments, schema.returns)


def _one(value: Any) -> Any:
    # the dispatcher writes a list of equal numbers as one of them, and words of the C++ library as their numbers
    if isinstance(value, list) and len(set(value)) == 1:
        return value[0]
    return {"Mean": 1, "contiguous_format": 0}.get(value, value) if isinstance(value, str) else value


def test_nothing_of_the_stock_rows_is_lacking(facts: Any, family: str) -> None:
    rows = {key for key, call in contract().items() if call.pack == "stock" and family in call.chips}
    assert facts["lacks"] == dict.fromkeys(rows)
    assert set(facts["lacks_misspelt"]) == rows
    assert all("no argument" in str(said) for said in facts["lacks_misspelt"].values()), facts[
        "lacks_misspelt"
    ]
