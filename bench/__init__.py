"""Measurements around v4sdk: the synthetic tasks of the bundled model, their generator, scores and evaluation."""
