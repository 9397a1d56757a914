"""What the verdicts are worth: every plant of `bench/parity/plants.py` in the bundled model, and what each measure says about it.

One number cannot do it. A trained model that knows its answer gives it in spite of a missing sink, so on the text it writes
the mean KL of a wrong equation lies among those of honest roundings; on other text roundings flip choices and reach what
small mistakes reach. What separates them is asking twice: in `exact` numerics, where nothing is rounded and only the order
of summation may differ, for the equations; and in rounded numerics for the precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.kv_cache import KVCache
from v4sdk.model import V4Model
from v4sdk.numerics import EXACT, FAST, Numerics
from v4sdk.weights import WeightSource
from v4sdk_bench.parity.agreement import Text
from v4sdk_bench.parity.golden import SETS_EQUAL_LIMIT
from v4sdk_bench.parity.layers import LayerAgreement, compare_layers, reference_streams, relative_limit
from v4sdk_bench.parity.metrics import Agreement, Verdict, agreement, overall, verdict
from v4sdk_bench.parity.plants import Plant, planted

_NOTHING = Plant("none", "nothing", False)


@dataclass(frozen=True)
class Calibrated:
    """What was measured of one plant.

    Attributes:
        exact: all positions, both sides in `exact`; None for a plant that only a rounding run can have.
        written: positions the model writes, both sides in `fast`; everywhere: all positions.
        layer: largest relative L2 of a layer's output on the same input streams, in `fast`, over tokens whose choices agree.
        choices: smallest share of such tokens in a layer. seen_by_layers: some layer is beyond its limits.
    """

    plant: Plant
    exact: Agreement | None
    written: Agreement
    everywhere: Agreement
    layer: float
    choices: float
    seen_by_layers: bool

    @property
    def verdict(self) -> Verdict:
        """As `v4sdk bench compare` would say it."""
        equations = verdict(self.exact, rounded=False) if self.exact else "same model"
        return overall(equations, verdict(self.written))

    @property
    def by_mean_kl(self) -> Verdict:
        """What mean KL alone would say, over the text the model writes."""
        return verdict(self.written)

    @property
    def by_mean_kl_everywhere(self) -> Verdict:
        """What mean KL alone would say, over prompts too."""
        return verdict(self.everywhere)


class Calibration:
    """Measures plants in the model of a session, over one text.

    Args:
        layer_tokens: of the first prompts, joined, that go through single layers.
    """

    def __init__(self, session: Session, source: WeightSource, text: Text, layer_tokens: int = 288) -> None:
        self._config, self._source, self._text = session.config, source, text
        self._base = {n.name: self._logits(self._model(_NOTHING, n)) for n in (EXACT, FAST)}
        joined = [i for ids in sorted(text.prompts, key=len, reverse=True) for i in ids]
        self._ids = joined[:layer_tokens]
        self._reference = self._model(_NOTHING, FAST)
        self._streams = reference_streams(self._reference, "native", [self._ids])

    def measure(self, plant: Plant) -> Calibrated:
        """Plant one change and measure it."""
        exact = None
        if not plant.touches_weights:
            exact = agreement(self._base["exact"], self._logits(self._model(plant, EXACT)))
        model = self._model(plant, FAST)
        found, base, own = self._logits(model), self._base["fast"], self._text.counted
        layers = list(compare_layers(self._reference, model, "native", [self._ids], self._streams))
        told = [part.relative_l2 for part in layers if not math.isnan(part.relative_l2)]
        return Calibrated(
            plant,
            exact,
            agreement(base[own], found[own]),
            agreement(base, found),
            max(told, default=0.0),
            min(part.choices for part in layers),
            any(_beyond(part) for part in layers),
        )

    def _model(self, plant: Plant, numerics: Numerics) -> V4Model:
        model: V4Model = planted(self._config, self._source, numerics, plant)
        return model

    @torch.inference_mode()
    def _logits(self, model: V4Model) -> Tensor:
        cache = KVCache(model.config, model.numerics.default_kv_format)
        found = []
        for ids in self._text.prompts:
            slot = cache.allocate()
            found.append(model.logits(model.forward(cache.batch([slot], [list(ids)], [0]), cache)))
            cache.release(slot)
        return torch.cat(found)


def _beyond(part: LayerAgreement) -> bool:
    within = part.relative_l2 <= relative_limit(part.part, FAST.name) and part.choices >= SETS_EQUAL_LIMIT
    return not within


@dataclass(frozen=True)
class Separation:
    """How far roundings and mistakes lie apart in one measure: the largest of the former, the smallest of the latter.

    Attributes:
        mixed: mistakes that measure no more than some rounding, of the `mistakes` this measure can be asked about.
    """

    largest_rounding: float
    smallest_mistake: float
    mixed: int
    mistakes: int

    @property
    def gap(self) -> float:
        """Smallest mistake over largest rounding; above 1 a limit can stand between them."""
        return self.smallest_mistake / self.largest_rounding if self.largest_rounding else float("inf")


def separation(pairs: Sequence[tuple[bool, float]]) -> Separation:
    """Of (wrong, measured) pairs; `mixed` counts mistakes that measure no more than some rounding."""
    harmless = max((value for wrong, value in pairs if not wrong), default=0.0)
    mistakes = [value for wrong, value in pairs if wrong]
    mixed = sum(v <= harmless for v in mistakes)
    return Separation(harmless, min(mistakes, default=float("inf")), mixed, len(mistakes))


def separations(found: Sequence[Calibrated]) -> Iterator[tuple[str, Separation]]:
    """By measure: equations in `exact`, mean KL over what is written and over everything, single layers.

    Those of equal roundings leave out the plants that round weights: two builds of one numerics option do not.
    """
    yield "exact_relative_l2", separation([(c.plant.wrong, c.exact.relative_l2) for c in found if c.exact])
    yield "written_mean_kl", separation([(c.plant.wrong, c.written.kl_mean) for c in found])
    yield "everywhere_mean_kl", separation([(c.plant.wrong, c.everywhere.kl_mean) for c in found])
    builds = [c for c in found if not c.plant.touches_weights]
    yield "same_roundings_mean_kl", separation([(c.plant.wrong, c.everywhere.kl_mean) for c in builds])
    same = [c for c in builds if c.choices >= SETS_EQUAL_LIMIT]
    yield (
        "layer_relative_l2",
        separation([(c.plant.wrong, c.layer) for c in same]),
    )
