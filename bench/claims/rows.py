"""What a suite found, as rows that answer claims of the ledger: claimed, found, and whether they agree as it demands."""

from __future__ import annotations

from collections.abc import Mapping

from v4sdk.backend import Evidence
from v4sdk_bench.claims.ledger import Claim
from v4sdk_bench.record import SPEED_ENDINGS, Row, Value, judged, not_run
from v4sdk_bench.stage import Bench


def answer(
    bench: Bench,
    claim: Claim,
    key: str,
    found: float,
    *,
    more: Mapping[str, Value] | None = None,
    limits: Mapping[str, float] | None = None,
    setting: Mapping[str, Value] | None = None,
    note: str = "",
    evidence: Evidence = "reference",
    seed: int | None = None,
    judge: bool = True,
) -> Row:
    """Make the row of one figure: claimed, found, and whether they agree as the ledger demands.

    Args:
        more: further values. limits: on those. A failed row keeps no speeds.
        judge: hold `found` to the ledger; False where it was taken under other conditions than the claim's,
            or its noise allows no verdict.
    """
    figure = claim.figure(key)
    claimed: Value = list(figure.claimed) if isinstance(figure.claimed, tuple) else figure.claimed
    values: dict[str, Value] = {"claimed": claimed, "found": found}
    # beside a bound the distance to the published figure would only mislead
    if not isinstance(figure.claimed, tuple) and figure.at_most is None and figure.at_least is None:
        values["deviation"] = abs(found - figure.claimed)
    values |= more or {}
    every = {**(figure.limits if judge else {}), **(limits or {})}
    state = judged(values, every)
    if state == "ok" and not (judge and figure.limits):
        # further limits hold, but of the claim the row says nothing
        state = "info"
    if state == "failed":
        values = {name: value for name, value in values.items() if not name.endswith(SPEED_ENDINGS)}
        every = {name: limit for name, limit in every.items() if name.removeprefix(">=") in values}
    basis = "arithmetic, nothing was measured" if claim.status == "reproduced by arithmetic" else ""
    return Row(
        key, f"{figure.what} ({figure.unit})", state, evidence, values, every, dict(setting or {}),
        "; ".join(text for text in (basis, note) if text), bench.command(key), seed,
    )  # fmt: skip


def untestable(bench: Bench, claim: Claim) -> list[Row]:
    """The rows of a claim that cannot be tested here: not run, with what they need."""
    return [
        not_run(figure.key, f"{figure.what} ({figure.unit})", f"needs {claim.needs}", command=bench.command(figure.key))
        for figure in claim.figures
    ]  # fmt: skip
