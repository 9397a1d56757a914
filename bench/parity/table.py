"""The parity table: every comparison with the official forward pass and with transformers, with its measured number.

`python -m v4sdk_bench.parity.table` prints it; exit code 1 if a line is over its limit. Everything here is computed by the
references on this machine, so every line carries the evidence word `reference`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from v4sdk.checkpoint import Checkpoint
from v4sdk.config import ModelConfig
from v4sdk.numerics import EXACT, Numerics
from v4sdk_bench.machine import machine
from v4sdk_bench.parity import golden as g

EVIDENCE = "reference"
_LAYER_PARTS = ("attn_out", "ffn_out", "streams_after_layer", "route_weights")


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        what: subject and quantity. measured: the number, None where the line could not run. limit: the gate; `None` for a
            line that only informs. at_least: the gate is a lower bound. note: which key was worst, or why it did not run.
    """

    what: str
    measured: float | None
    limit: float | None
    at_least: bool = False
    note: str = ""
    evidence: str = EVIDENCE

    @property
    def state(self) -> str:
        """`ok`, `FAIL`, `not run`, or `info`."""
        if self.measured is None:
            return "not run"
        if self.limit is None:
            return "info"
        ok = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return "ok" if ok else "FAIL"


def golden_lines(folder: Path, expected: str, numerics: Numerics, gated: bool = True) -> Iterator[Line]:
    """Maximum absolute difference by layer, of logits, decode logits and MTP logits; routing and index sets."""
    want = g.Golden.load(folder / "tiny-fp32", expected)
    found = g.outputs(want, numerics)
    off = g.max_abs(found, want.expected)
    what, limit = f"{expected}, {numerics.name}", g.MAX_ABS_LIMIT if gated else None
    aside = "" if gated else "informs: chance at two rows that lie on a rounding's edge"
    for layer in range(want.config.num_hidden_layers):
        keys = {part: off[f"{part}_{layer}"] for part in _LAYER_PARTS}
        worst = max(keys, key=lambda part: keys[part])
        yield Line(f"{what}: layer {layer}, max-abs", keys[worst], limit, note=aside or f"largest in {worst}")
    for key, name in (("logits", "logits"), (g.DECODE_KEY, "decode logits"), ("mtp_logits", "MTP logits")):
        yield Line(f"{what}: {name}, max-abs", off[key], limit, note=aside)
    sets = g.sets_equal(found, want.expected)
    yield Line(
        f"{what}: routing and index sets equal",
        min(sets.values()),
        g.SETS_EQUAL_LIMIT if gated else None,
        True,
    )


def layer_lines(folder: Path) -> Iterator[Line]:
    """Reference numerics on the quantised golden, each layer from the golden streams of the layer before."""
    want = g.Golden.load(folder / "tiny-quant")
    differences = [g.layer_difference(want, i) for i in range(want.config.num_hidden_layers)]
    for d in differences:
        for part, limit in (
            ("attn_out", g.ATTENTION_REL_LIMIT),
            ("ffn_out", g.LAYER_REL_LIMIT),
            ("streams_after_layer", g.LAYER_REL_LIMIT),
        ):
            yield Line(
                f"tiny-quant, reference: layer {d.layer} {part}, relative L2", d.relative[part], limit,
                note=f"largest element off by {d.largest[part]:.1e} of the maximum",
            )  # fmt: skip
    largest = max(max(d.largest.values()) for d in differences)
    yield Line("tiny-quant, reference: largest element, over the maximum", largest, g.LAYER_MAX_ABS_LIMIT)
    yield Line("tiny-quant, reference: MTP logits, relative L2", g.mtp_difference(want), g.LAYER_REL_LIMIT)
    experts = [d.experts for d in differences]
    yield Line(
        "tiny-quant, reference: routing sets equal, all layers", sum(experts) / len(experts), g.SETS_EQUAL_LIMIT, True,
        f"worst layer {min(experts):.4f}",
    )  # fmt: skip
    picks = [d.picks for d in differences if d.picks is not None]
    plain = [d.plain_picks for d in differences if d.plain_picks is not None]
    yield Line(
        "tiny-quant, reference: index sets equal, all layers", sum(picks) / len(picks), g.SETS_EQUAL_LIMIT, True,
        f"worst layer {min(picks):.4f}; entries of exactly equal score count as equal, without that "
        f"{sum(plain) / len(plain):.4f}, worst layer {min(plain):.4f}",
    )  # fmt: skip


def elsewhere_lines(folder: Path, model: Path | None, quick: bool = False) -> Iterator[Line]:
    """Logits of `exact` and loaded weights against transformers, on fresh models, the goldens and the bundled model.

    Quick: one fresh model in place of eight, and of the goldens the quantised one.
    """
    if importlib.util.find_spec("transformers") is None:
        yield Line("transformers", None, None, note="transformers is not installed: pip install v4sdk[test]")
        return
    from v4sdk_bench.parity.independent import RELATIVE_LIMIT, load_elsewhere, logits_difference
    from v4sdk_bench.parity.tiny import VARIANTS, draw

    def lines(what: str, found: tuple[float, float]) -> Iterator[Line]:
        for part, value in zip(("prefill", "decode"), found, strict=True):
            yield Line(f"transformers fp32: {what}, {part}, relative L2", value, RELATIVE_LIMIT)

    for variant, config in list(VARIANTS.items())[: 1 if quick else None]:
        for seed in (0,) if quick else (0, 1):
            ids = random.Random(seed).choices(range(config.vocab_size), k=280)
            yield from lines(
                f"{variant}, seed {seed}", logits_difference(config, draw(config, seed), ids, 252)
            )
    for name, where in (
        ("tiny-fp32", folder / "tiny-fp32"),
        ("tiny-quant", folder / "tiny-quant"),
        ("v4-nano", model),
    ):
        if quick and name == "tiny-fp32":
            continue
        if where is None:
            yield Line(f"transformers fp32: {name}", None, None, note="the bundled model is not in this tree")
            continue
        config = ModelConfig.from_folder(where)
        ids = random.Random(0).choices(range(config.vocab_size), k=160)
        with Checkpoint(where) as checkpoint:
            yield from lines(name, logits_difference(config, checkpoint, ids, 124))
        if config.quantization is None:
            continue
        if importlib.util.find_spec("accelerate") is None:
            yield Line(f"transformers: {name} loaded", None, None, note="accelerate is not installed")
            continue
        loaded = load_elsewhere(where)
        yield Line(f"transformers: {name}, missing or unexpected keys", len(loaded.report), 0)
        different, note = len(loaded.different), f"{loaded.compared} tensors compared"
        yield Line(f"transformers: {name}, weights that differ in a bit", different, 0, note=note)


def fast_lines(model: Path | None) -> Iterator[Line]:
    """Mean KL of `fast` to `reference` on the bundled model, over the text it writes; over prompts for information."""
    from v4sdk_bench.parity.divergence import MEAN_KL_LIMIT, compare

    what = "v4-nano: mean KL of fast to reference"
    if model is None:
        yield Line(what, None, MEAN_KL_LIMIT, note="the bundled model is not in this tree")
        return
    found = compare(str(model))
    note = f"{found.positions} positions, largest {found.largest:.1e}, same best token {found.same_top:.4f}"
    yield Line(f"{what}, answers", found.mean, MEAN_KL_LIMIT, note=note)
    everywhere = "prompts of random words included: near chance there, so every flipped choice counts"
    yield Line(f"{what}, all positions", found.mean_everywhere, None, note=everywhere)


def sections(
    folder: Path, model: Path | None, quick: bool = False
) -> dict[str, Callable[[], Iterator[Line]]]:
    """The table's parts by name; `quick` leaves out most of the fresh models."""
    return {
        "fp32": lambda: golden_lines(folder, "expected", EXACT),
        "kvquant": lambda: golden_lines(folder, "expected_kvquant", g.KV_ROUNDED_WIDE),
        # informs: two rows of this golden lie closer to a rounding's edge than float32 noise, see `KV_ROUNDED_WIDE`
        "kvquant32": lambda: golden_lines(folder, "expected_kvquant", g.KV_ROUNDED, gated=False),
        "quant": lambda: layer_lines(folder),
        "transformers": lambda: elsewhere_lines(folder, model, quick),
        "fast": lambda: fast_lines(model),
    }


def main() -> int:
    """Print the table; 0 if every line that ran is within its limit."""
    parser = argparse.ArgumentParser(prog="python -m v4sdk_bench.parity.table", description=__doc__)
    parser.add_argument("--golden", type=Path, default=Path("tests/golden"), help="folder of the goldens")
    parser.add_argument(
        "--model", type=Path, default=None, help="folder of the bundled model (default: the installed one)"
    )
    parser.add_argument(
        "--only", action="append", help="a section: fp32, kvquant, kvquant32, quant, transformers, fast"
    )
    parser.add_argument("--json", type=Path, help="also write the record here")
    options = parser.parse_args()
    if not (options.golden / "tiny-fp32").is_dir():
        parser.error(f"no goldens in {options.golden}: give the repository's tests/golden with --golden")
    parts = sections(options.golden, options.model or bundled_model())
    unknown = set(options.only or ()) - set(parts)
    if unknown:
        parser.error(f"section {', '.join(sorted(unknown))} is unknown, expected one of {', '.join(parts)}")
    about, begin = machine(), time.monotonic()
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(f"{'':7}  {'measured':>9}  {'limit':>9}  evidence   what")
    lines = []
    for name in options.only or parts:
        for line in parts[name]():
            lines.append(line)
            print(render(line), flush=True)
    failed = sum(line.state == "FAIL" for line in lines)
    print(f"\n{len(lines)} lines, {failed} over their limit, {time.monotonic() - begin:.0f} s")
    if options.json:
        record = {"about": about, "lines": [asdict(line) | {"state": line.state} for line in lines]}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def bundled_model() -> Path | None:
    """The folder of the installed v4-nano, if its weights are there."""
    import v4sdk

    folder = Path(v4sdk.__file__).parent / "nano"
    return folder if any(folder.glob("*.safetensors")) else None


def render(line: Line) -> str:
    """One line of the table."""

    def number(value: float | None) -> str:
        return (
            "-"
            if value is None
            else f"{value:.4g}"
            if value == int(value) or line.at_least
            else f"{value:.2e}"
        )

    sign = ">=" if line.at_least else "<="
    limit = "" if line.limit is None else f"{sign}{number(line.limit)}"
    note = f"  ({line.note})" if line.note else ""
    return f"{line.state:7}  {number(line.measured):>9}  {limit:>9}  {line.evidence:9}  {line.what}{note}"


if __name__ == "__main__":
    sys.exit(main())
