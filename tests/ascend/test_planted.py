"""Faults planted into the calls of every family of ops, with the level that catches each; see inside/planted.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ascend.conftest import INSIDE


# the calls of 910B and 910C are the same
@pytest.mark.parametrize("family", ["910B", "950"])
def test_planted_faults_are_caught(
    stand_in: Any, socs: dict[str, str], family: str, say: Callable[[str], None]
) -> None:
    ran = stand_in.python(
        socs[family], "-m", "pytest", str(INSIDE / "planted.py"), "-q", "-s", "-p", "no:cacheprovider"
    )
    lines = re.findall(r"planted, \w+: (L\d|--) (.*)", ran.stdout)
    levels = Counter(level for level, _ in lines)
    for level, what in lines:
        print(level, what)
    say(
        f"planted, {family}: {len(lines)} faults caught, by level: {', '.join(f'{k} {v}' for k, v in sorted(levels.items()))}"
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert len(lines) >= 30
    assert set(levels) == {"L0", "L1", "L2", "L3", "L4"}
