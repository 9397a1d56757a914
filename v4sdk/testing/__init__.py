"""The public conformance suite: what a plugin author runs to know that a backend computes what v4sdk means."""

from __future__ import annotations

from v4sdk.testing.compare import Difference, assert_close, compare, tolerance_for
from v4sdk.testing.conformance import CaseResult, Report, judge_case, run_conformance
from v4sdk.testing.memory import poisoned_memory

__all__ = [
    "CaseResult",
    "Difference",
    "Report",
    "assert_close",
    "compare",
    "judge_case",
    "poisoned_memory",
    "run_conformance",
    "tolerance_for",
]
